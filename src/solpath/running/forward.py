"""Run a model on a batch, and find in its output what is compared."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from solpath.errors import BatchError

Batch = Any
"""A mapping of keyword arguments for the model, or its first argument as a tensor."""


def device_of(model: nn.Module) -> torch.device:
    """Return the device of a model's first parameter, or the CPU for a model without parameters."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def run(model: nn.Module, batch: Batch, *, labels: bool) -> Any:
    """Call a model on a batch.

    A model that can cache keys and values is told not to, unless the batch says otherwise.

    Args:
        model: The model.
        batch: The batch.
        labels: Whether the model gets the ``labels`` of the batch, if there are any.

    Returns:
        What the model returns.
    """
    if not isinstance(batch, Mapping):
        return model(batch)
    inputs = {name: value for name, value in batch.items() if labels or name != "labels"}
    if "use_cache" in inspect.signature(model.forward).parameters:
        inputs.setdefault("use_cache", False)
    return model(**inputs)


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

    That is the logits; without them the embeddings of image and text, end to end if there are both;
    without these the last hidden state.

    Raises:
        BatchError: The output has none of these.
    """
    if isinstance(outputs, Tensor):
        return outputs
    names = (("logits",), ("image_embeds", "text_embeds"), ("last_hidden_state",))
    for group in names:
        found = [getattr(outputs, name, None) for name in group]
        tensors = [value for value in found if isinstance(value, Tensor)]
        if tensors:
            return tensors[0] if len(tensors) == 1 else torch.cat(tensors, -1)
    raise BatchError(
        f"{type(outputs).__name__} has no logits, embeddings or last_hidden_state; "
        "pass your own loss."
    )


def has_logits(outputs: Any) -> bool:
    """Return whether `output_tensor` gives logits for these outputs."""
    return isinstance(getattr(outputs, "logits", None), Tensor)


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
    return mask.bool()


def activation_mask(batch: Batch, states: Tensor) -> Tensor | None:
    """Return which tokens of an activation count: bool ``[batch, tokens]``, or None if all do.

    Padding does not count. The mask of the batch that has the activation's shape decides. If
    encoder and decoder, or text and patches, are equally long and not padded alike, their
    activations cannot be told apart, and all tokens count.

    Args:
        batch: The batch that the model runs on.
        states: The activation, ``[batch, tokens, ..., features]``. All rows of a pooled one,
            ``[batch, features]``, count.
    """
    if not isinstance(batch, Mapping) or states.dim() < 3:
        return None
    masks = [batch.get(f"{side}attention_mask") for side in ("", "decoder_", "pixel_")]
    if masks[1] is None and isinstance(batch.get("decoder_input_ids"), Tensor):
        masks[1] = torch.ones_like(batch["decoder_input_ids"])
    fits = [m.bool() for m in masks if isinstance(m, Tensor) and m.shape == states.shape[:2]]
    return fits[0] if fits and all(torch.equal(fits[0], other) for other in fits[1:]) else None
