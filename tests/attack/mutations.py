"""Damage to files: bytes that change by chance, and JSON that a forger changed with care."""

import json
import random
from collections.abc import Iterator
from time import monotonic
from typing import Any

STRANGE: list[Any] = [
    *(None, True, False, -1, 0, 1, 2, 1.5, -0.0, 1e300, 10**9, 2**31, 2**62, 2**63, 10**400),
    *("", "x", "../x", "/etc/passwd", "a\0b", "\ud800", "n" * 300),
    *([], {}, [[]], [None], {"a": 1}, [0] * 100, {"": {}}),
]


def cases(seconds: float, least: int, seed: int) -> Iterator[random.Random]:
    """Yield a seeded generator for each case, until the time is over and for `least` of them."""
    end, number = monotonic() + seconds, 0
    while number < least or monotonic() < end:
        yield random.Random(f"{seed}/{number}")
        number += 1


def damaged(data: bytes, draw: random.Random) -> bytes:
    """Return other bytes: one bit or byte changed, a part cut, put in, zeroed or repeated."""
    at, size = draw.randrange(len(data)), draw.randint(1, 64)
    kind = draw.choice(("bit", "bit", "byte", "cut", "insert", "zero", "repeat", "swap"))
    rest = data[at + size :]
    if kind == "bit":
        return data[:at] + bytes([data[at] ^ 1 << draw.randrange(8)]) + data[at + 1 :]
    if kind == "byte":
        return data[:at] + bytes([data[at] ^ draw.randint(1, 255)]) + data[at + 1 :]
    if kind == "cut":
        return data[:at]
    if kind == "insert":
        return data[:at] + draw.randbytes(size) + data[at:]
    if kind == "zero":
        return data[:at] + bytes(len(data[at : at + size])) + rest
    if kind == "repeat":
        return data[: at + size] + data[at : at + size] + rest
    other = draw.randrange(len(data))
    changed = bytearray(data)
    changed[at], changed[other] = changed[other], changed[at]
    return bytes(changed)


def forged(text: bytes, draw: random.Random) -> dict[str, Any]:
    """Return a JSON object with one value, however deep, replaced, removed, copied or nested."""
    value = json.loads(text)
    at = value
    while True:
        keys = sorted(at) if isinstance(at, dict) else range(len(at))
        key = draw.choice(list(keys))
        if isinstance(at[key], dict | list) and at[key] and draw.random() < 0.8:
            at = at[key]
            continue
        kind = draw.choice(("replace", "replace", "number", "remove", "twice", "nest"))
        if kind == "number" and isinstance(at[key], int | float):
            at[key] = at[key] + draw.choice((-1, 1, -(10**6), 10**6, 0.5))
        elif kind == "remove":
            del at[key]
        elif kind == "twice" and isinstance(at, list):
            at.append(at[key])
        elif kind == "nest":
            for _ in range(draw.choice((1, 50))):
                at[key] = [at[key]]
        else:
            at[key] = draw.choice(STRANGE)
        return value
