"""Keep the state of a search or a tuning in one safetensors file that is replaced atomically."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from solpath.errors import FileError, FingerprintError
from solpath.files import write_file

State = dict[str, Tensor]
"""The tensors of a run that is under way, by name."""

_KEY = "solpath.checkpoint"


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
    write_file(file, save(tensors, {_KEY: json.dumps(header)}))


def read_checkpoint(file: Path, header: Mapping[str, Any]) -> State | None:
    """Return the state in a checkpoint, or None if there is no file.

    Args:
        file: The checkpoint.
        header: Says which run is to be resumed. The header in the file must agree with it.

    Raises:
        FileError: The file is damaged or not a checkpoint.
        FingerprintError: The file belongs to another model or to other settings; the message says
            which.
    """
    if not file.exists():
        return None
    try:
        with safe_open(file, framework="pt") as stream:
            found = _fields(json.loads(stream.metadata()[_KEY]))
            state = {name: stream.get_tensor(name) for name in stream.offset_keys()}
    except (SafetensorError, OSError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise FileError(f"{file} is not a checkpoint: {error}.") from error
    wanted = _fields(header)
    for name in wanted | found:
        if found.get(name) != wanted.get(name):
            detail = f": {found.get(name)!r}, not {wanted.get(name)!r}"
            detail = "" if name == "digests" else detail
            raise FingerprintError(
                f"{file} holds another run; it differs in {name}{detail}. "
                "Use another folder, or remove that file to start again."
            )
    return state


def resume_hint(file: Path | None, step: int) -> str:
    """Return the end of an error message that says which checkpoint is kept, if there is one.

    Args:
        file: The checkpoint; None if none is written.
        step: The step that it holds; 0 if none was written yet.
    """
    return f"; the checkpoint of step {step} is kept in {file.parent}" if file and step else ""


def _fields(header: Mapping[str, Any]) -> dict[str, Any]:
    """Return the header without its nesting."""
    rest = {name: value for name, value in header.items() if name not in ("config", "fingerprint")}
    return {**rest, **header["config"], **header["fingerprint"]}
