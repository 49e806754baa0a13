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
    """The device of a model's first parameter; the CPU for a model without parameters."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def run(model: nn.Module, batch: Batch, *, labels: bool) -> Any:
    """Call `model` on `batch`; without `labels`, a ``labels`` entry is left out."""
    if not isinstance(batch, Mapping):
        return model(batch)
    inputs = {name: value for name, value in batch.items() if labels or name != "labels"}
    if "use_cache" in inspect.signature(model.forward).parameters:
        inputs.setdefault("use_cache", False)
    return model(**inputs)


def forward(model: nn.Module, batch: Batch) -> Tensor:
    """The output that is compared, see `output_tensor`.

    Returns:
        ``[batch, classes]``, ``[batch, tokens, classes]`` or ``[batch, tokens, features]``.
    """
    return output_tensor(run(model, batch, labels=False))


def output_tensor(outputs: Any) -> Tensor:
    """What is compared of a transformers output; a bare tensor is itself.

    Logits; else the embeddings of image and text, end to end where there are both; else the last
    hidden state.
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
    """Whether `output_tensor` gives logits."""
    return isinstance(getattr(outputs, "logits", None), Tensor)


def output_mask(batch: Batch, output: Tensor) -> Tensor | None:
    """Which tokens of an output count. bool ``[batch, tokens]`` from the batch, or None for all.

    ``decoder_attention_mask`` where there is a decoder input, else ``attention_mask``.
    """
    if not isinstance(batch, Mapping):
        return None
    side = "decoder_" if "decoder_input_ids" in batch else ""
    mask = batch.get(f"{side}attention_mask")
    if not isinstance(mask, Tensor) or output.dim() != 3 or mask.shape != output.shape[:2]:
        return None
    return mask.bool()


def activation_mask(batch: Batch, states: Tensor) -> Tensor | None:
    """Which tokens of an activation are not padding. bool ``[batch, tokens]``, or None for all.

    The mask of the batch that has the activation's shape decides. Where encoder and decoder are
    equally long and not padded alike, their activations cannot be told apart, and all tokens count.

    Args:
        batch: what the model runs on.
        states: ``[batch, tokens, ..., features]``; of ``[batch, features]``, pooled, all count.
    """
    if not isinstance(batch, Mapping) or states.dim() < 3:
        return None
    masks = [batch.get("attention_mask"), batch.get("decoder_attention_mask")]
    if masks[1] is None and isinstance(batch.get("decoder_input_ids"), Tensor):
        masks[1] = torch.ones_like(batch["decoder_input_ids"])
    fits = [m.bool() for m in masks if isinstance(m, Tensor) and m.shape == states.shape[:2]]
    return fits[0] if fits and all(torch.equal(fits[0], other) for other in fits[1:]) else None
