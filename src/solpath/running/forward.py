"""Run a model on a batch, and find in its output what is compared."""

import inspect
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from solpath.errors import BatchError, UnsupportedModelError
from solpath.running.placement import execution_device

Batch = Any
"""A mapping of keyword arguments for the model, or its first argument as a tensor."""

_OF_IMAGES = re.compile(r"(^|\.)(vision|visual|image)")  # a tower, as transformers names it


def device_of(model: nn.Module) -> torch.device:
    """Return the device on which a model takes its inputs.

    That is the device of its first parameter, or that on which accelerate runs the first module, if
    it spreads or off-loads the weights. It is the CPU for a model without parameters.
    """
    for module in model.modules():
        if (device := execution_device(module)) is not None:
            return device
        for parameter in module._parameters.values():
            if parameter is not None:
                return parameter.device
    return torch.device("cpu")


def run(model: nn.Module, batch: Batch, *, labels: bool) -> Any:
    """Call a model on a batch.

    A model that can cache keys and values is told not to, unless the batch says otherwise.

    Args:
        model: The model.
        batch: The batch.
        labels: Whether the model gets the ``labels`` of the batch, if there are any.

    Returns:
        What the model returns.

    Raises:
        BatchError: The model has a decoder that gets no inputs and cannot do without.
        UnsupportedModelError: The parts of the model return tuples, of which it takes names.
    """
    if not isinstance(batch, Mapping):
        return model(batch)
    inputs = {name: value for name, value in batch.items() if labels or name != "labels"}
    parameters = inspect.signature(model.forward).parameters
    generates: Any = getattr(model, "can_generate", bool)  # those that only pass the option on
    if "use_cache" in parameters or ("kwargs" in parameters and generates()):
        inputs.setdefault("use_cache", False)
    try:
        return model(**inputs)
    except AttributeError as error:
        if getattr(getattr(model, "config", None), "return_dict", True) is not False:
            raise
        raise UnsupportedModelError(
            f"this {type(model).__name__} cannot run with return_dict=False in its configuration; "
            "set model.config.return_dict = True."
        ) from error
    except ValueError as error:
        if "decoder_input_ids" not in parameters or any(
            inputs.get(name) is not None for name in ("decoder_input_ids", "decoder_inputs_embeds")
        ):
            raise
        shifted = "labels, which are shifted to decoder inputs, or " if generates() else ""
        raise BatchError(
            f"the decoder of {type(model).__name__} gets no inputs; add {shifted}decoder_input_ids "
            "to every batch."
        ) from error


def forward(model: nn.Module, batch: Batch) -> Tensor:
    """Run a model on a batch without labels and return the output that is compared.

    Args:
        model: The model.
        batch: The batch.

    Returns:
        ``[batch, classes]``, ``[batch, tokens, classes]`` or ``[batch, tokens, features]``; see
        `output_tensor`.

    Raises:
        BatchError: The model returns no output that can be compared.
    """
    return output_tensor(run(model, batch, labels=False))


def output_tensor(outputs: Any) -> Tensor:
    """Return the part of a transformers output that is compared; a bare tensor comes back as it is.

    That is the logits, classes last; for question answering the logits of start and end,
    ``[batch, 2, tokens]``; without logits the embeddings of image and text, end to end if there
    are both; the last hidden state; or the image or depth that was predicted.

    Raises:
        BatchError: The output has none of these, or has several heads or boxes.
    """
    if isinstance(outputs, Tensor):
        return outputs
    if isinstance(outputs, tuple) and not hasattr(outputs, "_fields"):
        raise BatchError(
            "the model returns a tuple, in which nothing says what to compare; set "
            "model.config.return_dict = True, or pass your own loss."
        )
    name = type(outputs).__name__
    tensors = {key: getattr(outputs, key, None) for key in (*_KNOWN, *_OTHER_HEADS)}
    found = {key: value for key, value in tensors.items() if isinstance(value, Tensor)}
    if others := [key for key in _OTHER_HEADS if key in found]:
        raise BatchError(
            f"{name} has more than one thing to compare, {others[0]} among them; pass your own "
            "loss, or take the base model or a class with one head."
        )
    if "start_logits" in found and "end_logits" in found:
        return torch.stack([found["start_logits"], found["end_logits"]], 1)
    if "logits" in found:
        logits = found["logits"]
        if is_per_token(outputs):
            return logits.unsqueeze(-1)
        return logits.movedim(1, -1) if name == "SemanticSegmenterOutput" else logits
    embeddings = [found[key] for key in ("image_embeds", "text_embeds") if key in found]
    if embeddings:
        return embeddings[0] if len(embeddings) == 1 else torch.cat(embeddings, -1)
    for key in ("last_hidden_state", "reconstruction", "predicted_depth"):
        if key in found:
            return found[key]
    raise BatchError(f"{name} has no logits, embeddings or last_hidden_state; pass your own loss.")


_KNOWN = (
    "logits",
    "start_logits",
    "end_logits",
    "image_embeds",
    "text_embeds",
    "last_hidden_state",
    "reconstruction",
    "predicted_depth",
)
_OTHER_HEADS = (
    "pred_boxes",
    "pred_masks",
    "masks_queries_logits",
    "prediction_logits",
    "seq_relationship_logits",
    "sop_logits",
    "mc_logits",
)


def at_least_float(value: Tensor) -> Tensor:
    """Return half precision as float32, and float32 and float64 unchanged.

    Args:
        value: A tensor of any floating dtype.
    """
    return value if value.dtype == torch.float64 else value.float()


def row_not_finite(values: Tensor) -> int | None:
    """Return the first row of ``[rows, ...]`` that holds a NaN or an infinite value, if one does.

    A value without rows gives None.
    """
    if values.dim() == 0:
        return None
    bad = (~torch.isfinite(values)).flatten(1).any(1) if values.dim() > 1 else ~values.isfinite()
    return int(bad.nonzero()[0]) if bad.any() else None


def has_logits(outputs: Any) -> bool:
    """Return whether `output_tensor` gives logits for these outputs."""
    return isinstance(getattr(outputs, "logits", None), Tensor)


def is_per_token(outputs: Any) -> bool:
    """Return whether the logits of these outputs are one for every token, ``[batch, tokens]``."""
    return type(outputs).__name__ in ("ElectraForPreTrainingOutput", "FunnelForPreTrainingOutput")


def has_spans(outputs: Any) -> bool:
    """Return whether `output_tensor` gives the start and the end of a span for these outputs."""
    return isinstance(getattr(outputs, "start_logits", None), Tensor)


def attended(batch: Batch, spans: Tensor) -> Tensor | None:
    """Return which positions of spans ``[batch, 2, tokens]`` count, or None if all do.

    Args:
        batch: The batch that the model ran on; its ``attention_mask`` decides if it fits.
        spans: The logits of start and end.
    """
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    fits = isinstance(mask, Tensor) and mask.shape == (spans.shape[0], spans.shape[2])
    return mask.bool().to(spans.device) if fits and mask is not None else None


def output_mask(batch: Batch, output: Tensor) -> Tensor | None:
    """Return which tokens of an output count: bool ``[batch, tokens]``, or None if all do.

    Args:
        batch: The batch that the model ran on. Its ``decoder_attention_mask`` decides if it has
            decoder inputs, otherwise its ``attention_mask`` or ``pixel_attention_mask``.
        output: ``[batch, tokens, features]``. In any other shape, or if the mask does not fit, all
            tokens count.
    """
    if not isinstance(batch, Mapping):
        return None
    side = "decoder_" if "decoder_input_ids" in batch else ""
    mask = batch.get(f"{side}attention_mask", batch.get("pixel_attention_mask"))
    if not isinstance(mask, Tensor) or output.dim() != 3 or mask.shape != output.shape[:2]:
        return None
    return mask.bool().to(output.device)


def activation_mask(batch: Batch, states: Tensor, module: str) -> Tensor | None:
    """Return which tokens of an activation count: bool ``[batch, tokens]``, or None if all do.

    Padding does not count. The mask of the batch that has the activation's shape decides; that of
    the text does not decide about a tower for images. If encoder and decoder are equally long and
    not padded alike, their activations cannot be told apart, and all tokens count.

    Args:
        batch: The batch that the model runs on.
        states: The activation, ``[batch, tokens, ..., features]``, or ``[batch * tokens,
            features]``, for which the mask has one dimension too. All rows of a pooled one,
            ``[batch, features]``, count. Choices, ``[batch, choices, tokens]`` in a batch, are rows
            of their own in a model.
        module: Dotted path of the module that takes it or gives it.
    """
    if not isinstance(batch, Mapping):
        return None
    sides = ("pixel_",) if _OF_IMAGES.search(module) else ("", "decoder_", "pixel_")
    masks = [batch.get(f"{side}attention_mask") for side in sides]
    masks = [m.flatten(0, -2) if isinstance(m, Tensor) and m.dim() == 3 else m for m in masks]
    if len(masks) > 1 and masks[1] is None and isinstance(batch.get("decoder_input_ids"), Tensor):
        masks[1] = torch.ones_like(batch["decoder_input_ids"])
    fits = [m.bool() for m in masks if isinstance(m, Tensor) and _is_of(m, states)]
    if not fits or not all(torch.equal(fits[0], other) for other in fits[1:]):
        return None
    mask = fits[0] if states.dim() > 2 else fits[0].flatten()
    return mask.to(states.device)


def _is_of(mask: Tensor, states: Tensor) -> bool:
    """Return whether a mask ``[batch, tokens]`` has a place for every token of an activation."""
    if states.dim() > 2:
        return mask.shape == states.shape[:2]
    return mask.dim() == 2 and mask.numel() == len(states) > len(mask)
