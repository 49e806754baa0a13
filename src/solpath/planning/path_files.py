"""The files of a solution path, which are described in docs/file-formats.md."""

import hashlib
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from solpath.errors import FileError
from solpath.files import json_bytes, new_folder
from solpath.holding import PATH_FILE, check_holds
from solpath.pair import Fingerprint, flatten, pairs_from, unflatten
from solpath.planning.cost import CostTable
from solpath.reading import (
    Expected,
    check_format,
    check_seal,
    file_in,
    one_version,
    read_json,
    read_sealed,
    sealed,
    whole,
)

FORMAT, FORMAT_VERSION = "solpath.path", 3
HEADER, TENSORS = PATH_FILE, "path.safetensors"


def write_path(
    folder: str | os.PathLike[str], fields: Mapping[str, Any], *, overwrite: bool = False
) -> None:
    """Write the fields of a `SolutionPath` into a folder, atomically.

    Args:
        folder: The folder. It is made if need be.
        fields: Name of every field to its value.
        overwrite: Replace a folder that solpath wrote, although it is not empty.

    Raises:
        FileError: The folder cannot be written; see `SolutionPath.save`.
    """
    pairs = fields["pairs"]
    tensors = {name: flatten(pairs, fields[name]) for name in ("score", "entry_time")}
    tensors |= {name: fields[name].contiguous() for name in ("history", "seen")}
    for kind in ("energy", "basis"):
        tensors |= {f"{kind}.{name}": value.contiguous() for name, value in fields[kind].items()}
    data = save(tensors)
    header = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "method": fields["method"],
        "config": dict(fields["config"]),
        "pairs": [pair.to_dict() for pair in pairs],
        "costs": fields["costs"].to_dict(),
        "fingerprint": asdict(fields["fingerprint"]),
        "steps_recorded": fields["history"].shape[1],
        "basis": list(fields["basis"]),
        "unreached": list(fields["unreached"]),
        "samples_seen": len(fields["seen"]),
        "digests": {TENSORS: hashlib.sha256(data).hexdigest()},
    }
    with new_folder(folder, overwrite=overwrite) as temporary:
        (temporary / TENSORS).write_bytes(data)
        (temporary / HEADER).write_bytes(json_bytes(sealed(header)))


def read_path(folder: Path) -> dict[str, Any]:
    """Read the fields of a `SolutionPath`, all of one version of the folder.

    Args:
        folder: A folder that `write_path` wrote.

    Returns:
        Name of every field to its value.

    Raises:
        FileError: A file is missing, damaged, changed or of another version.
    """
    return one_version(folder / HEADER, lambda: _read(folder))


def _read(folder: Path) -> dict[str, Any]:
    check_holds(folder, HEADER, "give the folder that search wrote")
    file = file_in(folder, HEADER)
    header = read_json(file)
    advice = "a path of another version has to be searched again"
    check_format(file, header, FORMAT, FORMAT_VERSION, advice)
    check_seal(file, header)
    try:
        pairs = pairs_from(header["pairs"])
        named = {pair.name: pair for pair in pairs}
        rotated = {name: named[name] for name in header["basis"]}
        steps, units = whole(header["steps_recorded"]), sum(pair.units for pair in pairs)
        fields = {
            "pairs": pairs,
            "costs": CostTable.from_dict(header["costs"], pairs),
            "method": str(header["method"]),
            "config": dict(header["config"]),
            "fingerprint": Fingerprint.from_dict(header["fingerprint"]),
            "unreached": tuple(str(name) for name in header["unreached"]),
        }
        seen = {}  # earlier releases did not keep it
        if "samples_seen" in header:
            seen["seen"] = (torch.int64, (whole(header["samples_seen"]),))
        sha256 = str(header["digests"][TENSORS])
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise FileError(f"{file}: {type(error).__name__} in field {error}.") from error
    shapes = {"score": (units,), "entry_time": (units,), "history": (2, steps)}
    for pair in pairs:
        if pair.norms:
            shapes[f"energy.{pair.name}"] = (pair.heads, pair.left[0].repeat + 1, pair.width)
    for name, pair in rotated.items():
        shapes[f"basis.{name}"] = (pair.heads, pair.width, pair.width)
    expected: Expected = {name: (torch.float64, shape) for name, shape in shapes.items()} | seen
    file = file_in(folder, TENSORS)
    tensors = read_sealed(file, sha256, expected)
    for name, value in tensors.items():
        if name != "history" and not torch.isfinite(value).all():
            raise FileError(f"{file}: {name} is not finite.")
    basis = {name: tensors[f"basis.{name}"] for name in rotated}
    check_axes(file, basis)
    known = tensors.get("seen", torch.zeros(0, dtype=torch.int64))
    check_seen(file, known)
    return fields | {
        "score": unflatten(pairs, tensors["score"]),
        "entry_time": unflatten(pairs, tensors["entry_time"]),
        "history": tensors["history"],
        "energy": {pair.name: tensors[f"energy.{pair.name}"] for pair in pairs if pair.norms},
        "basis": basis,
        "seen": known,
    }


def check_seen(file: Path, seen: Tensor) -> None:
    """Raise `FileError` unless digests of samples are in ascending order, each once.

    Args:
        file: The file that they were read from, for the message.
        seen: The digests, int64 ``[samples]``.
    """
    if not (seen[1:] > seen[:-1]).all():
        raise FileError(f"{file}: the digests of samples in seen are not ascending.")


def check_axes(file: Path, basis: Mapping[str, Tensor]) -> None:
    """Raise `FileError` unless every basis has an inverse, without which it loses information.

    Args:
        file: The file that the axes were read from, for the message.
        basis: Pair name to the axes, float64 ``[heads, width, width]``.
    """
    for name, axes in basis.items():
        inverse, failed = torch.linalg.inv_ex(axes)
        if failed.any() or not inverse.isfinite().all():
            raise FileError(f"{file}: the basis of {name} has no inverse.")
