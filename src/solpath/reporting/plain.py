"""Dataclasses as plain values for JSON, and back, with every field checked against its type."""

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from solpath.errors import FileError

LARGEST = 1e200
"""The largest number that is read, so that charts can take differences and squares of them."""

Part = TypeVar("Part")


def is_number(value: Any) -> bool:
    """Return whether a value is a number that a chart can show."""
    return type(value) in (int, float) and abs(value) <= LARGEST


def plain(value: Any) -> Any:
    """Return a dataclass, and everything in it, as plain values.

    A field goes by the name in its metadata under ``"key"``, if it has one.
    """
    if is_dataclass(value):
        return {_key(part): plain(getattr(value, part.name)) for part in fields(value)}
    if isinstance(value, tuple):
        return [plain(item) for item in value]
    if isinstance(value, Mapping):
        return {name: plain(item) for name, item in value.items()}
    return value


def _key(part: Any) -> str:
    key: str = part.metadata.get("key", part.name)
    return key


def built(kind: type[Part], file: Path, where: str, value: Any) -> Part:
    """Build a dataclass from plain values, checked against the types of its fields.

    Args:
        kind: The dataclass.
        file: The file that the values are from, for messages.
        where: The place of the values in the file.
        value: The values.

    Raises:
        FileError: A field is missing or of another type. The message names the file and the field.
    """
    if not isinstance(value, dict):
        raise FileError(f"{file}: {where} is missing or not an object.")
    hints, parts = get_type_hints(kind), {}
    for part in fields(kind):  # type: ignore[arg-type]
        key = _key(part)
        if key in value or part.default is MISSING:
            place = f"{where}.{key}" if where else key
            parts[part.name] = _checked(hints[part.name], file, place, value.get(key))
    return kind(**parts)


def _checked(hint: Any, file: Path, where: str, value: Any) -> Any:
    """Return `value` as the type `hint`. Raise `FileError` if it is something else."""
    options: Sequence[Any] = get_args(hint) if isinstance(hint, UnionType) else (hint,)
    if value is None and NoneType in options:
        return None
    [kind] = [option for option in options if option is not NoneType]
    if is_dataclass(kind):
        return built(kind, file, where, value)  # type: ignore[arg-type]
    if get_origin(kind) is tuple:
        if not isinstance(value, list) or not value:
            raise FileError(f"{file}: {where} is missing, empty or not a list.")
        item = get_args(kind)[0]
        return tuple(_checked(item, file, f"{where}[{i}]", v) for i, v in enumerate(value))
    if kind is str:
        if not isinstance(value, str):
            raise FileError(f"{file}: {where} is missing or not text.")
    elif kind is bool:
        if not isinstance(value, bool):
            raise FileError(f"{file}: {where} is {value!r}, expected true or false.")
    elif kind in (int, float):
        if not is_number(value):
            raise FileError(f"{file}: {where} is {value!r}, expected a number.")
    elif not isinstance(value, dict):
        raise FileError(f"{file}: {where} is missing or not an object.")
    return value
