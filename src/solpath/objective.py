"""What a search minimises: the distance of a model's output to the dense model's own output."""

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from solpath.errors import BatchError

_TARGET_CACHE_BYTES = 256 * 2**20

Batch = Any
"""A mapping of keyword arguments for the model, or its first argument as a tensor."""

Loss = Callable[[Any, Batch], Tensor]
"""``loss(outputs, batch) -> scalar``: a mean over the samples of the batch."""


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


class Target(NamedTuple):
    """What the dense model gives for a batch, see `output_tensor`, and whether it is logits."""

    output: Tensor
    logits: bool


def target_of(dense: nn.Module, batch: Batch) -> Target:
    """The target of `divergence_from`, without gradients."""
    with torch.no_grad():
        outputs = run(dense, batch, labels=False)
    return Target(output_tensor(outputs).clone(), has_logits(outputs))


class Targets:
    """Targets by step, remembered, up to a limit, while batches of known number repeat."""

    def __init__(self, length: int | None) -> None:
        self._length = length
        self._known: dict[int, Target] = {}
        self._bytes = 0

    def get(self, step: int, compute: Callable[[], Target]) -> Target:
        """The target of batch `step`, by `compute` if it is not remembered."""
        if not self._length:
            return compute()
        key = step % self._length
        if key in self._known:
            return self._known[key]
        target = compute()
        if self._bytes + target.output.nbytes <= _TARGET_CACHE_BYTES:
            self._bytes += target.output.nbytes
            self._known[key] = target
        return target


def divergence_from(target: Target, outputs: Any, batch: Batch) -> Tensor:
    """`divergence` of a model's outputs for a batch from the dense one's. ``[batch]``."""
    output = output_tensor(outputs)
    return divergence(output, target.output, token_mask(batch, output), logits=target.logits)


def token_mask(batch: Batch, output: Tensor) -> Tensor | None:
    """Which tokens count. bool ``[batch, tokens]`` from the batch, or None for all.

    ``decoder_attention_mask`` where there is a decoder input, else ``attention_mask``.
    """
    if not isinstance(batch, Mapping):
        return None
    side = "decoder_" if "decoder_input_ids" in batch else ""
    mask = batch.get(f"{side}attention_mask")
    if not isinstance(mask, Tensor) or output.dim() != 3 or mask.shape != output.shape[:2]:
        return None
    return mask.bool()


def counted(batch: Batch, states: Tensor) -> Tensor | None:
    """Which tokens of an activation are not padding. bool ``[batch, tokens]``, or None for all.

    By the mask of its shape. Where encoder and decoder are equally long and not padded alike, their
    activations cannot be told apart, and all tokens count.

    Args:
        states: ``[batch, tokens, ..., features]``; of ``[batch, features]``, pooled, all count.
    """
    if not isinstance(batch, Mapping) or states.dim() < 3:
        return None
    masks = [batch.get("attention_mask"), batch.get("decoder_attention_mask")]
    if masks[1] is None and isinstance(batch.get("decoder_input_ids"), Tensor):
        masks[1] = torch.ones_like(batch["decoder_input_ids"])
    fits = [m.bool() for m in masks if isinstance(m, Tensor) and m.shape == states.shape[:2]]
    return fits[0] if fits and all(torch.equal(fits[0], other) for other in fits[1:]) else None


def divergence(output: Tensor, target: Tensor, mask: Tensor | None, *, logits: bool) -> Tensor:
    """Distance of every sample to its target; exactly 0, with gradient 0, where they are equal.

    Logits: KL(target || output) in nats, averaged over tokens. Hidden states: squared error over
    tokens and features, relative to the squared norm of the target.

    Args:
        output: ``[batch, ..., features]``.
        target: same shape, the dense model's output.
        mask: bool ``[batch, tokens]`` or None.

    Returns:
        ``[batch]``.
    """
    output, target = at_least_float(output), at_least_float(target)
    if logits:
        goal = target.log_softmax(-1)
        return _token_mean((goal.exp() * (goal - output.log_softmax(-1))).sum(-1), mask)
    error, norm = (output - target).square().sum(-1), target.square().sum(-1)
    if mask is not None:
        error, norm = error * mask, norm * mask
    return _total(error) / _total(norm)


def curvature_sketch(target: Tensor, mask: Tensor | None, noise: Tensor, *, logits: bool) -> Tensor:
    """Turn white noise into a draw whose covariance is the curvature of `divergence` at its zero.

    Squared error: ``2 I / norm``. KL: ``(diag(p) - p pᵀ) / tokens``.

    Args:
        target: ``[batch, ..., features]``, dense output.
        mask: bool ``[batch, tokens]`` or None.
        noise: same shape as `target`, standard normal.
    """
    target = at_least_float(target)
    if logits:
        probability = target.softmax(-1)
        root = noise * probability.sqrt()
        draw = root - probability * root.sum(-1, keepdim=True)
        tokens = math.prod(target.shape[1:-1])
        counted = torch.full((len(target),), tokens) if mask is None else mask.sum(1)
        scale = counted.to(draw).rsqrt()
    else:
        draw = noise
        norm = target.square().sum(-1)
        scale = (2 / _total(norm if mask is None else norm * mask)).sqrt()
    draw = draw * scale.view(-1, *[1] * (draw.dim() - 1))
    return draw if mask is None else draw * mask.unsqueeze(-1)


def at_least_float(value: Tensor) -> Tensor:
    """Half precision to float32; float32 and float64 as they are."""
    return value if value.dtype == torch.float64 else value.float()


def _total(values: Tensor) -> Tensor:
    return values.flatten(1).sum(1) if values.dim() > 1 else values


def _token_mean(values: Tensor, mask: Tensor | None) -> Tensor:
    if values.dim() == 1:
        return values
    if mask is None:
        return values.flatten(1).mean(1)
    return (values * mask).sum(1) / mask.sum(1)
