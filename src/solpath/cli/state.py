"""Keep the state of long work on disk, so that the same command goes on where it was stopped."""

import contextlib
import fcntl
import hashlib
import os
import shutil
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import typer

from solpath.cli.settings import given
from solpath.cli.terminal import say
from solpath.errors import FileError
from solpath.holding import SEARCH_STATE, TUNE_STATE

_FILE = "command.json"
_ANY_RUN = ("device", "attention", "micro-batch")  # how a run is done, not what it finds
_FORMAT, _FORMAT_VERSION = "solpath.command", 1


@contextlib.contextmanager
def keeping_state(
    context: typer.Context, out: Path, checkpoint: Path | None, *batches: Sequence[Any]
) -> Iterator[Path | None]:
    """Yield the folder to keep the state of a run in, that of the same run if it was stopped.

    It is `checkpoint`, or a folder beside `out` that is removed when the block ends well. The
    options of the command and a digest of its data are kept with the state.

    Args:
        context: The command. Ctrl-C will say where its state is.
        out: What the command writes in the block.
        checkpoint: A folder of the user's, which stays.
        batches: Every sequence of batches of the run.

    Yields:
        The folder; None if nothing can be written beside `out`, which is said.

    Raises:
        FileError: The folder holds another run, is not one of solpath, or is in use by another
            process.
    """
    folder = checkpoint or unfinished(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(13, "Permission denied")
    except OSError as error:
        if checkpoint is not None:
            raise FileError(f"cannot write to {folder}: {error.strerror}.") from error
        say(f"no state is kept: {folder.parent} cannot be written; give --checkpoint FOLDER.")
        yield None
        return
    with _alone(folder):
        _check_run(folder, out, _run(context, batches), own=checkpoint is None)
        if checkpoint is None and has_state(folder):
            say(f"going on from the state in {folder}")
        context.obj.checkpoint = folder
        try:
            yield folder
        except BaseException:
            if checkpoint is None and not has_state(folder):
                shutil.rmtree(folder, ignore_errors=True)
            raise
        context.obj.checkpoint = None
        if checkpoint is None:
            shutil.rmtree(folder, ignore_errors=True)


def unfinished(out: Path) -> Path:
    """Return the folder beside `out` that holds the state while `out` is made."""
    named = out if out.name not in ("", "..") else out.resolve()
    return named.with_name(f"{named.name}.unfinished")


def has_state(folder: Path) -> bool:
    """Return whether a folder holds a state to go on from."""
    return any((folder / name).exists() for name in (SEARCH_STATE, TUNE_STATE))


@contextlib.contextmanager
def stopping_well() -> Iterator[None]:
    """Let a closed terminal and a request to end stop the block as Ctrl-C does.

    A signal that the process was started to ignore, as by nohup, stays ignored.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    changed = [
        number
        for number in (signal.SIGHUP, signal.SIGTERM)
        if signal.getsignal(number) == signal.SIG_DFL
    ]

    def stop(number: int, frame: Any) -> None:
        for one in changed:  # a shell sends several; the state is being saved
            signal.signal(one, signal.SIG_IGN)
        raise KeyboardInterrupt

    for number in changed:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number in changed:
            signal.signal(number, signal.SIG_DFL)


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder. Raise `FileError` if another process has it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise FileError(
                f"another process works with the state in {folder}; wait for it, or choose "
                "another folder."
            ) from error
        except OSError:  # this file system has no locks
            pass
        yield
    finally:
        os.close(descriptor)


def _run(context: typer.Context, batches: Sequence[Sequence[Any]]) -> dict[str, Any]:
    """Return what makes two runs the same: options, and data by their number and both ends."""
    options = {name: value for name, value in given(context).items() if name not in _ANY_RUN}
    data = [
        f"{len(part)} batches, {_digest(part[0])}, {_digest(part[len(part) - 1])}"
        for part in batches
    ]
    return {**options, "what the data holds": "; ".join(data)}


def _digest(batch: Any) -> str:
    from torch import Tensor

    from solpath.reading import tensors_digest

    named = batch if isinstance(batch, Mapping) else {"input": batch}
    tensors = {name: value for name, value in named.items() if isinstance(value, Tensor)}
    return hashlib.sha256(tensors_digest(tensors).encode()).hexdigest()[:16]


def _check_run(folder: Path, out: Path, run: dict[str, Any], *, own: bool) -> None:
    """Raise `FileError` unless the state in a folder is of this run; if it has none, say whose."""
    from solpath.files import json_bytes, write_file
    from solpath.reading import check_format, read_json

    file = folder / _FILE
    if has_state(folder) and (file.exists() or own):
        found = read_json(file)
        check_format(file, found, _FORMAT, _FORMAT_VERSION)
        known = found.get("run")
        known = known if isinstance(known, dict) else {}
        for name in known | run:
            if known.get(name) != run.get(name):
                another = f"write to another folder than {out}" if own else "use another folder"
                raise FileError(
                    f"{folder} holds a run that was not finished; it differs in {name}: "
                    f"{known.get(name)!r}, not {run.get(name)!r}. Give what it had, {another}, or "
                    f"remove {folder} to start afresh."
                )
        return
    names = (name for name in os.listdir(folder) if not name.startswith(".solpath-tmp-"))
    if own and (strange := sorted(set(names) - {_FILE})):
        raise FileError(
            f"the state would be kept in {folder}, which holds {strange[0]!r}; remove it, or give "
            "--checkpoint FOLDER."
        )
    write_file(file, json_bytes({"format": _FORMAT, "version": _FORMAT_VERSION, "run": run}))
