"""The graph of a model, traced by transformers for inputs of any batch size and any length."""

import copy
import importlib.util
import inspect
import io
import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from solpath.errors import BatchError, ConfigError, ExportError
from solpath.positions import most_tokens
from solpath.running.forward import Batch

_TEXT = (
    "input_ids",
    "attention_mask",
    "token_type_ids",
    "position_ids",
    "decoder_input_ids",
    "decoder_attention_mask",
)
_MORE = 3  # tokens that another text has more, or fewer
_LOUD = ("root", "torch.onnx", "torch._export", "torch.export", "transformers.exporters")


def check_traceable(model: nn.Module, extra: str, packages: tuple[str, ...]) -> None:
    """Check that a model can be traced, and that the packages are there.

    Args:
        model: The model.
        extra: The extra of solpath that brings the packages.
        packages: Names of the modules that must be installed.

    Raises:
        ConfigError: A package is missing.
        ExportError: The model is not one of transformers, is not in float32 on the CPU, or has
            weights without elements, which graphs of other runtimes have no shapes for.
    """
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise ConfigError(f'{package} is missing: pip install "solpath[{extra}]".')
    name = type(model).__name__
    if not hasattr(model, "config") or not hasattr(model, "main_input_name"):
        raise ExportError(f"{name} is not a model of transformers, which alone can be traced.")
    for path, weight in model.named_parameters():
        if not weight.numel():
            raise ExportError(
                f"{path} of {name} has the shape {tuple(weight.shape)}, which {extra} cannot hold; "
                "keep a unit of every head: path.plan(min_width=1)."
            )
        if weight.dtype != torch.float32 or weight.device.type != "cpu":
            raise ExportError(
                f"{path} of {name} is {weight.dtype} on {weight.device}; export "
                'model.float().to("cpu").'
            )


def traced_batch(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """Return a batch with all that the graph of a text model should take: masks and token types.

    Args:
        model: The model.
        batch: Keyword arguments of it. Masks that are missing are added, with padding at the end
            (at the start for a model that `decodes`), which differs from sample to sample.

    Raises:
        BatchError: The batch is no mapping of names to tensors.
    """
    if not isinstance(batch, Mapping) or not all(isinstance(v, Tensor) for v in batch.values()):
        raise BatchError(
            "an export needs a batch of names and tensors, such as {'input_ids': ids}."
        )
    full = {name: value for name, value in batch.items() if name != "labels"}
    ids = full.get("input_ids")
    if ids is None:
        return full
    takes = inspect.signature(model.forward).parameters
    config: Any = model.config
    if "attention_mask" in takes and "attention_mask" not in full:
        full["attention_mask"] = _ragged(ids, left=decodes(model, full))
    if "token_type_ids" in takes and getattr(config, "type_vocab_size", 0) > 1:
        full.setdefault(
            "token_type_ids", (torch.arange(ids.shape[1]) % 2).expand(ids.shape).clone()
        )
    if "position_ids" in takes and decodes(model, full):
        full = completed(["position_ids"], full)
    return full


def completed(names: Iterable[str], batch: Batch) -> dict[str, Tensor]:
    """Return a batch with what a text model takes by default, where `names` has it.

    That is a mask of ones, token types of zeros, and positions that count what is not padding.
    """
    full, ids = dict(batch), batch.get("input_ids")
    if isinstance(ids, Tensor):
        mask = full.get("attention_mask", torch.ones_like(ids))
        defaults = {"attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}
        defaults["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
        full |= {name: defaults[name] for name in defaults if name in names and name not in full}
    return full


def checked_batches(model: nn.Module, batches: Mapping[str, Batch]) -> dict[str, Batch]:
    """Return what an exported graph is run on: batches as it takes them, and other shapes.

    Args:
        model: The model.
        batches: ``"random"`` and perhaps ``"given"``.
    """
    random = traced_batch(model, batches["random"])
    whole = {name: completed(random, batch) for name, batch in batches.items()}
    return whole | {"random": random} | other_shapes(model, random)


def other_shapes(model: nn.Module, batch: Batch) -> dict[str, Batch]:
    """Return inputs of other shapes than those of a batch that a model is traced with.

    Args:
        model: The model.
        batch: See `traced_batch`.

    Returns:
        One more sample; one sample, without padding; and texts that are longer, or shorter where
        the model takes no longer ones, with other padding. By name.
    """
    full = traced_batch(model, batch)
    full.pop("position_ids", None)
    others: dict[str, Batch] = {
        "one more sample": {name: torch.cat([v, v[-1:]]) for name, v in full.items()},
        "one sample": {
            name: torch.ones_like(v[:1]) if name == "attention_mask" else v[:1]
            for name, v in full.items()
        },
    }
    texts = [name for name in _TEXT if name in full]
    if not texts:
        return {name: traced_batch(model, other) for name, other in others.items()}
    most = most_tokens(model)
    length = max(full[name].shape[1] for name in texts)
    fewer = most is not None and length + _MORE > most
    moved = dict(full)
    for name in texts:
        value = full[name]
        moved[name] = value[:, :-_MORE] if fewer else torch.cat([value, value[:, -_MORE:]], 1)
    if "attention_mask" in moved and "input_ids" in moved:
        left = decodes(model, full)
        moved["attention_mask"] = _ragged(moved["input_ids"], left=left).flip(0)
    others["shorter texts" if fewer else "longer texts"] = moved
    return {name: traced_batch(model, other) for name, other in others.items()}


def _ragged(ids: Tensor, *, left: bool) -> Tensor:
    """Return a mask of ids ``[batch, tokens]``: a third of the last sample is padding."""
    batch, tokens = ids.shape
    lengths = torch.linspace(tokens, max(1, tokens - tokens // 3), batch).long().unsqueeze(1)
    mask = (torch.arange(tokens) < lengths).long()
    return mask.flip(1) if left else mask


def decodes(model: nn.Module, batch: Batch) -> bool:
    """Return whether a model is a decoder of text alone, which is traced with a cache."""
    generates: Any = getattr(model, "can_generate", bool)
    config: Any = model.config
    return bool(
        generates() and not config.is_encoder_decoder and all(name in _TEXT for name in batch)
    )


def trace(exporter: Any, config: Any, model: Any, batch: Batch) -> Any:
    """Trace a model with an exporter of transformers.

    Args:
        exporter: The class of the exporter.
        config: The class of its configuration.
        model: The model, in eval mode. It is left untouched.
        batch: Inputs. A decoder of text is traced with a cache of the keys and values of earlier
            tokens, which may be empty.

    Returns:
        transformers' ``ExportedModel`` of one graph.

    Raises:
        ExportError: transformers or torch cannot trace the model.
    """
    from transformers import DynamicCache
    from transformers.exporters.utils import decompose_for_generation

    inputs: dict[str, Any] = copy.deepcopy(twice(traced_batch(model, batch)))
    with tracing(model):
        if decodes(model, inputs):
            inputs.pop("position_ids", None)  # they are counted while generating
            inputs["cache"] = DynamicCache()  # keeps all; windows are in the graph's mask
            parts = decompose_for_generation(model, inputs, multi_token_decode=True)
            given = parts["decode"][1]
            inputs = {k: v for k, v in given.items() if v is not None and type(v) is not bool}
        return exported(exporter, config, model, inputs)


def twice(batch: Batch) -> dict[str, Any]:
    """Return a batch of one sample twice over: a graph that is traced with one takes only one."""
    single = all(value.dim() and len(value) == 1 for value in batch.values())
    return {name: torch.cat([v, v]) if single else v for name, v in batch.items()}


def exported(exporter: Any, config: Any, module: Any, inputs: Mapping[str, Any]) -> Any:
    """Return transformers' ``ExportedModel`` of a module that takes tensors and perhaps a cache."""
    from transformers.exporters.exporter_dynamo import (
        get_auto_dynamic_shapes,
        register_cache_pytrees_for_model,
    )

    register_cache_pytrees_for_model(module)
    given = dict(inputs)
    shapes = {
        name: _shape(name, value) or get_auto_dynamic_shapes(value) for name, value in given.items()
    }
    given["use_cache"] = "cache" in given
    return exporter().export(module, given, config(dynamic_shapes=shapes))


@contextmanager
def tracing(model: Any) -> Iterator[None]:
    """Name a model in what is raised while it is traced, and leave it as it was."""
    own = dict(vars(model))
    try:
        with quiet():
            yield
    except Exception as error:
        reason = str(error.__cause__ or error).strip().splitlines() or [type(error).__name__]
        raise ExportError(f"{type(model).__name__} cannot be traced: {reason[0]}") from error
    finally:
        if "forward" not in own:  # tracing leaves one in the module
            vars(model).pop("forward", None)


def write_settings(model: Any, folder: Path, tokenizer: Any) -> None:
    """Write what stands beside a graph: how the model is made, how it generates, its tokenizer."""
    model.config.save_pretrained(folder)
    if (generation := getattr(model, "generation_config", None)) is not None:
        generation = copy.deepcopy(generation)
        generation._from_model_config = False  # of others, fields that are not its own are not read
        generation.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def _shape(name: str, value: Any) -> dict[int, Any] | None:
    """Return the axes that may vary where not all of them may: images and sounds have one size."""
    fixed = name in ("pixel_values", "input_features") and value.dim() > 2
    return {0: torch.export.Dim.AUTO} if fixed else None


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the notes of exporters from the screen: what matters is checked or raised."""
    loggers = [logging.getLogger(name) for name in _LOUD]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with redirect_stdout(io.StringIO()):
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
