"""What a search minimises: the distance of a model's output to the dense model's own output."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from solpath.running.forward import Batch, has_logits, output_mask, output_tensor, run

_TARGET_CACHE_BYTES = 256 * 2**20

Loss = Callable[[Any, Batch], Tensor]
"""``loss(outputs, batch) -> scalar``: a mean over the samples of the batch."""


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
    return divergence(output, target.output, output_mask(batch, output), logits=target.logits)


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
        counts = torch.full((len(target),), tokens) if mask is None else mask.sum(1)
        scale = counts.to(draw).rsqrt()
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
