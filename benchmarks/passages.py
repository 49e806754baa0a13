"""Texts for a decoder: Python code and English, each split into calibration and held-out windows.

Both come with the interpreter, so nothing is downloaded. Code is the files of the standard library,
without folders of tests, without installed packages, and without the topics, which are the English
text: Python's reference manual, as `pydoc_data.topics` has it. The hash of a file's path, or of a
topic's name, says which split it is in. Where a paragraph of at least `SHARED` characters is in a
held-out text, no calibration text keeps it: topics quote each other, files share headers.

A window is a beginning-of-text token and the tokens that follow each other in one text; no two
windows overlap. The last windows of the calibration split never come in `drawn`: they judge what
is tuned.
"""

import functools
import hashlib
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

SKIPPED = {
    *("site-packages", "test", "tests", "idlelib", "lib2to3", "ensurepip", "__pycache__"),
    "pydoc_data",
}
TEXTS = ("code", "english")
HELD_OUT = {"code": 10, "english": 4}  # one in so many
SHARED = 60
JUDGES = 16  # windows

Encode = Callable[[list[str]], list[list[int]]]


@dataclass(frozen=True)
class Split:
    """The texts of one kind, calibration and held-out."""

    calibration: tuple[str, ...]
    heldout: tuple[str, ...]

    def digest(self) -> str:
        """Sixteen hex digits of all texts, which differ between versions of Python."""
        parts = "\0".join([*self.calibration, "\0", *self.heldout])
        return hashlib.sha256(parts.encode()).hexdigest()[:16]


@functools.cache
def split(text: str) -> Split:
    """All texts called ``code`` or ``english``, by the hash of their names."""
    sources = _code() if text == "code" else _english()
    held = {name for name in sources if _hash(name) % HELD_OUT[text] == 0}
    heldout = [sources[name] for name in sources if name in held]
    known = {p for source in heldout for p in _paragraphs(source) if len(p) >= SHARED}
    calibration = [
        "\n\n".join(p for p in _paragraphs(sources[name]) if p not in known)
        for name in sources
        if name not in held
    ]
    return Split(tuple(calibration), tuple(heldout))


def windows(texts: tuple[str, ...], encode: Encode, start: int, length: int) -> Tensor:
    """All windows of some texts, in an order that is fixed and mixed. int64 ``[n, length]``."""
    found = []
    for tokens in encode(list(texts)):
        for at in range(0, len(tokens) - length + 2, length - 1):
            found.append([start, *tokens[at : at + length - 1]])
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(0))
    return torch.tensor(found)[order]


def drawn(available: Tensor, seed: int, count: int) -> Tensor:
    """`count` windows, without those that judge: whole shuffles in a row. ``[count, length]``."""
    available = available[JUDGES:]
    generator = torch.Generator().manual_seed(seed)
    epochs = count // len(available) + 1
    order = [torch.randperm(len(available), generator=generator) for _ in range(epochs)]
    return available[torch.cat(order)[:count]]


def _code() -> dict[str, str]:
    root = Path(sysconfig.get_path("stdlib"))
    files = {path.relative_to(root).as_posix(): path for path in sorted(root.rglob("*.py"))}
    return {
        name: path.read_text(encoding="utf-8", errors="replace")
        for name, path in files.items()
        if SKIPPED.isdisjoint(Path(name).parts)
    }


def _english() -> dict[str, str]:
    from pydoc_data.topics import topics

    return dict(sorted(topics.items()))


def _paragraphs(text: str) -> list[str]:
    return text.split("\n\n")


def _hash(name: str) -> int:
    return int(hashlib.sha256(name.encode()).hexdigest(), 16)
