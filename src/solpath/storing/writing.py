"""Save extracted models to a folder, load them back bit for bit, share them on the Hub.

What lies in the folder is described in docs/file-formats.md. Loading never unpickles, never runs
code from the folder, and compares every size with the weight headers before it allocates.
"""

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from solpath.errors import ConfigError, FileError, SolpathError
from solpath.files import (
    check_digest,
    check_header,
    check_output,
    digests,
    dtype_name,
    member,
    new_folder,
    read_data,
    read_json,
    sync,
    write_json,
)
from solpath.model.discovery import EXTRACTED
from solpath.planning.plan import Plan
from solpath.storing.manifest import (
    ATTENTION,
    CONFIG,
    FORMAT,
    FORMAT_VERSION,
    GENERATION,
    HEADER,
    INDEX,
    check_manifest,
    checksum,
    read_headers,
)
from solpath.storing.skeleton import (
    assign_,
    build_skeleton,
    check_same,
    check_sizes,
    constructor_options,
    expect_buffers,
    resolve,
    separate,
    state_of,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

HUB_FILES = ["*.json", "model*.safetensors", "vocab.txt", "merges.txt"]

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)

Result = TypeVar("Result")


class Tokenizer(Protocol):
    """A tokenizer, image processor or anything else that writes its files into a folder."""

    def save_pretrained(self, save_directory: str) -> Any:
        """Write the files."""


def save(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    tokenizer: Tokenizer | None = None,
    overwrite: bool = False,
    max_shard_size: int | str = "5GB",
) -> None:
    """Write an extracted model as safetensors and JSON. The folder appears whole or not at all.

    Args:
        model: from `extract`; its weights may have been trained since.
        folder: where to; new or empty, unless `overwrite`, which replaces all that is in it.
        tokenizer: its files are added.
        overwrite: replace the folder. A save that fails leaves it as it was.
        max_shard_size: weights above this are split into several files.

    Raises:
        SolpathError: the model was not extracted, or `load` could not rebuild it.
        ConfigError: a bad `max_shard_size` or `tokenizer`.
        FileError: the folder is not empty, or cannot be written.
    """
    check_output(folder, overwrite=overwrite)
    contents = _contents(model)
    with new_folder(folder, overwrite=overwrite) as temporary:
        _write(contents, temporary, tokenizer, max_shard_size)


def load(
    path: str | os.PathLike[str],
    *,
    device: str | torch.device = "cpu",
    verify: bool = False,
    revision: str | None = None,
    token: str | bool | None = None,
) -> "PreTrainedModel":
    """Read a model written by `save`, bitwise equal, in eval mode, with its `solpath_plan`.

    Args:
        path: a folder, or the id of a Hub repository (``"name/repo"``) if there is no such folder.
        device: where the model goes.
        verify: also compare the weight files with the SHA-256 noted when they were saved, which
            takes about as long as reading them. The JSON files are always compared.
        revision: branch, tag or commit of a Hub repository.
        token: for a private Hub repository.

    Raises:
        FileError: a missing, damaged or forged file; the message names the file and the field.

    Example:
        >>> small = solpath.load("family/s50")  # doctest: +SKIP
    """
    folder = _locate(path, revision, token)
    file = member(folder, HEADER)
    head = read_json(file)
    plan = check_manifest(file, head)
    known = head["digests"]
    config = read_json(member(folder, CONFIG), sha256=known[CONFIG])
    headers = read_headers(folder, known)
    model_class = _named(folder, resolve, head["class"], head["model_type"])
    _named(folder, check_sizes, config, headers.values(), model_class)
    with digests([folder / name for name in headers] if verify else ()) as found:
        model, expected = _named(folder, build_skeleton, model_class, config, head, plan)
        wanted = expect_buffers(expected, headers, getattr(torch, head["dtype"]))
        for name, header in headers.items():  # every header, before any tensor
            check_header(folder / name, header, wanted, exact=len(headers) == 1)
        if missing := sorted(set(wanted).difference(*headers.values())):
            raise FileError(f"{folder / INDEX}: tensor {missing[0]!r} is in none of the files.")
        tensors: dict[str, Tensor] = {}
        for name, header in headers.items():
            tensors |= read_data(folder / name, header)
        for name, digest in found.items():
            check_digest(folder / name, digest.result(), known[name])
    assign_(model, tensors)
    if GENERATION in known:
        _set_generation_(model, folder, known[GENERATION])
    model.eval()
    if torch.device(device).type != "cpu":
        model.to(device)
    return cast("PreTrainedModel", model)


def push_to_hub(
    model: nn.Module,
    repo_id: str,
    *,
    tokenizer: Tokenizer | None = None,
    private: bool | None = None,
    commit_message: str = "Add a model extracted by solpath",
    token: str | bool | None = None,
) -> str:
    """Upload an extracted model to the Hugging Face Hub; ``load(repo_id)`` reads it.

    Args:
        model: from `extract`.
        repo_id: ``"name/repo"``; created when there is none.
        tokenizer: its files are added.
        private: visibility of a new repository.
        commit_message: of the upload.
        token: see `huggingface_hub.login`.

    Returns:
        The address of the commit.

    Raises:
        SolpathError: as `save`, and whatever the Hub refuses.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    contents = _contents(model)
    if os.path.isabs(str(contents.config.get("_name_or_path", ""))):
        contents.config["_name_or_path"] = ""
    with tempfile.TemporaryDirectory() as parent:
        with new_folder(Path(parent) / "model") as folder:
            _write(contents, folder, tokenizer, "5GB")
        try:
            api = HfApi(token=token)
            api.create_repo(repo_id, private=private, exist_ok=True)
            commit = api.upload_folder(
                repo_id=repo_id, folder_path=Path(parent) / "model", commit_message=commit_message
            )
        except (HfHubHTTPError, OSError, ValueError) as error:
            raise SolpathError(f"could not upload to {repo_id}: {error}") from error
    return str(commit)


class _Contents:
    """What goes into a folder: checked that `load` rebuilds exactly this."""

    def __init__(self, model: Any, plan: Plan) -> None:
        name, config = type(model).__name__, model.config
        dtypes = {parameter.dtype for parameter in model.parameters()}
        if len(dtypes) != 1:
            found = ", ".join(sorted(map(str, dtypes)))
            raise SolpathError(f"parameters have dtypes {found}; cast with model.to(dtype) first.")
        dtype = dtypes.pop()
        dtype_name(dtype)
        self.config: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
        self.config["transformers_version"] = config.transformers_version
        self.config["_name_or_path"] = config.name_or_path
        self.generation: dict[str, Any] | None = None
        if model.can_generate() and model.generation_config is not None:
            self.generation = json.loads(model.generation_config.to_json_string(use_diff=False))
        attention = config._attn_implementation
        self.head: dict[str, Any] = {
            "format": FORMAT,
            "version": FORMAT_VERSION,
            "class": name,
            "model_type": config.model_type,
            "dtype": str(dtype).removeprefix("torch."),
            "options": constructor_options(model),
            "attention": attention if attention in ATTENTION else ATTENTION[0],
            "provenance": {
                "solpath": _version("solpath"),
                "torch": torch.__version__,
                "transformers": _version("transformers"),
                "time": datetime.now(UTC).isoformat(timespec="seconds"),
            },
            "plan": plan.to_dict(),
        }
        model_class = resolve(name, config.model_type)
        if type(model) is not model_class:
            raise SolpathError(
                f"{type(model).__module__}.{name} is not the class of that name in transformers; "
                "load could not rebuild it."
            )
        skeleton, expected = build_skeleton(model_class, self.config, self.head, plan)
        state = state_of(model)
        check_same(name, state, state_of(skeleton), dtype)
        self.tensors = separate({key: state[key] for key in expected})
        header = {key: (dtype_name(t.dtype), tuple(t.shape)) for key, t in self.tensors.items()}
        check_sizes(self.config, [header], model_class)


def _contents(model: nn.Module) -> _Contents:
    from transformers import PreTrainedModel

    plan = getattr(model, EXTRACTED, None)
    if not isinstance(plan, Plan):
        raise SolpathError(
            f"this {type(model).__name__} was not extracted; use model.save_pretrained(folder) for "
            "a dense model, or solpath.extract(model, plan) first."
        )
    if not isinstance(model, PreTrainedModel):
        raise SolpathError(
            f"{type(model).__name__} is not a model of transformers, so load has no configuration "
            "to rebuild it from. Wrap a timm model in TimmWrapperForImageClassification or "
            "TimmWrapperModel before the search; or keep state_dict() and extract again."
        )
    return _Contents(model, plan)


def _write(
    contents: _Contents, folder: Path, tokenizer: Tokenizer | None, max_shard_size: int | str
) -> None:
    from huggingface_hub import split_torch_state_dict_into_shards

    if tokenizer is not None:
        if not callable(getattr(tokenizer, "save_pretrained", None)):
            raise ConfigError(f"tokenizer has no save_pretrained: {tokenizer!r}.")
        tokenizer.save_pretrained(str(folder))
    try:
        shards = split_torch_state_dict_into_shards(contents.tensors, max_shard_size=max_shard_size)
    except (ValueError, TypeError, AttributeError) as error:
        raise ConfigError(f"max_shard_size {max_shard_size!r}: {error}") from error
    written = []
    for name, keys in shards.filename_to_tensors.items():
        part = {key: contents.tensors[key] for key in keys}
        try:
            save_file(part, folder / name, metadata={"format": "pt"})
        except SafetensorError as error:
            raise FileError(f"could not write {name}: {error}") from error
        written.append(folder / name)
    with digests(written) as found:
        for path in written:  # takes as long as the digests, so do both at once
            sync(path)
        known = {name: digest.result() for name, digest in found.items()}
    texts: dict[str, Mapping[str, Any] | None] = {CONFIG: contents.config}
    texts[GENERATION] = contents.generation
    if shards.is_sharded:
        texts[INDEX] = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
    for name, value in texts.items():
        if value is not None:
            write_json(folder / name, value)
            known[name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    head = {**contents.head, "digests": known}
    write_json(folder / HEADER, {**head, "checksum": checksum(head)})


def _named(folder: Path, function: Callable[..., Result], *values: Any) -> Result:
    """Call `function`; whatever it raises becomes a `FileError` naming the files it worked on."""
    try:
        return function(*values)
    except Exception as error:  # forged settings can make a constructor raise anything
        raise FileError(
            f"{folder / CONFIG} and {HEADER} do not describe a model that can be built: "
            f"{str(error) or type(error).__name__}"
        ) from error


def _locate(path: str | os.PathLike[str], revision: str | None, token: str | bool | None) -> Path:
    """The folder `path`, or a snapshot of the Hub repository `path`."""
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
    from transformers import GenerationConfig

    file = member(folder, GENERATION)
    values = read_json(file, sha256=sha256)
    try:
        model.generation_config = GenerationConfig.from_dict(values)
    except Exception as error:  # forged settings can make the constructor raise anything
        raise FileError(f"{file}: {error}") from error


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "unknown"
