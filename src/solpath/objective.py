"""What a search minimises: the divergence of a model's output from the dense model's output."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from solpath.running.forward import Batch, has_logits, output_mask, output_tensor, run

_TARGET_CACHE_BYTES = 256 * 2**20

Loss = Callable[[Any, Batch], Tensor]
"""A function ``loss(outputs, batch)`` that returns a scalar: a mean over the batch's samples."""


class Target(NamedTuple):
    """What the dense model gives for a batch.

    Attributes:
        output: The output that is compared (see `output_tensor`), ``[batch, ..., features]``.
        logits: Whether that output is logits.
    """

    output: Tensor
    logits: bool


def target_of(dense: nn.Module, batch: Batch) -> Target:
    """Return the dense model's output for a batch, computed without gradients.

    Args:
        dense: The dense model.
        batch: What it runs on. Labels are left out.

    Raises:
        BatchError: The output has nothing to compare (see `output_tensor`).
    """
    with torch.no_grad():
        outputs = run(dense, batch, labels=False)
    return Target(output_tensor(outputs).clone(), has_logits(outputs))


class Targets:
    """A memory for the targets of batches that come again, of at most 256 MiB.

    Args:
        length: Number of batches before they repeat. None, where it is not known, remembers none.
    """

    def __init__(self, length: int | None) -> None:
        self._length = length
        self._known: dict[int, Target] = {}
        self._bytes = 0

    def get(self, step: int, compute: Callable[[], Target]) -> Target:
        """Return the target of batch `step`, computed unless it is remembered.

        Args:
            step: Batch number, counted on over repetitions.
            compute: Called to compute the target.
        """
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
    """Return the `divergence` of a model's outputs from the dense model's, ``[batch]``.

    Args:
        target: What the dense model gave for the batch.
        outputs: What the model gave for it.
        batch: The batch, whose attention mask says which tokens count.

    Raises:
        BatchError: The outputs have nothing to compare (see `output_tensor`).
    """
    output = output_tensor(outputs)
    return divergence(output, target.output, output_mask(batch, output), logits=target.logits)


def divergence(output: Tensor, target: Tensor, mask: Tensor | None, *, logits: bool) -> Tensor:
    """Return how far every sample is from its target; docs/method.md, "Objective".

    For logits, this is KL(target || output) in nats, averaged over tokens. For hidden states, it is
    the squared error over tokens and features, divided by the squared norm of the target. Where
    output and target are equal, the divergence and its gradient are exactly 0.

    Args:
        output: Output of the model, ``[batch, ..., features]``.
        target: Output of the dense model, of the same shape.
        mask: Tokens that count, bool ``[batch, tokens]``; None counts all.
        logits: Whether the outputs are logits.

    Returns:
        float32 ``[batch]``, or float64 where an input is. A sample without any token that counts
        gives NaN.

    Example:
        >>> output = torch.tensor([[0.0, 2.0], [0.0, 1.0]])
        >>> target = torch.tensor([[0.0, 1.0], [0.0, 1.0]])
        >>> divergence(output, target, None, logits=False).tolist()
        [1.0, 0.0]
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
    """Turn white noise into a draw whose covariance is the curvature of `divergence` at 0.

    The curvature in the output of one sample is ``2 I / ‖target‖²`` for hidden states, and
    ``(diag(p) - p pᵀ) / tokens`` for the logits of every token, with their probabilities p.

    Args:
        target: Output of the dense model, ``[batch, ..., features]``.
        mask: Tokens that count, bool ``[batch, tokens]``; None counts all.
        noise: Independent standard normal numbers, of the shape of `target`.
        logits: Whether the target is logits.

    Returns:
        The draw, of the shape of `target`. It is 0 at tokens that do not count.
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
    """Return half precision as float32, and float32 and float64 unchanged.

    Args:
        value: A tensor of any floating dtype.
    """
    return value if value.dtype == torch.float64 else value.float()


def _total(values: Tensor) -> Tensor:
    """Sum all but the first dimension."""
    return values.flatten(1).sum(1) if values.dim() > 1 else values


def _token_mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """Average over the tokens that count."""
    if values.dim() == 1:
        return values
    if mask is None:
        return values.flatten(1).mean(1)
    return (values * mask).sum(1) / mask.sum(1)
