"""Load dense models and their processors by name, with transformers' own loaders."""

import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import torch
from torch import nn

from solpath.arch import TIMM_WRAPPER, lookup, timm
from solpath.arch.building import drop_data_, without_weights
from solpath.errors import FileError, SolpathError, UnsupportedModelError
from solpath.gguf import (
    alone,
    check_known,
    check_read_whole,
    is_gguf,
    read_gguf,
    scale_positions_,
)
from solpath.holding import DENSE, EXTRACTED_FILE, FAMILY, PATH, holds
from solpath.vetting import (
    INDEX,
    check_files,
    check_index,
    check_on_hub,
    check_settings,
    check_weights,
)
from solpath.wrapping import unwrapped

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Name: TypeAlias = str | os.PathLike[str]
"""A folder, the id of a Hub repository, or a GGUF file."""

_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", re.ASCII)


def from_pretrained(
    name: Name,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
) -> "PreTrainedModel":
    """Load a dense model in eval mode, from safetensors or GGUF. No code of a folder is run.

    The class is the one that the configuration names, so heads are kept, or else the plain model of
    that type. Models of timm (``"timm/..."``) need the extra ``timm``. A GGUF file needs the extra
    ``gguf``; its model is the one with the language head, and its packed weights become floats.

    Args:
        name: A folder, a file whose name ends with ``.gguf``, or the id of a Hub repository if
            there is no such folder.
        device: The device that the model is moved to. On ``"meta"`` it is built from its
            configuration alone, in seconds whatever its size; its weights are neither needed nor
            read.
        dtype: The dtype of the weights. None keeps the dtype of the checkpoint; of a GGUF file it
            is float32.

    Raises:
        UnsupportedModelError: The ``model_type`` is unknown (the message lists the known ones), the
            folder holds an extracted model or packed weights, or transformers passes over a setting
            or a tensor of the GGUF file. All are raised before any weights are read.
        FileError: There is no such model, it has no safetensors, some of its weights are missing,
            a file of the folder leads out of it, the GGUF file is damaged or truncated, or the
            folder asks transformers for code, adapters or other weights.
        ConfigError: timm or gguf is needed and cannot be used, or the folder asks timm for more
            than to build a model.

    Example:
        >>> model.save_pretrained("dense")
        >>> type(from_pretrained("dense")).__name__
        'BertForSequenceClassification'
    """
    if is_gguf(name):
        return _from_gguf(Path(name), device, dtype)
    return load_placed(name, device, dtype, {})


def load_placed(
    name: Name, device: str | torch.device, dtype: torch.dtype | None, placement: dict[str, Any]
) -> "PreTrainedModel":
    """Load a dense model as `from_pretrained` says, with more arguments for transformers."""
    folder, local = _locate(name)
    if (folder / EXTRACTED_FILE).is_file():
        raise UnsupportedModelError(
            f"{name} was already extracted; plan every size from the dense model, and read "
            "this one with solpath.load."
        )
    if local:
        check_files(folder)
    import transformers

    try:
        options: dict[str, Any] = {"local_files_only": local}
        found = transformers.PreTrainedConfig.get_config_dict(str(name), **options)[0]
        check_settings(name, found)
        model_type = found.get("model_type")
        if model_type is None:
            raise FileError(_no_model(name))
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
        if local:
            check_weights(folder)
        if not local and (index := _cached_index(str(name))):
            check_index(index)
        model, report = kind.from_pretrained(
            str(name),
            config=config,
            use_safetensors=True,
            dtype=dtype or "auto",
            output_loading_info=True,
            **options,
            **placement,
        )
    except SolpathError:
        raise
    except Exception as error:  # forged settings can make transformers raise anything
        raise _unreadable(name, error) from error
    _check_missing(name, kind, report)
    return cast("PreTrainedModel", model.eval() if placement else model.eval().to(device))


def _from_gguf(
    path: Path, device: str | torch.device, dtype: torch.dtype | None
) -> "PreTrainedModel":
    """Load the model of a GGUF file as floats."""
    import transformers

    file = read_gguf(path)
    check_known(file)
    try:
        with alone(path) as place:
            found = transformers.PreTrainedConfig.get_config_dict(**place)[0]
            found.pop("_model_name_or_path", None)  # the title of the model
            lookup(found.get("model_type"))
            config: Any = transformers.CONFIG_MAPPING[found["model_type"]].from_dict(found)
            scale_positions_(file, config)
            kind = _class_of(config, language=True)
            dtype = dtype or torch.float32
            empty = _without_weights(kind, config, dtype)
            check_read_whole(file, config, empty)
            if torch.device(device).type == "meta":
                return empty
            model, report = kind.from_pretrained(
                **place,
                config=config,
                quantization_config=transformers.GgufConfig(dequantize=True),
                dtype=dtype,
                output_loading_info=True,
            )
    except SolpathError:
        raise
    except Exception as error:  # forged settings can make transformers raise anything
        raise _unreadable(path, error) from error
    _check_missing(path, kind, report)
    for left in ("hf_quantizer", "is_quantized", "quantization_method"):
        vars(model).pop(left, None)  # the weights are floats by now
    vars(model.config).pop("quantization_config", None)
    model.name_or_path = model.config.name_or_path = str(path)
    return cast("PreTrainedModel", model.eval().to(device))


def _check_missing(name: Name, kind: type, report: Mapping[str, Any]) -> None:
    if missing := sorted(report["missing_keys"]):
        raise FileError(
            f"{name}: the weights of {kind.__name__} lack {missing[0]} and {len(missing) - 1} "
            "more, which would be random; load the class you want and pass the model instead."
        )


def load_processor(name: Name) -> Any:
    """Load the processor of a model: its tokenizer, its image processor, or both in one.

    Args:
        name: A folder, a GGUF file, or the id of a Hub repository if there is no such folder. The
            tokenizer of a GGUF file is the one inside it, whatever lies beside it.

    Raises:
        FileError: There is no processor, transformers cannot read it, or a file of the folder
            leads out of it.
        ConfigError: The package gguf is needed and missing.

    Example:
        >>> from transformers import ByT5Tokenizer
        >>> files = ByT5Tokenizer().save_pretrained("dense")
        >>> load_processor("dense")("cat").input_ids
        [102, 100, 119, 1]
    """
    import transformers

    if is_gguf(name):
        return _tokenizer_of(Path(name))
    folder, local = _locate(name)
    if local:
        check_files(folder)
    loader: Any = transformers.AutoProcessor
    try:
        return loader.from_pretrained(str(name), local_files_only=local, trust_remote_code=False)
    except Exception as error:  # forged settings can make transformers raise anything
        raise _unreadable(name, error) from error


def _tokenizer_of(path: Path) -> Any:
    """Load the tokenizer in a GGUF file."""
    import transformers

    check_known(read_gguf(path))
    try:
        with alone(path) as place:
            tokenizer = transformers.AutoTokenizer.from_pretrained(**place, trust_remote_code=False)
    except Exception as error:  # forged settings can make transformers raise anything
        raise _unreadable(path, error) from error
    tokenizer.name_or_path = str(path)
    return tokenizer


def quiet_transformers() -> None:
    """Turn off the progress bars and warnings of transformers and the Hub in this process."""
    import transformers

    messages: Any = transformers.utils.logging
    messages.set_verbosity_error()
    messages.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)


def as_model(model: nn.Module | Name, *, device: str | torch.device = "cpu") -> nn.Module:
    """Return `model` itself if it is a module, without its wrapper, or load the one of that name.

    Args:
        model: A model, or a name for `from_pretrained`.
        device: The device that a loaded model is moved to. A given model stays where it is.
    """
    if isinstance(model, str | os.PathLike):
        return from_pretrained(model, device=device)
    return unwrapped(model)


def check_name(name: Name) -> None:
    """Raise `FileError` unless a name leads to something that may be a dense model.

    Args:
        name: See `from_pretrained`.
    """
    if is_gguf(name):
        return
    folder, local = _locate(name)
    if local and holds(folder) in (PATH, FAMILY):
        raise FileError(_no_model(name))


def _locate(name: Name) -> tuple[Path, bool]:
    """Return `name` as a location, and whether it is a folder.

    Raise `FileError` if it is no folder and cannot be the id of a Hub repository either.
    """
    folder = Path(name)
    if not folder.is_dir() and (folder.exists() or not _HUB_ID.fullmatch(os.fspath(name))):
        raise FileError(f"{name}: no such folder, and not a hub id such as owner/name.")
    if not folder.is_dir():
        check_on_hub(os.fspath(name))
    return folder, folder.is_dir()


def _cached_index(name: str) -> Path | None:
    """Download the index of the weight files of a Hub repository. Return None if it has none."""
    from transformers.utils.hub import cached_file

    found = cached_file(name, INDEX, _raise_exceptions_for_missing_entries=False)
    return None if found is None else Path(found)


def _class_of(config: Any, *, language: bool = False) -> Any:
    """Return the class that a configuration names, or else the plain model of that type.

    Args:
        config: The configuration.
        language: Whether one with a language head comes before the plain model.
    """
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
    heads: list[Any] = [transformers.MODEL_MAPPING]
    if language:
        heads.insert(0, transformers.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING)
        heads.insert(0, transformers.MODEL_FOR_CAUSAL_LM_MAPPING)
    return next(kinds[type(config)] for kinds in heads if type(config) in kinds)


def _without_weights(kind: Any, config: Any, dtype: torch.dtype | None) -> "PreTrainedModel":
    """Build a model on the meta device from its configuration."""
    with without_weights():
        model = kind._from_config(config, dtype=dtype or config.dtype or torch.float32)
    drop_data_(model)
    model.tie_weights()
    return cast("PreTrainedModel", model.eval())


def _no_model(name: Name) -> str:
    """Return the words for what has no configuration of a model."""
    found = holds(name)
    if found in (None, DENSE):
        return f"{name} holds no model: it has no config.json that names a model_type."
    return f"{name} holds {found}; give the model."


def _unreadable(name: Name, error: Exception) -> FileError:
    reason = " ".join(str(error).split())[:300]
    return FileError(f"cannot load {name}: {reason or type(error).__name__}")
