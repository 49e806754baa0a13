"""Load extracted models bit for bit, from a folder or from the Hub.

Loading never unpickles and never runs code from the folder. It compares every size with the headers
of the weight files before it allocates memory.
"""

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import Tensor, nn

from solpath.errors import FileError, UnsupportedModelError
from solpath.holding import check_holds
from solpath.reading import (
    check_digest,
    check_header,
    digests,
    file_in,
    one_version,
    read_data,
    read_header,
    read_json,
)
from solpath.running.modes import contained
from solpath.storing.manifest import CONFIG, GENERATION, HEADER, INDEX, check_manifest, read_headers
from solpath.storing.quantized import check_torchao, joined, with_parts
from solpath.storing.skeleton import (
    assign_,
    build_skeleton,
    check_sizes,
    constructor_options,
    cut_skeleton_,
    expect_buffers,
    resolve,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

HUB_FILES = ["*.json", "model*.safetensors", "vocab.txt", "merges.txt"]
"""The files of a Hub repository that are downloaded."""

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)

Result = TypeVar("Result")


@contained
def load(
    path: str | os.PathLike[str],
    *,
    device: str | torch.device = "cpu",
    verify: bool = False,
    revision: str | None = None,
    token: str | bool | None = None,
) -> "PreTrainedModel":
    """Load a model written by `save`, equal bit for bit and in eval mode, with its `solpath_plan`.

    Args:
        path: A folder, or the id of a Hub repository (``"name/repo"``) if there is no such folder.
        device: The device that the model is moved to.
        verify: Whether to compare the weight files too with the SHA-256 noted when they were saved,
            which takes about as long as reading them. The JSON files are always compared.
        revision: A branch, tag or commit of the Hub repository. None takes its main branch.
        token: A token for a private Hub repository. None or True takes the token that is logged in.

    Raises:
        FileError: There is no such model, or a file is missing, damaged or forged. The message
            names the file and the field.
        ConfigError: torchao has quantised the model, and is not installed here.

    Example:
        >>> solpath.save(small, "half")
        >>> loaded = solpath.load("half")
        >>> torch.equal(loaded(**batch).logits, small(**batch).logits)
        True
    """
    folder = _locate(path, revision, token)
    model = one_version(folder / HEADER, lambda: _read(folder, verify))
    if torch.device(device).type != "cpu":
        model.to(device)
    return cast("PreTrainedModel", model)


def _read(folder: Path, verify: bool) -> nn.Module:
    """Return the model in a folder, on the CPU and in eval mode."""
    check_holds(folder, HEADER, "give a folder that extract or solpath.save wrote")
    file = file_in(folder, HEADER)
    head = read_json(file)
    plan = check_manifest(file, head)
    known, quantized = head["digests"], head.get("quantized", {})
    if quantized:
        check_torchao(file)
    config = read_json(file_in(folder, CONFIG), sha256=known[CONFIG])
    headers = read_headers(folder, known)
    model_class = _named(folder, resolve, head["class"], head["model_type"])
    _named(folder, check_sizes, config, headers.values())
    count = sum(len(header) for header in headers.values())
    with digests([folder / name for name in headers] if verify else ()) as found:
        model, expected = _named(folder, build_skeleton, model_class, config, head, plan, count)
        wanted = expect_buffers(expected, headers, getattr(torch, head["dtype"]))
        wanted = _named(folder, with_parts, wanted, quantized)
        for name, header in headers.items():  # check all headers before any data is read
            check_header(folder / name, header, wanted, exact=len(headers) == 1)
        if missing := sorted(set(wanted).difference(*headers.values())):
            raise FileError(f"{folder / INDEX}: tensor {missing[0]!r} is in none of the files.")
        tensors: dict[str, Tensor] = {}
        for name, header in headers.items():
            tensors |= read_data(folder / name, header)
        for name, digest in found.items():
            check_digest(folder / name, digest.result(), known[name])
    for name, description in quantized.items():
        parts = {part: tensors.pop(f"{name}.{part}") for part in description["parts"]}
        tensors[name] = _named(folder, joined, description, parts)
    assign_(model, tensors)
    if GENERATION in known:
        _set_generation_(model, folder, known[GENERATION])
    return model.eval()


@contained
def cut_(model: "PreTrainedModel", files: Sequence[Path]) -> None:
    """Cut a model that transformers has built without data to the plan beside its weight files.

    Args:
        model: A dense model on the meta device, which is changed in place.
        files: The weight files that it will be filled from.

    Raises:
        FileError: A file is missing, damaged or forged, or lacks weights of the model.
        UnsupportedModelError: The model is not of the class, or not built with the options, of the
            one that was saved, and some of its weights would be random. Or torchao has quantised
            it, which `load` alone reads.
    """
    folder = _with_manifest(files[0].parent, model)
    file = file_in(folder, HEADER)
    head = read_json(file)
    plan = check_manifest(file, head)
    if (folder / CONFIG).is_file():
        read_json(file_in(folder, CONFIG), sha256=head["digests"][CONFIG])
    if head.get("quantized"):
        raise UnsupportedModelError(
            f"{folder} holds weights that torchao has quantised, which transformers cannot cut; "
            "call solpath.load."
        )
    name = type(model).__name__
    if name != head["class"]:
        raise UnsupportedModelError(
            f"{folder} holds an extracted {head['class']}, not a {name}, whose other weights would "
            "be random; call solpath.load, or from_pretrained of a class with that head."
        )
    options = constructor_options(model)
    for key, value in head["options"].items():
        if options.get(key) != value:
            raise UnsupportedModelError(
                f"{folder} holds a {name} with {key}={value}; call solpath.load, or pass that to "
                "from_pretrained."
            )
    expected = _named(folder, cut_skeleton_, model, head, plan)
    found = {name for weights in files for name in read_header(weights)}
    if missing := sorted(set(expected) - found - set(model.all_tied_weights_keys)):
        raise FileError(f"{folder}: tensor {missing[0]!r} is in none of the weight files.")


def _with_manifest(folder: Path, model: Any) -> Path:
    """Return a folder with `solpath.json`, which is fetched if the folder is a Hub snapshot."""
    if (folder / HEADER).is_file() or folder.parent.name != "snapshots":
        return folder
    from huggingface_hub import hf_hub_download

    name = model.config.name_or_path
    try:
        return Path(hf_hub_download(name, HEADER, revision=folder.name)).parent
    except (OSError, ValueError) as error:
        raise FileError(f"{name} has no {HEADER}: {error}") from error


def _named(folder: Path, function: Callable[..., Result], *values: Any) -> Result:
    """Call `function` with `values`. Turn any error into a `FileError` that names the files."""
    try:
        return function(*values)
    except Exception as error:  # forged settings can make a constructor raise anything
        raise FileError(
            f"{folder / CONFIG} and {HEADER} do not describe a model that can be built: "
            f"{str(error) or type(error).__name__}"
        ) from error


def _locate(path: str | os.PathLike[str], revision: str | None, token: str | bool | None) -> Path:
    """Return the folder `path`, or a snapshot of the Hub repository `path`."""
    folder = Path(path)
    if folder.is_dir():
        return folder
    name = os.fspath(path)
    if folder.exists() or not _HUB_ID.fullmatch(name):
        raise FileError(f"{path} is not a folder, nor the id of a Hub repository (name/repo).")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        found = snapshot_download(name, revision=revision, token=token, allow_patterns=HUB_FILES)
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise FileError(f"there is no folder {name}, and not from the Hub: {error}") from error
    return Path(found)


def _set_generation_(model: Any, folder: Path, sha256: str) -> None:
    """Give the model the generation configuration of the folder."""
    from transformers import GenerationConfig

    file = file_in(folder, GENERATION)
    values = read_json(file, sha256=sha256)
    try:
        model.generation_config = GenerationConfig.from_dict(values)
    except Exception as error:  # forged settings can make the constructor raise anything
        raise FileError(f"{file}: {error}") from error
