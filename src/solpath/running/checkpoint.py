"""Keep the state of a search or a tuning in one safetensors file that is replaced atomically."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from solpath.errors import FileError, FingerprintError
from solpath.files import write_file
from solpath.holding import holds
from solpath.reading import (
    Expected,
    check_digest,
    check_header,
    dtype_name,
    file_in,
    read_header,
    tensors_digest,
)

State = dict[str, Tensor]
"""The tensors of a run that is under way, by name."""

_KEY, _DIGEST = "solpath.checkpoint", "solpath.sha256"


def checkpoint_file(folder: str | os.PathLike[str] | None, name: str) -> Path | None:
    """Return the file that keeps the state of a run; None if none is kept.

    Args:
        folder: The folder that a user gave for the state, or None.
        name: The name of the file.

    Raises:
        FileError: There is no state in the folder yet, and it holds a model, a path or a family.
    """
    if folder is None:
        return None
    file = Path(folder) / name
    if not os.path.lexists(file) and (found := holds(folder)):
        raise FileError(
            f"the state would be kept in {os.fspath(folder)}, which holds {found}; give a folder "
            "of its own."
        )
    return file


def write_checkpoint(file: Path, header: Mapping[str, Any], state: State) -> None:
    """Replace a checkpoint atomically.

    Args:
        file: The file to replace. Its folder is made if it is missing.
        header: Says which run the state belongs to.
        state: The tensors to write.

    Raises:
        FileError: The file cannot be written; the old one is left untouched.
    """
    tensors = {name: tensor.contiguous() for name, tensor in state.items()}
    text = json.dumps(header)
    write_file(file, save(tensors, {_KEY: text, _DIGEST: _digest(text, tensors)}))


def read_checkpoint(file: Path, header: Mapping[str, Any]) -> State | None:
    """Return the state in a checkpoint, or None if there is no file.

    Args:
        file: The checkpoint.
        header: Says which run is to be resumed. The header in the file must agree with it.

    Raises:
        FileError: The file is damaged, was changed, or is not a checkpoint.
        FingerprintError: The file belongs to another model or to other settings; the message says
            which.
    """
    if not os.path.lexists(file):
        return None
    read_header(file_in(file.parent, file.name))
    try:
        with safe_open(file, framework="pt", backend="pread") as stream:
            metadata = stream.metadata() or {}
            state = {name: stream.get_tensor(name) for name in sorted(stream.keys())}
        text = metadata[_KEY]
        found = _fields(json.loads(text))
    except (SafetensorError, OSError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise FileError(f"{file} is not a checkpoint: {error}.") from error
    except RecursionError as error:
        raise FileError(f"{file} is not a checkpoint: it is nested too deeply.") from error
    wanted = _fields(header)
    if found.get("version") == wanted.get("version"):
        check_digest(file, _digest(text, state), metadata.get(_DIGEST, "missing"))
    for name in wanted | found:
        if found.get(name) != wanted.get(name):
            detail = f": {found.get(name)!r}, not {wanted.get(name)!r}"
            detail = "" if name == "digests" else detail
            raise FingerprintError(
                f"{file} holds another run; it differs in {name}{detail}. "
                "Use another folder, or remove that file to start again."
            )
    return state


def check_state(file: Path, state: State, expected: Expected) -> None:
    """Raise `FileError` unless a state holds these tensors, all of them finite or infinite.

    Args:
        file: The checkpoint, for the message.
        state: What was read from it.
        expected: Name to (dtype, shape), exactly.
    """
    found = {name: (dtype_name(value.dtype), tuple(value.shape)) for name, value in state.items()}
    check_header(file, found, expected)
    for name, value in state.items():
        if value.isnan().any():
            raise FileError(f"{file}: {name} is not a number.")


def resume_hint(file: Path | None, step: int) -> str:
    """Return the end of an error message that says which checkpoint is kept, if there is one.

    Args:
        file: The checkpoint; None if none is written.
        step: The step that it holds; 0 if none was written yet.
    """
    return f"; the checkpoint of step {step} is kept in {file.parent}" if file and step else ""


def _digest(text: str, state: State) -> str:
    """Return a SHA-256 of the header and of all tensors, in the order of their names."""
    tensors = tensors_digest({name: state[name] for name in sorted(state)})
    return hashlib.sha256(f"{text} {tensors}".encode()).hexdigest()


def _fields(header: Mapping[str, Any]) -> dict[str, Any]:
    """Return the header without its nesting. Of two equal names the inner one says where it is."""
    inner = ("config", "fingerprint")
    fields = {name: value for name, value in header.items() if name not in inner}
    for part in inner:
        for name, value in header[part].items():
            fields[f"{part}.{name}" if name in fields else name] = value
    return fields
