"""Write files whole or not at all, and replace only what solpath wrote."""

import contextlib
import ctypes
import errno
import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
import stat
import sys
import time
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from solpath.errors import FileError
from solpath.holding import MARKS

_TEMPORARY = re.compile(r"\.solpath-tmp-[0-9a-f]{16}")
_STALE_SECONDS = 24 * 3600  # for file systems that keep no locks
_NO_REPLACE, _EXCHANGE = (4, 2) if sys.platform == "darwin" else (1, 2)
_UNSUPPORTED = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP)


def check_output(
    path: str | os.PathLike[str], *, overwrite: bool = False, marks: Collection[str] = MARKS
) -> Path:
    """Return `path` as a folder that may be written: new, empty, or allowed to be replaced.

    What killed processes left beside it is removed, and its parents are made.

    Args:
        path: The folder.
        overwrite: Whether a folder that is not empty may be replaced.
        marks: Names of files, one of which a folder must hold to be replaced.

    Raises:
        FileError: Before any long work: the folder is a file, is not empty, or was not written by
            solpath, or nothing can be written there.
    """
    with _naming(path, "cannot write to"):
        folder = Path(path).resolve()
        _check_parents(Path(path))
        _put_back(folder)
        if not overwrite and folder.is_dir() and _entries(folder):
            raise FileError(f"{path} is not empty; choose another folder or pass overwrite=True.")
        _check_replaceable(folder, marks)
        home = _home(folder)
        home.mkdir(parents=True, exist_ok=True)
        with temporary_folder(home):
            pass
    return Path(path)


def check_new_file(path: Path) -> None:
    """Raise `FileError` before any long work unless a new file can be written. Make its folder.

    Args:
        path: The file.
    """
    with _naming(path, "cannot write to"):
        _check_parents(path)
        if path.is_dir():
            raise FileError(f"{path} is a folder; give the name of a new file.")
        if os.path.lexists(path):
            raise FileError(f"{path} exists; choose another file or remove it.")
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary_folder(path.parent):
            pass


@contextlib.contextmanager
def new_folder(
    path: str | os.PathLike[str], *, overwrite: bool = False, marks: Collection[str] = MARKS
) -> Iterator[Path]:
    """Yield a temporary folder that takes the place of `path` only if the block succeeds.

    Everything is flushed to disk before that. On any failure `path` is left as it was. An empty
    folder is filled, so that it stays the same folder to whoever stands in it; any other is
    replaced in one step, where the system can exchange two names. Files get the modes of those
    they replace, and new ones what the umask says.

    Args:
        path: The folder.
        overwrite: Whether a folder that is not empty may be replaced.
        marks: Names of files, one of which a folder must hold to be replaced.

    Raises:
        FileError: See `check_output`; also if `path` appeared or was filled during the block.
    """
    check_output(path, overwrite=overwrite, marks=marks)
    try:
        folder = Path(path).resolve()
        with temporary_folder(_home(folder)) as temporary:
            yield temporary
            _set_modes(temporary, folder)
            for item in (*temporary.rglob("*"), temporary):
                if not item.is_symlink():
                    sync(item)
            if temporary.parent == folder:
                _fill(temporary, folder)
            elif overwrite:
                _replace(temporary, folder, marks)
            else:
                _rename_new(temporary, folder)
            sync(folder.parent)
    except FileExistsError as error:
        raise FileError(f"{path} appeared while it was written; choose another folder.") from error
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise FileError(f"could not write {path}: {reason}.") from error


def write_file(path: Path, data: bytes) -> None:
    """Replace one file atomically (temporary file, flush to disk, rename).

    Args:
        path: The file. Its folder is made if it is missing. A file that is there keeps its mode.
        data: Its new content.

    Raises:
        FileError: It cannot be written. What is there is left untouched.
    """
    with _naming(path, "could not write"):
        path.parent.mkdir(parents=True, exist_ok=True)
        _sweep(path.parent)
        temporary, descriptor = _claim(path.parent, os.O_RDWR | os.O_CREAT | os.O_EXCL)
        try:
            with os.fdopen(descriptor, "wb") as stream:
                with contextlib.suppress(FileNotFoundError):
                    os.fchmod(descriptor, stat.S_IMODE(path.stat().st_mode))
                stream.write(data)
                stream.flush()
                os.fsync(descriptor)
                os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync(path.parent)


@contextlib.contextmanager
def temporary_folder(home: Path) -> Iterator[Path]:
    """Yield a new folder in `home`; whatever has its name at the end is removed.

    What killed processes left in `home` is removed, and the same happens to this folder then.

    Args:
        home: A folder that is there.
    """
    _sweep(home)
    temporary, descriptor = _claim(home)
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        os.close(descriptor)


def sync(path: Path) -> None:
    """Flush a file or folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def json_bytes(value: Mapping[str, Any]) -> bytes:
    """Return `value` as indented JSON. Raise `ValueError` for NaN and infinity.

    A list of plain values, which may be long, stands on one line.
    """
    return f"{_json(value, '')}\n".encode()


def _json(value: Any, indent: str) -> str:
    inner = f"{indent} "
    if isinstance(value, Mapping) and value and all(isinstance(name, str) for name in value):
        lines = [f"{json.dumps(name)}: {_json(part, inner)}" for name, part in value.items()]
        return f"{{\n{inner}" + f",\n{inner}".join(lines) + f"\n{indent}}}"
    nested = isinstance(value, list | tuple) and any(
        isinstance(part, Mapping | list | tuple) for part in value
    )
    if nested:
        lines = [_json(part, inner) for part in value]
        return f"[\n{inner}" + f",\n{inner}".join(lines) + f"\n{indent}]"
    return json.dumps(value, allow_nan=False)


@contextlib.contextmanager
def _naming(path: str | os.PathLike[str], what: str) -> Iterator[None]:
    """Turn errors of the system, and names it cannot have, into a `FileError` that names `path`."""
    try:
        yield
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: links in a circle
        reason = getattr(error, "strerror", None) or error
        raise FileError(f"{what} {os.fspath(path)!r}: {reason}.") from error


def _home(folder: Path) -> Path:
    """Return where the temporary folder goes: in a folder to be filled, beside any other."""
    return folder if folder.is_dir() and not _entries(folder) else folder.parent


def _entries(folder: Path) -> list[str]:
    """Return the names in a folder, without temporary ones."""
    return sorted(name for name in os.listdir(folder) if not _TEMPORARY.fullmatch(name))


def _check_parents(path: Path) -> None:
    """Raise `FileError` if a path leads through a file."""
    for parent in path.parents:
        if parent.is_dir():
            return
        if parent.exists():
            raise FileError(f"cannot write to {path}: {parent} is a file; choose another place.")


def _check_replaceable(folder: Path, marks: Collection[str]) -> None:
    """Raise `FileError` unless a folder is absent, empty, or recognised by a mark.

    A temporary folder beside other files is a mark, too: of a save that was killed.
    """
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return
    except NotADirectoryError as error:
        raise FileError(f"{folder} is a file; give a folder.") from error
    if names and not any(name in marks or _TEMPORARY.fullmatch(name) for name in names):
        raise FileError(
            f"{folder} was not written by solpath (it holds {min(names)!r} and none of "
            f"{', '.join(sorted(marks))}), so it is not replaced; choose another folder."
        )


# ---------------------------------------------------------------- temporary files, which are locked


def _claim(home: Path, flags: int | None = None) -> tuple[Path, int]:
    """Make a temporary folder, or a file opened with `flags`; return it and its locked descriptor.

    The lock ends with the process, by whatever it ends: what is not locked is stale.
    """
    while True:
        path = home / f".solpath-tmp-{secrets.token_hex(8)}"
        if flags is None:
            path.mkdir()
        with contextlib.suppress(FileNotFoundError):  # swept before it was locked
            descriptor = os.open(path, os.O_RDONLY if flags is None else flags, 0o666)
            if _lock(descriptor) is not False and path.exists():
                return path, descriptor
            os.close(descriptor)


def _lock(descriptor: int) -> bool | None:
    """Take the lock of a file: True if taken, False if another has it, None if there are none."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _sweep(home: Path) -> None:
    """Remove what killed processes of this user left in `home`, never what one is writing."""
    for name in os.listdir(home):
        if not _TEMPORARY.fullmatch(name):
            continue
        path = home / name
        with contextlib.suppress(OSError):
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
            try:
                status = os.fstat(descriptor)
                free = _lock(descriptor)
                if free is None:
                    free = time.time() - status.st_mtime > _STALE_SECONDS
                if free and status.st_uid == os.geteuid():
                    if stat.S_ISDIR(status.st_mode):
                        shutil.rmtree(path, ignore_errors=True)
                    else:
                        path.unlink()
            finally:
                os.close(descriptor)


def _set_modes(temporary: Path, folder: Path) -> None:
    """Give files the modes of those they replace, or what the umask left of the new folder's."""
    new = stat.S_IMODE(temporary.stat().st_mode) & 0o666
    for item in temporary.rglob("*"):
        if item.is_file() and not item.is_symlink():
            old = folder / item.relative_to(temporary)
            item.chmod(stat.S_IMODE(old.stat().st_mode) if old.is_file() else new)
    if folder.is_dir() and temporary.parent != folder:
        temporary.chmod(stat.S_IMODE(folder.stat().st_mode))


# ------------------------------------------------------------------------------- taking the place


def _fill(temporary: Path, folder: Path) -> None:
    """Move everything into `folder`, which is empty, the marks last; one process at a time."""
    descriptor = os.open(folder, os.O_RDONLY)
    moved: list[Path] = []
    try:
        with contextlib.suppress(OSError):  # no locks here
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        if names := _entries(folder):
            raise FileError(
                f"{folder} was empty, but {names[0]!r} appeared while it was written; choose "
                "another folder."
            )
        for item in sorted(temporary.iterdir(), key=lambda item: (item.name in MARKS, item.name)):
            _rename_new(item, folder / item.name)
            moved.append(item)
        os.fsync(descriptor)
    except BaseException:
        for item in reversed(moved):
            os.rename(folder / item.name, item)
        raise
    finally:
        os.close(descriptor)


def _replace(temporary: Path, folder: Path, marks: Collection[str]) -> None:
    """Exchange `temporary` with `folder`, or rename it if there is none."""
    while True:
        with contextlib.suppress(FileExistsError):
            return _rename_new(temporary, folder)
        _check_replaceable(folder, marks)
        with contextlib.suppress(FileNotFoundError):  # it vanished in between
            return _exchange(temporary, folder)


def _rename_new(source: Path, target: Path) -> None:
    """Rename; raise `FileExistsError` if the target exists (without renameat2: is not empty)."""
    try:
        if _rename_with(source, target, _NO_REPLACE):
            return
        if not source.is_dir() and target.exists():
            raise FileExistsError(errno.EEXIST, "File exists", str(target))
        os.rename(source, target)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.ENOTDIR):
            raise FileExistsError(errno.EEXIST, "File exists", str(target)) from error
        raise


def _exchange(temporary: Path, folder: Path) -> None:
    """Exchange two folders in one step; in two, with the old one put aside, where that is all."""
    if _rename_with(temporary, folder, _EXCHANGE):
        return
    old = folder.parent / f"{_aside(folder)}{secrets.token_hex(4)}"
    os.rename(folder, old)
    try:
        os.rename(temporary, folder)
    except BaseException:
        if not folder.exists():
            os.rename(old, folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _aside(folder: Path) -> str:
    """Return the beginning of the name that a folder has while it is put aside."""
    return f".solpath-old-{hashlib.sha256(os.fsencode(folder.name)).hexdigest()[:16]}-"


def _put_back(folder: Path) -> None:
    """Undo an exchange in two steps that was killed after the first one, or finish it."""
    if not folder.parent.is_dir():
        return
    for old in folder.parent.glob(f"{_aside(folder)}*"):
        try:
            _rename_new(old, folder)
        except FileExistsError:
            shutil.rmtree(old, ignore_errors=True)


def _rename_with(source: Path, target: Path, flags: int) -> bool:
    """Rename with flags of renameat2 (renamex_np on macOS); False where the system has none."""
    library = ctypes.CDLL(None, use_errno=True)
    names = os.fsencode(source), os.fsencode(target)
    if hasattr(library, "renameat2"):
        failed = library.renameat2(-100, names[0], -100, names[1], flags)  # AT_FDCWD
    elif hasattr(library, "renamex_np"):
        failed = library.renamex_np(*names, flags)
    else:
        return False
    if not failed:
        return True
    code = ctypes.get_errno()
    if code in _UNSUPPORTED:
        return False
    raise OSError(code, os.strerror(code), str(source), None, str(target))
