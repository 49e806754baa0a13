"""Write files atomically, and check files before memory is allocated for them."""

import contextlib
import hashlib
import json
import math
import os
import shutil
import stat
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from solpath.errors import FileError

MAX_JSON_BYTES = 64 * 2**20
MAX_HEADER_BYTES = 16 * 2**20

Header = Mapping[str, tuple[str, tuple[int, ...]]]
Expected = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]

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


def check_output(path: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
    """Return `path` as a folder that can be written: new, empty, or any folder with `overwrite`.

    Create the parent folders that are missing. Raise `FileError` if `path` is a file or not empty,
    or if its parent cannot be written. Call this before long work.
    """
    folder = Path(path)
    if folder.exists() and not folder.is_dir():
        raise FileError(f"{folder} is a file; give a folder.")
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise FileError(f"{folder} is not empty; choose another folder or pass overwrite=True.")
    parent = folder.absolute().parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=parent, prefix=".solpath-"):
            pass
    except OSError as error:
        raise FileError(f"cannot write to {parent}: {error.strerror or error}.") from error
    return folder


@contextlib.contextmanager
def new_folder(path: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary folder that takes the place of `path` if the block succeeds.

    Everything is flushed to disk before the rename. After a failure `path` is left untouched.

    Raises:
        FileError: `check_output` refuses `path`, or something cannot be written.
    """
    folder = check_output(path, overwrite=overwrite).resolve()
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    try:
        yield temporary
        for item in temporary.rglob("*"):
            item.chmod(0o755 if item.is_dir() else 0o644)
            sync(item)
        temporary.chmod(0o755)
        sync(temporary)
        _swap(temporary, folder)
        sync(folder.parent)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise FileError(f"could not write {folder}: {reason}.") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _swap(temporary: Path, folder: Path) -> None:
    """Put `temporary` in the place of `folder`, and remove the old folder last."""
    if not folder.exists() or not any(folder.iterdir()):
        os.replace(temporary, folder)
        return
    old = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-old-"))
    try:
        os.replace(folder, old)
    except BaseException:
        old.rmdir()
        raise
    try:
        os.replace(temporary, folder)
    except BaseException:
        os.replace(old, folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


def sync(path: Path) -> None:
    """Flush a file or folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_file(path: Path, data: bytes) -> None:
    """Replace one file atomically and flush it to disk. Raise `FileError` if that fails."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
        try:
            with os.fdopen(descriptor, "wb") as stream:
                os.fchmod(descriptor, 0o644)
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
        sync(path.parent)
    except OSError as error:
        raise FileError(f"could not write {path}: {error.strerror or error}.") from error


def json_bytes(value: Mapping[str, Any]) -> bytes:
    """Return `value` as indented JSON. Raise `ValueError` for NaN and infinity."""
    return f"{json.dumps(value, indent=1, allow_nan=False)}\n".encode()


def check_format(
    file: Path, value: Mapping[str, Any], name: str, version: int, advice: str = ""
) -> None:
    """Raise `FileError` unless `value`, read from `file`, has the format `name` in this version.

    `advice` is a clause that ends the message and says what to do about another version.
    """
    found = value.get("format"), value.get("version")
    if found != (name, version):
        raise FileError(
            f"{file}: expected format {name} version {version}, got {found[0]!r} version "
            f"{found[1]!r}{advice and '; '}{advice}."
        )


def read_json(path: Path, *, sha256: str | None = None) -> dict[str, Any]:
    """Read a JSON object of at most 64 MiB, in which all numbers are finite.

    Args:
        path: A regular file.
        sha256: The hex digest that its bytes must have. None accepts any.

    Raises:
        FileError: The file cannot be read or holds something else. The message says what.
    """
    try:
        data = _read_small(path, MAX_JSON_BYTES)
        if sha256 is not None:
            check_digest(path, hashlib.sha256(data).hexdigest(), sha256)
        value = json.loads(data, parse_constant=_refuse, parse_float=_finite)
    except OSError as error:
        raise FileError(f"cannot read {path}: {error.strerror or error}.") from error
    except (ValueError, RecursionError) as error:
        raise FileError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(value, dict):
        raise FileError(f"{path} holds a JSON {type(value).__name__}, not an object.")
    return value


def _read_small(path: Path, limit: int) -> bytes:
    """Read a regular file. One of more than `limit` bytes is refused before it is read."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise FileError(f"{path} is not a regular file.")
    if status.st_size > limit:
        raise FileError(f"{path} has {status.st_size} bytes; at most {limit} are read.")
    with path.open("rb") as stream:
        return stream.read(limit)


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is not allowed")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is not finite")
    return value


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
        with path.open("rb") as stream:
            status = os.fstat(stream.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise FileError(f"{path} is not a regular file.")
            length = int.from_bytes(stream.read(8), "little")
        if length > min(MAX_HEADER_BYTES, status.st_size - 8):
            raise FileError(
                f"{path}: header length is {length} bytes in a file of {status.st_size}; "
                f"at most {MAX_HEADER_BYTES} are read."
            )
        with safe_open(path, framework="pt") as stream:
            slices = {name: stream.get_slice(name) for name in stream.offset_keys()}
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


def read_tensors(path: Path, expected: Expected, *, exact: bool = True) -> dict[str, Tensor]:
    """Read a safetensors file whose header must match `expected` before any data is read.

    The tensors own their memory: the file may be changed or removed afterwards.

    Args:
        path: The file.
        expected: Name to (dtype, shape). Any other name is refused.
        exact: Whether every expected tensor must be there.

    Raises:
        FileError: The file is truncated or damaged, or a name, dtype or shape is wrong.
    """
    header = read_header(path)
    check_header(path, header, expected, exact=exact)
    return read_data(path, header)


def read_data(path: Path, names: Iterable[str]) -> dict[str, Tensor]:
    """Read the tensors `names` of a safetensors file whose header was checked.

    The tensors own their memory. Raise `FileError` if one cannot be read.
    """
    try:
        with safe_open(path, framework="pt", backend="pread") as stream:
            return {name: stream.get_tensor(name) for name in names}
    except (SafetensorError, OSError, ValueError) as error:
        raise FileError(f"cannot read {path}: {error}.") from error


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal. Raise `FileError` if it cannot be read."""
    try:
        return _sha256(path, Event())
    except OSError as error:
        raise FileError(f"cannot read {path}: {error.strerror or error}.") from error


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
    with path.open("rb", buffering=0) as stream:
        while (count := stream.readinto(block)) and not stop.is_set():
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
