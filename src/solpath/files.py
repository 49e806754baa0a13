"""Files on disk: atomic writes, and reads that check before they allocate."""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from solpath.errors import FileError

MAX_JSON_BYTES = 64 * 2**20

_DTYPES = {
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


def check_output(path: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
    """Return `path` as a folder that may be written: new, empty, or allowed to be replaced.

    Raises `FileError` before any long work when the folder is not empty or its parent is read-only.
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
    """Yield a temporary folder that takes the place of `path` only if the block succeeds.

    Everything is flushed to disk before the rename. On any failure `path` is left as it was.
    """
    folder = check_output(path, overwrite=overwrite).absolute()
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    try:
        yield temporary
        for item in temporary.rglob("*"):
            item.chmod(0o755 if item.is_dir() else 0o644)
            _sync(item)
        temporary.chmod(0o755)
        _sync(temporary)
        _swap(temporary, folder)
        _sync(folder.parent)
    except OSError as error:
        raise FileError(f"could not write {folder}: {error.strerror or error}.") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _swap(temporary: Path, folder: Path) -> None:
    """Put `temporary` in the place of `folder`; the old folder is removed last."""
    if not folder.exists() or not any(folder.iterdir()):
        os.replace(temporary, folder)
        return
    old = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-old-"))
    os.replace(folder, old)
    try:
        os.replace(temporary, folder)
    except OSError:
        os.replace(old, folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_file(path: Path, data: bytes) -> None:
    """Replace one file atomically (temporary file, flush to disk, rename)."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
        try:
            with os.fdopen(descriptor, "wb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
        _sync(path.parent)
    except OSError as error:
        raise FileError(f"could not write {path}: {error.strerror or error}.") from error


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write `value` as indented JSON. NaN and infinity are refused."""
    path.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object of at most 64 MiB; anything else raises `FileError` naming the file."""
    try:
        size = path.stat().st_size
        if size > MAX_JSON_BYTES:
            raise FileError(f"{path} has {size} bytes; at most {MAX_JSON_BYTES} are read.")
        value = json.loads(path.read_bytes(), parse_constant=_refuse)
    except OSError as error:
        raise FileError(f"cannot read {path}: {error.strerror or error}.") from error
    except (ValueError, RecursionError) as error:
        raise FileError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(value, dict):
        raise FileError(f"{path} holds a JSON {type(value).__name__}, not an object.")
    return value


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is not allowed")


def read_tensors(
    path: Path, expected: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], *, exact: bool = True
) -> dict[str, torch.Tensor]:
    """Read a safetensors file whose header must match `expected` before any data is read.

    Args:
        path: the file.
        expected: name to (dtype, shape).
        exact: whether every expected tensor must be there; names not expected are always refused.

    Raises:
        FileError: truncated or damaged file, wrong name, dtype or shape.
    """
    try:
        with safe_open(path, framework="pt") as stream:
            names = set(stream.keys())
            wrong = sorted(names - set(expected)) or sorted((set(expected) - names) if exact else ())
            if wrong:
                state = "is not expected" if wrong[0] in names else "is missing"
                raise FileError(f"{path}: tensor {wrong[0]!r} {state}.")
            for name in sorted(names):
                dtype, shape = expected[name]
                part = stream.get_slice(name)
                found = (part.get_dtype(), tuple(part.get_shape()))
                if found != (_DTYPES[dtype], shape):
                    raise FileError(
                        f"{path}: tensor {name!r} is {found[0]} {list(found[1])}, "
                        f"expected {_DTYPES[dtype]} {list(shape)}."
                    )
            return {name: stream.get_tensor(name) for name in sorted(names)}
    except (SafetensorError, OSError, ValueError) as error:
        raise FileError(f"cannot read {path}: {error}.") from error


def read_safetensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Read all tensors of a file and its metadata; `FileError` if it is damaged."""
    try:
        with safe_open(path, framework="pt") as stream:
            tensors = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118
            return tensors, dict(stream.metadata() or {})
    except (SafetensorError, OSError, ValueError) as error:
        raise FileError(f"cannot read {path}: {error}.") from error
