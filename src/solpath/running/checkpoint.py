"""The state of a search or a tuning on disk: one safetensors file, replaced atomically."""

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

_KEY = "solpath.checkpoint"


def write_checkpoint(file: Path, header: Mapping[str, Any], state: State) -> None:
    """Replace `file` by `state`; `header` says which run it belongs to."""
    tensors = {name: tensor.contiguous() for name, tensor in state.items()}
    write_file(file, save(tensors, {_KEY: json.dumps(header)}))


def read_checkpoint(file: Path, header: Mapping[str, Any]) -> State | None:
    """The state in `file`, or None if there is no file.

    Raises:
        FileError: damaged, or not a checkpoint.
        FingerprintError: it belongs to another model or other settings; says which.
    """
    if not file.exists():
        return None
    try:
        with safe_open(file, framework="pt") as stream:
            found = _fields(json.loads(stream.metadata()[_KEY]))
            state = {name: stream.get_tensor(name) for name in stream.offset_keys()}
    except (SafetensorError, OSError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise FileError(f"{file} is not a checkpoint: {error}.") from error
    for name, ours in _fields(header).items():
        if found.get(name) != ours:
            detail = "" if name == "digests" else f": {found.get(name)!r}, not {ours!r}"
            raise FingerprintError(
                f"{file} holds another run; it differs in {name}{detail}. "
                "Use another folder, or remove that file to start again."
            )
    return state


def resume_hint(file: Path | None, step: int) -> str:
    """What an error says about the state to go on from; nothing where none was written."""
    return f"; the checkpoint of step {step} is kept in {file.parent}" if file and step else ""


def _fields(header: Mapping[str, Any]) -> dict[str, Any]:
    """The header without its nesting."""
    rest = {name: value for name, value in header.items() if name not in ("config", "fingerprint")}
    return {**rest, **header["config"], **header["fingerprint"]}
