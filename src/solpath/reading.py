"""Read JSON, safetensors and digests, and check them before memory is allocated."""

import contextlib
import hashlib
import json
import math
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any, BinaryIO, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load as tensors_of
from torch import Tensor

from solpath.errors import FileError

MAX_JSON_BYTES = 64 * 2**20
MAX_HEADER_BYTES = 16 * 2**20
_LARGEST = 2**62  # of whole numbers that are read, so that sums of some fit in 64 bits
_TRIES = 100

Header = Mapping[str, tuple[str, tuple[int, ...]]]
Expected = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
Result = TypeVar("Result")

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""The name that safetensors gives to each dtype that solpath stores."""


def check_format(
    file: Path, value: Mapping[str, Any], name: str, version: int, advice: str = ""
) -> None:
    """Raise `FileError` unless ``format`` and ``version`` of a JSON object are these.

    Args:
        file: the object's file, for the message.
        value: the object.
        name: its format.
        version: the one that this version of solpath reads.
        advice: what to do about another version, as a clause.
    """
    found = value.get("format"), value.get("version")
    if found != (name, version):
        raise FileError(
            f"{file}: expected format {name} version {version}, got {found[0]!r} version "
            f"{found[1]!r}{advice and '; '}{advice}."
        )


def sealed(value: Mapping[str, Any]) -> dict[str, Any]:
    """Return a JSON object with one more field, ``checksum``: the SHA-256 of all others.

    Args:
        value: The object. A checksum that it has already is replaced.
    """
    rest = {name: field for name, field in value.items() if name != "checksum"}
    text = json.dumps(rest, sort_keys=True).encode()
    return {**rest, "checksum": hashlib.sha256(text).hexdigest()}


def check_seal(file: Path, value: Mapping[str, Any]) -> None:
    """Raise `FileError` unless the checksum of a JSON object is that of its other fields.

    Args:
        file: The object's file, for the message.
        value: The object.
    """
    if value.get("checksum") != sealed(value)["checksum"]:
        raise FileError(f"{file}: checksum does not fit the other fields; the file was changed.")


def whole(value: Any, least: int = 0) -> int:
    """Return a whole number that was read from a file. Raise `ValueError` for anything else.

    Args:
        value: What was read.
        least: The smallest number that is accepted; the largest is 2**62.
    """
    if type(value) is not int or not least <= value <= _LARGEST:
        raise ValueError(f"{value!r} is not a whole number of at least {least}")
    return value


def one_version(file: Path, read: Callable[[], Result]) -> Result:
    """Return what `read` returns, once a folder was not replaced while it was read.

    Args:
        file: A file of the folder, which every writer replaces.
        read: Reads files of the folder. It is called again if the folder was replaced meanwhile.

    Raises:
        FileError: `read` raised it for a folder that stays as it is, or the folder never does.
    """
    for _ in range(_TRIES):
        before = _version(file)
        try:
            result = read()
        except FileError:
            if _version(file) == before:
                raise
        else:
            if _version(file) == before:
                return result
    raise FileError(f"{file.parent} was replaced {_TRIES} times while it was read.")


def _version(file: Path) -> tuple[int, ...] | None:
    try:
        status = file.stat()
    except (OSError, ValueError):
        return None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def read_json(path: Path, *, sha256: str | None = None) -> dict[str, Any]:
    """Read a JSON object of at most 64 MiB, in which all numbers are finite.

    Args:
        path: A regular file.
        sha256: The hex digest that its bytes must have. None accepts any.

    Raises:
        FileError: The file cannot be read or holds something else. The message says what.
    """
    try:
        with opened(path) as stream:
            size = os.fstat(stream.fileno()).st_size
            if size > MAX_JSON_BYTES:
                raise FileError(f"{path} has {size} bytes; at most {MAX_JSON_BYTES} are read.")
            data = stream.read(MAX_JSON_BYTES)
        if sha256 is not None:
            check_digest(path, hashlib.sha256(data).hexdigest(), sha256)
        value = json.loads(data, parse_constant=_refuse, parse_float=_finite, parse_int=_whole)
    except (ValueError, RecursionError) as error:
        raise FileError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(value, dict):
        raise FileError(f"{path} holds a JSON {type(value).__name__}, not an object.")
    return value


@contextlib.contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """Open a regular file for reading, without ever waiting for a pipe or a device.

    Args:
        path: The file.

    Raises:
        FileError: It is missing, cannot be read, or is not a regular file. Also for an error of the
            system while the block reads.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)
    except (OSError, ValueError) as error:  # ValueError: no name of a file
        reason = getattr(error, "strerror", None) or error
        raise FileError(f"cannot read {os.fspath(path)!r}: {reason}.") from error
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise FileError(f"{path} is not a regular file.")
        with open(descriptor, "rb", closefd=False) as stream:
            yield stream
    except OSError as error:
        raise FileError(f"cannot read {path}: {error.strerror or error}.") from error
    finally:
        os.close(descriptor)


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is not allowed")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is not finite")
    return value


def _whole(text: str) -> int:
    _finite(text)  # a number that no float holds is none of ours
    return int(text)


def check_digest(path: Path, found: str, expected: str) -> None:
    """Raise `FileError` unless the two hex digests of a file are equal."""
    if found != expected:
        raise FileError(
            f"{path} is damaged or was changed: its SHA-256 is {found}, expected {expected}."
        )


def read_header(path: Path) -> Header:
    """Return the (safetensors dtype, shape) of every tensor in a file by name, in data order.

    No tensor data is read. Raise `FileError` if the file is not a regular file, is truncated or
    damaged, or has a header above 16 MiB.
    """
    try:
        with opened(path) as stream:
            size = os.fstat(stream.fileno()).st_size
            length = int.from_bytes(stream.read(8), "little")
        if length > min(MAX_HEADER_BYTES, size - 8):
            raise FileError(
                f"{path}: header length is {length} bytes in a file of {size}; "
                f"at most {MAX_HEADER_BYTES} are read."
            )
        with safe_open(path, framework="pt") as tensors:
            slices = {name: tensors.get_slice(name) for name in tensors.offset_keys()}
            return {n: (part.get_dtype(), tuple(part.get_shape())) for n, part in slices.items()}
    except (SafetensorError, OSError, ValueError) as error:
        raise FileError(f"cannot read {path}: {error}.") from error


def check_header(path: Path, header: Header, expected: Expected, *, exact: bool = True) -> None:
    """Raise `FileError` unless every tensor in `header` has the dtype and shape that is `expected`.

    Args:
        path: The file that `header` was read from, for the message.
        header: Name to (safetensors dtype, shape), from `read_header`.
        expected: Name to (dtype, shape). Any other name is refused.
        exact: Whether every expected tensor must be there.
    """
    wrong = sorted(set(header) - set(expected)) or sorted(
        set(expected) - set(header) if exact else ()
    )
    if wrong:
        state = "is not expected" if wrong[0] in header else "is missing"
        raise FileError(f"{path}: tensor {wrong[0]!r} {state}.")
    for name, (found, shape) in header.items():
        dtype, size = expected[name]
        if (found, shape) != (dtype_name(dtype), tuple(size)):
            raise FileError(
                f"{path}: tensor {name!r} is {found} {list(shape)}, "
                f"expected {dtype_name(dtype)} {list(size)}."
            )


def dtype_name(dtype: torch.dtype) -> str:
    """Return what safetensors calls `dtype`. Raise `FileError` for one that cannot be stored."""
    if dtype not in DTYPES:
        raise FileError(f"tensors of {dtype} cannot be stored; cast them to a float dtype first.")
    return DTYPES[dtype]


def read_data(path: Path, names: Iterable[str]) -> dict[str, Tensor]:
    """Read the tensors `names` of a safetensors file whose header was checked.

    The tensors own their memory. Raise `FileError` if one cannot be read.
    """
    try:
        with safe_open(path, framework="pt", backend="pread") as stream:
            return {name: stream.get_tensor(name) for name in names}
    except (SafetensorError, OSError, ValueError) as error:
        raise FileError(f"cannot read {path}: {error}.") from error


def read_sealed(path: Path, sha256: str, expected: Expected) -> dict[str, Tensor]:
    """Read a small safetensors file whole, and check its digest before its content.

    Args:
        path: The file.
        sha256: The hex digest that its bytes must have.
        expected: Name to (dtype, shape), exactly.

    Raises:
        FileError: It cannot be read, was changed, or holds something else.
    """
    check_header(path, read_header(path), expected)
    with opened(path) as stream:
        data = stream.read()
    check_digest(path, hashlib.sha256(data).hexdigest(), sha256)
    try:
        tensors = tensors_of(data)
    except (SafetensorError, ValueError) as error:
        raise FileError(f"cannot read {path}: {error}.") from error
    found = {n: (dtype_name(tensor.dtype), tuple(tensor.shape)) for n, tensor in tensors.items()}
    check_header(path, found, expected)
    return tensors


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """Return a SHA-256 of names, dtypes, shapes and values, in their order, in hexadecimal.

    Args:
        tensors: Name to tensor, on any device.
    """
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(values_as_bytes(tensor))
    return digest.hexdigest()


def values_as_bytes(tensor: Tensor) -> Any:
    """Return the values of a tensor as an array of bytes, for a digest."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal. Raise `FileError` if it cannot be read."""
    return _sha256(path, Event())


@contextlib.contextmanager
def digests(paths: Iterable[Path]) -> Iterator[dict[str, Future[str]]]:
    """Compute the SHA-256 of files in threads while the block runs. Leaving the block stops them.

    Yields:
        File name to the digest to come, in hexadecimal. Ask for it inside the block.
    """
    stop = Event()
    with ThreadPoolExecutor(2) as pool:
        try:
            yield {path.name: pool.submit(_sha256, path, stop) for path in paths}
        finally:
            stop.set()


def _sha256(path: Path, stop: Event) -> str:
    digest, block = hashlib.sha256(), memoryview(bytearray(2**18))
    with opened(path) as stream:
        while (count := stream.readinto(block)) and not stop.is_set():  # type: ignore[attr-defined]
            digest.update(block[:count])
    return digest.hexdigest()


def file_in(folder: Path, name: str) -> Path:
    """Return a file of `folder` that really lies there.

    A link may only lead to another file of the folder or, in a snapshot of the Hugging Face cache
    (``<repo>/snapshots/<revision>``), into ``<repo>/blobs``.

    Raises:
        FileError: The file is missing or lies elsewhere.
    """
    path = folder / name
    try:
        root, real = folder.resolve(strict=True), path.resolve(strict=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise FileError(f"cannot read {path}: {error}.") from error
    homes = [root]
    if root.parent.name == "snapshots":
        homes.append(root.parent.parent / "blobs")
    if not any(real.is_relative_to(home) for home in homes):
        raise FileError(f"{path} leads out of the folder, to {real}.")
    return path
