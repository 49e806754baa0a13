"""Save extracted models to a folder, and share them on the Hub.

The files of the folder are described in docs/file-formats.md, and `load` reads them bit for bit. It
is checked that `load` can rebuild the model before anything is written.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Container, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

import torch
import transformers
from torch import Tensor, nn

from solpath.errors import ConfigError, SolpathError
from solpath.files import check_output, json_bytes, new_folder
from solpath.model.plain import check_floats
from solpath.model.weights import weight_reader
from solpath.planning.plan import Plan, plan_of
from solpath.reading import dtype_name, sealed
from solpath.running.memory import parts_of
from solpath.running.modes import contained
from solpath.running.provenance import version_of
from solpath.storing.manifest import (
    ATTENTION,
    CONFIG,
    EXPERTS,
    FORMAT,
    FORMAT_VERSION,
    GENERATION,
    HEADER,
    INDEX,
)
from solpath.storing.quantized import WAY, described, is_quantized, with_parts
from solpath.storing.shards import Stored, write_shards
from solpath.storing.skeleton import (
    AUTO_MARK,
    build_skeleton,
    check_same,
    check_sizes,
    constructor_options,
    resolve,
    state_of,
)
from solpath.wrapping import unwrapped


class Tokenizer(Protocol):
    """A tokenizer, an image processor, or anything else that writes its files into a folder."""

    def save_pretrained(self, save_directory: str) -> Any:
        """Write the files into the folder."""


@contained
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
        model: A model from `extract`. Its weights may have been changed since.
        folder: A folder that is new or empty. With `overwrite` it may also be one that solpath
            wrote, all of which is replaced.
        tokenizer: A tokenizer or processor whose files are added. None adds none.
        overwrite: Whether to replace the folder. If saving fails, the folder is left untouched.
        max_shard_size: The largest size of one weight file, in bytes or as text such as ``"5GB"``.
            Larger weights are split into several files.

    Raises:
        SolpathError: The model was not extracted, or `load` could not rebuild it, or it was
            quantised in another way than torchao's int8 or its fewer bits held in bytes.
        ConfigError: `max_shard_size` cannot be understood, or `tokenizer` has no `save_pretrained`.
        FileError: The folder is not empty, appeared meanwhile, was not written by solpath or cannot
            be written, or the model has a dtype that cannot be stored.

    Example:
        >>> solpath.save(small, "half")
        >>> sorted(file.name for file in Path("half").iterdir())
        ['config.json', 'model.safetensors', 'solpath.json']
    """
    check_output(folder, overwrite=overwrite)
    contents = contents_of(model)
    with new_folder(folder, overwrite=overwrite) as temporary:
        write(contents, temporary, tokenizer, max_shard_size)


@contained
def push_to_hub(
    model: nn.Module,
    repo_id: str,
    *,
    tokenizer: Tokenizer | None = None,
    private: bool | None = None,
    commit_message: str = "Add a model extracted by solpath",
    token: str | bool | None = None,
) -> str:
    """Upload an extracted model to the Hugging Face Hub, from where ``load(repo_id)`` reads it.

    If the configuration names the dense model by an absolute folder, that name is left out.

    Args:
        model: A model from `extract`.
        repo_id: The repository, as ``"name/repo"``. It is created if there is none.
        tokenizer: A tokenizer or processor whose files are added. None adds none.
        private: Whether a new repository is private. None takes the default of its owner. A
            repository that exists keeps its setting.
        commit_message: The message of the commit.
        token: A token of the Hub. None or True takes the token that is logged in.

    Returns:
        The address of the commit.

    Raises:
        SolpathError: The model was not extracted, `load` could not rebuild it, or the upload
            failed.
        ConfigError: `tokenizer` has no `save_pretrained`.
        FileError: The model has a dtype that cannot be stored.

    Example:
        ``push_to_hub(small, "name/half")`` uploads a member. A dense model is refused:

        >>> solpath.push_to_hub(model, "name/dense")
        Traceback (most recent call last):
            ...
        solpath.errors.SolpathError: this BertForSequenceClassification was not extracted; use ...
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    contents = contents_of(model)
    if os.path.isabs(str(contents.config.get("_name_or_path", ""))):
        contents.config["_name_or_path"] = ""
    with tempfile.TemporaryDirectory() as parent:
        with new_folder(Path(parent) / "model") as folder:
            write(contents, folder, tokenizer, "5GB")
        try:
            api = HfApi(token=token)
            api.create_repo(repo_id, private=private, exist_ok=True)
            commit = api.upload_folder(
                repo_id=repo_id, folder_path=Path(parent) / "model", commit_message=commit_message
            )
        except (HfHubHTTPError, OSError, ValueError) as error:
            raise SolpathError(f"could not upload to {repo_id}: {error}") from error
    return str(commit)


class Contents:
    """What goes into a folder. Building it checks that `load` rebuilds exactly this model."""

    def __init__(self, model: Any, plan: Plan, read: Callable[[str], Tensor]) -> None:
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
        self.config["quantization_config"] = AUTO_MARK
        self.generation: dict[str, Any] | None = None
        if model.can_generate() and model.generation_config is not None:
            self.generation = json.loads(model.generation_config.to_json_string(use_diff=False))
        attention = config._attn_implementation
        experts = getattr(config, "_experts_implementation", None) or "eager"
        self.head: dict[str, Any] = {
            "format": FORMAT,
            "version": FORMAT_VERSION,
            "class": name,
            "model_type": config.model_type,
            "dtype": str(dtype).removeprefix("torch."),
            "options": constructor_options(model),
            "attention": attention if attention in ATTENTION else ATTENTION[0],
            "provenance": {
                "solpath": version_of("solpath") or "unknown",
                "torch": torch.__version__,
                "transformers": version_of("transformers") or "unknown",
                "time": datetime.now(UTC).isoformat(timespec="seconds"),
            },
            "plan": plan.to_dict(),
        }
        if experts != "eager":  # so is every model without experts
            self.head["experts"] = experts if experts in EXPERTS else EXPERTS[0]
        model_class = resolve(name, config.model_type)
        if type(model) is not model_class:
            raise SolpathError(
                f"{type(model).__module__}.{name} is not the class of that name in transformers; "
                "load could not rebuild it."
            )
        state = _state_of(model, read)
        quantized = {key: described(key, read(key)) for key in state if is_quantized(state[key])}
        if quantized:
            self.head["quantized"] = quantized
            self.head["provenance"]["torchao"] = version_of("torchao") or "unknown"
        skeleton, expected = build_skeleton(model_class, self.config, self.head, plan, len(state))
        check_same(name, state, state_of(skeleton), dtype)
        stored = {key: (state[key].dtype, tuple(state[key].shape)) for key in expected}
        self.tensors = {
            key: Stored(*entry, reader_of(key, state, read))
            for key, entry in with_parts(stored, quantized).items()
        }
        header = {key: (dtype_name(t.dtype), t.shape) for key, t in self.tensors.items()}
        check_sizes(self.config, [header])


def reader_of(
    key: str, names: Container[str], read: Callable[[str], Tensor]
) -> Callable[[], Tensor]:
    """Return a function that reads one tensor of a file, which may be a part of a quantised weight.

    Args:
        key: The name of the tensor in the file.
        names: The names of whole weights and buffers.
        read: Reads one of these by its name.
    """
    name = key if key in names else key.rpartition(".")[0]
    return lambda: parts_of(read(name))[key.removeprefix(name)]


def _state_of(model: Any, read: Callable[[str], Tensor]) -> dict[str, Tensor]:
    """Return parameters and buffers as `state_of`. Tied ones that accelerate has untied are one."""
    state = state_of(model)
    for name, first in model.all_tied_weights_keys.items():
        packed = any(is_quantized(state[key]) for key in (name, first) if key in state)
        if name in state and first in state and state[name].is_meta and not packed:
            values = read(name), read(first)
            if not values[0].is_meta and torch.equal(*values):
                del state[name]
    return state


def contents_of(model: nn.Module, read: Callable[[str], Tensor] | None = None) -> Contents:
    """Return what goes into the folder of a model.

    Args:
        model: A model from `extract`.
        read: Reads a parameter or buffer by its name. None reads those of the model, also where
            accelerate has off-loaded them.

    Raises:
        SolpathError: The model was not extracted, or `load` could not rebuild it.
        FileError: The model has a dtype that cannot be stored.
    """
    model = unwrapped(model)
    plan = plan_of(model)
    if plan is None:
        raise SolpathError(
            f"this {type(model).__name__} was not extracted; use model.save_pretrained(folder) for "
            "a dense model, or solpath.extract(model, plan) first."
        )
    if not isinstance(model, transformers.PreTrainedModel):
        raise SolpathError(
            f"{type(model).__name__} is not a model of transformers, so load has no configuration "
            "to rebuild it from. Wrap a timm model in TimmWrapperForImageClassification or "
            "TimmWrapperModel before the search; or keep state_dict() and extract again."
        )
    if read is None:
        quantized = [name for name, weight in model.named_parameters() if is_quantized(weight)]
        check_floats(model, WAY, besides=quantized)
    return Contents(model, plan, read or weight_reader(model))


def write(
    contents: Contents, folder: Path, tokenizer: Tokenizer | None, max_shard_size: int | str
) -> None:
    """Write the files of a model into an empty folder.

    Args:
        contents: From `contents_of`.
        folder: The folder.
        tokenizer: See `save`.
        max_shard_size: See `save`.

    Raises:
        ConfigError: See `save`.
        FileError: A file cannot be written.
    """
    if tokenizer is not None:
        if not callable(getattr(tokenizer, "save_pretrained", None)):
            raise ConfigError(f"tokenizer has no save_pretrained: {tokenizer!r}.")
        tokenizer.save_pretrained(str(folder))
    known, index = write_shards(contents.tensors, folder, max_shard_size)
    texts: dict[str, Mapping[str, Any] | None] = {CONFIG: contents.config}
    texts[GENERATION] = contents.generation
    texts[INDEX] = index
    for name, value in texts.items():
        if value is not None:
            text = json_bytes(value)
            (folder / name).write_bytes(text)
            known[name] = hashlib.sha256(text).hexdigest()
    head = {**contents.head, "digests": known}
    (folder / HEADER).write_bytes(json_bytes(sealed(head)))
