"""Load dense models and their processors by folder or hub id, through transformers' own loaders."""

import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor, nn

from solpath.arch import TIMM_WRAPPER, lookup, timm
from solpath.errors import FileError, SolpathError, UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Name: TypeAlias = str | os.PathLike[str]
"""A folder, or the id of a Hub repository."""

_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", re.ASCII)
_LOADING_ERRORS = (
    OSError,
    ValueError,
    KeyError,
    ImportError,
    RuntimeError,
    AttributeError,
    TypeError,
    SafetensorError,
    StrictDataclassError,
)


def from_pretrained(
    name: Name,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
) -> "PreTrainedModel":
    """Load a dense model in eval mode. Only safetensors are read; no code from the folder is run.

    The class is the one the configuration names, so heads are kept, or else the plain model of that
    type. The ids of timm (``"timm/..."``) need the extra ``timm``.

    Args:
        name: a folder, or the id of a Hub repository if there is no such folder.
        device: where the model goes. On ``"meta"`` it is built from its configuration alone, in
            seconds whatever its size; its weights are neither needed nor read.
        dtype: of the weights; None keeps that of the checkpoint.

    Raises:
        UnsupportedModelError: unknown ``model_type`` (the message lists the known ones), or a
            folder with an extracted model. Both before any weights are read.
        FileError: nothing there, no safetensors, or weights that are not all in the files.
        ConfigError: the extra ``timm`` is not installed, or the folder asks timm for more than a
            model.

    Example:
        >>> model = from_pretrained("facebook/deit-small-patch16-224")  # doctest: +SKIP
    """
    folder, local = _locate(name)
    if (folder / "solpath.json").is_file():
        raise UnsupportedModelError(
            f"{name} was already extracted; plan every size from the dense model, and read "
            "this one with solpath.load."
        )
    import transformers

    try:
        options: dict[str, Any] = {"local_files_only": local}
        found = transformers.PreTrainedConfig.get_config_dict(str(name), **options)[0]
        model_type = found.get("model_type")
        if model_type == TIMM_WRAPPER:
            timm.check_settings(found)
        else:
            lookup(model_type)
        config = transformers.AutoConfig.from_pretrained(
            str(name), trust_remote_code=False, **options
        )
        kind = _class_of(config)
        if torch.device(device).type == "meta":
            return _without_weights(kind, config, dtype)
        model, report = kind.from_pretrained(
            str(name),
            config=config,
            use_safetensors=True,
            dtype=dtype or "auto",
            output_loading_info=True,
            **options,
        )
    except SolpathError:
        raise
    except _LOADING_ERRORS as error:
        raise _unreadable(name, error) from error
    if missing := sorted(report["missing_keys"]):
        raise FileError(
            f"{name}: the weights of {kind.__name__} lack {missing[0]} and {len(missing) - 1} "
            "more, which would be random; load the class you want and pass the model instead."
        )
    return cast("PreTrainedModel", model.eval().to(device))


def load_processor(name: Name) -> Any:
    """The processor of a model: its tokenizer, image processor, or both in one.

    Raises:
        FileError: nothing there, or not readable by transformers.
    """
    import transformers

    _, local = _locate(name)
    loader: Any = transformers.AutoProcessor
    try:
        return loader.from_pretrained(str(name), local_files_only=local, trust_remote_code=False)
    except _LOADING_ERRORS as error:
        raise _unreadable(name, error) from error


def quiet_transformers() -> None:
    """Keep loading bars and warnings of transformers off the terminal."""
    import transformers

    messages: Any = transformers.utils.logging
    messages.set_verbosity_error()
    messages.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)


def as_model(model: nn.Module | Name, *, device: str | torch.device = "cpu") -> nn.Module:
    """`model` itself, or the model of that name, see `from_pretrained`."""
    return model if isinstance(model, nn.Module) else from_pretrained(model, device=device)


def for_batches(model: nn.Module | Name, batches: Iterable[Any]) -> tuple[nn.Module, Iterable[Any]]:
    """`model` itself, or the model of that name on the device of the first batch; the batches."""
    if isinstance(model, nn.Module):
        return model, batches
    if isinstance(batches, Iterator):
        batches = list(batches)
    first = next(iter(batches), None)
    values = first.values() if isinstance(first, Mapping) else (first,)
    device = next((value.device for value in values if isinstance(value, Tensor)), "cpu")
    return from_pretrained(model, device=device), batches


def _locate(name: Name) -> tuple[Path, bool]:
    """`name` as a path, and whether it is a folder; raise if it cannot be a hub id either."""
    folder = Path(name)
    if not folder.is_dir() and (folder.exists() or not _HUB_ID.fullmatch(os.fspath(name))):
        raise FileError(f"{name}: no such folder, and not a hub id such as owner/name.")
    return folder, folder.is_dir()


def _class_of(config: Any) -> Any:
    """The class a configuration names, if transformers has it for that type, or the plain one."""
    import transformers

    if config.model_type == TIMM_WRAPPER:
        kind = "TimmWrapperForImageClassification" if config.num_labels else "TimmWrapperModel"
        return getattr(transformers, kind)
    for architecture in config.architectures or ():
        found = getattr(transformers, architecture, None)
        if (
            isinstance(found, type)
            and issubclass(found, transformers.PreTrainedModel)
            and getattr(found.config_class, "model_type", None) == config.model_type
        ):
            return found
    return transformers.MODEL_MAPPING[type(config)]


def _without_weights(kind: Any, config: Any, dtype: torch.dtype | None) -> "PreTrainedModel":
    from transformers.initialization import no_init_weights

    with torch.device("meta"), no_init_weights():
        model = kind._from_config(config, dtype=dtype or config.dtype or torch.float32)
    model.tie_weights()
    return cast("PreTrainedModel", model.eval())


def _unreadable(name: Name, error: Exception) -> FileError:
    reason = " ".join(str(error).split())[:300]
    return FileError(f"cannot load {name}: {reason or type(error).__name__}")
