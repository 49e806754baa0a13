"""What a search minimises: the divergence of a model's output from the dense model's output.

What is compared follows from what the model says of itself (`kind_of`):

| kind | models | divergence of a sample |
|---|---|---|
| ``classes`` | language models, classifiers, multiple choice, next sentence | KL(target, output) |
| ``labels`` | multi-label classifiers, ELECTRA's discriminator | mean KL of every yes or no |
| ``spans`` | question answering | mean KL over positions, of start and end |
| ``regression`` | one output or ``problem_type="regression"`` | squared error / spread of targets |
| ``hidden`` | no head, embeddings, images, bare tensors | squared error / squared target |

Each is 0, with gradient 0, where output and target are equal.
"""

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from solpath.running.forward import (
    Batch,
    attended,
    has_logits,
    has_spans,
    is_per_token,
    output_mask,
    output_tensor,
    run,
)

_TARGET_CACHE_BYTES = 256 * 2**20
_TINY = 1e-30

Loss = Callable[[Any, Batch], Tensor]
"""A function ``loss(outputs, batch)`` that returns a scalar: a mean over the batch's samples."""

Kind = Literal["classes", "labels", "spans", "regression", "hidden"]
"""What an output means, and so how far one is from another."""


def kind_of(model: nn.Module, outputs: Any) -> Kind:
    """Return what the outputs of a model mean, from its configuration and their class.

    Args:
        model: Its ``config.problem_type`` decides about the logits of a classifier.
        outputs: What the model returned.

    Raises:
        BatchError: The outputs have nothing, or too much, to compare (see `output_tensor`).

    Example:
        >>> kind_of(model, model(**batch))
        'classes'
    """
    output = output_tensor(outputs)
    if has_spans(outputs):
        return "spans"
    if not has_logits(outputs):
        return "hidden"
    if is_per_token(outputs):
        return "labels"
    config = getattr(model, "config", None)
    problem = getattr(config, "problem_type", None) if output.dim() == 2 else None
    if output.shape[-1] == 1 or problem == "regression":
        return "regression"
    if problem == "multi_label_classification":
        return "labels"
    return "classes"


class Objective:
    """How far the outputs of a smaller model are from those of its dense model.

    The first target says what is compared. Only a regression looks at another batch, the first:
    its spread is the mean squared distance of the dense outputs of that batch from their mean, or
    their mean square if they are all equal.

    Args:
        first: Returns the whole first batch, on the device of the models. Every process must
            return the same.
    """

    def __init__(self, first: Callable[[], Batch]) -> None:
        self._first = first
        self._kind: Kind | None = None
        self._spread = 1.0

    def target(self, dense: nn.Module, batch: Batch) -> Tensor:
        """Return the dense model's output for a batch, without gradients; labels are left out."""
        with torch.no_grad():
            outputs = run(dense, batch, labels=False)
            if self._kind is None:
                self._kind = kind_of(dense, outputs)
                if self._kind == "regression":
                    first = output_tensor(run(dense, self._first(), labels=False))
                    self._spread = _spread(first.double().flatten(0, -2))
            return output_tensor(outputs).clone()

    def divergence(self, target: Tensor, outputs: Any, batch: Batch) -> Tensor:
        """Return the `divergence` of every sample from the dense model's output, ``[batch]``.

        Args:
            target: From `target`, for the same batch.
            outputs: What the smaller model returned.
            batch: The batch, whose mask says which tokens count.
        """
        output = output_tensor(outputs)
        mask = self._mask(batch, output)
        return divergence(output, target, mask, kind=self._known, spread=self._spread)

    def sketch(self, target: Tensor, batch: Batch, noise: Tensor) -> Tensor:
        """Return the `curvature_sketch` for a batch, of the shape of its output."""
        mask = self._mask(batch, target)
        return curvature_sketch(target, mask, noise, kind=self._known, spread=self._spread)

    def _mask(self, batch: Batch, output: Tensor) -> Tensor | None:
        return attended(batch, output) if self._known == "spans" else output_mask(batch, output)

    @property
    def _known(self) -> Kind:
        assert self._kind is not None, "take a target first"
        return self._kind


def _spread(values: Tensor) -> float:
    """The mean squared distance of rows from their mean; of rows that are all equal, from 0."""
    error = float((values - values.mean(0)).square().sum(-1).mean())
    square = float(values.square().sum(-1).mean())
    return (error if error > 1e-12 * square else square) or 1.0


class Targets:
    """A memory for the targets of batches that come again, of at most 256 MiB."""

    def __init__(self) -> None:
        self._known: dict[int, Tensor] = {}
        self._bytes = 0

    def get(self, index: int | None, compute: Callable[[], Tensor]) -> Tensor:
        """Return the target of a batch, computed unless it is remembered.

        Args:
            index: Number of the batch among those that repeat. None, where it is not known,
                remembers nothing.
            compute: Called to compute the target.
        """
        if index is None:
            return compute()
        if index in self._known:
            return self._known[index]
        target = compute()
        if self._bytes + target.nbytes <= _TARGET_CACHE_BYTES:
            self._bytes += target.nbytes
            self._known[index] = target
        return target


def divergence(
    output: Tensor, target: Tensor, mask: Tensor | None, *, kind: Kind, spread: float = 1.0
) -> Tensor:
    """Return how far every sample is from its target; docs/method.md, "Objective".

    Where output and target are equal, the divergence and its gradient are 0.

    Args:
        output: Output of the model, ``[batch, ..., features]``.
        target: Output of the dense model, of the same shape.
        mask: Tokens that count, bool ``[batch, tokens]``; None counts all.
        kind: What the outputs mean; the divergences are in the table of this module, those of
            logits in nats.
        spread: For a regression, what the squared error is divided by.

    Returns:
        float32 ``[batch]``, or float64 where an input is. A sample without any token that counts
        is 0.

    Example:
        >>> output = torch.tensor([[0.0, 2.0], [0.0, 1.0]])
        >>> target = torch.tensor([[0.0, 1.0], [0.0, 1.0]])
        >>> divergence(output, target, None, kind="hidden").tolist()
        [1.0, 0.0]
    """
    output, target = at_least_float(output), at_least_float(target)
    if kind == "hidden":
        error, norm = (output - target).square().sum(-1), target.square().sum(-1)
        if mask is not None:
            error, norm = error * mask, norm * mask
        total = _total(norm)
        return torch.where(total > 0, _total(error) / total.clamp(min=_TINY), _total(error))
    if kind == "regression":
        return _token_mean((output - target).square().sum(-1) / spread, mask)
    if kind == "labels":
        return _token_mean(_kl(_yes_no(output), _yes_no(target)).mean(-1), mask)
    if kind == "spans":
        return _token_mean(_kl(_inside(output, mask), _inside(target, mask)), None)
    return _token_mean(_kl(output, target), mask)


def curvature_sketch(
    target: Tensor, mask: Tensor | None, noise: Tensor, *, kind: Kind, spread: float = 1.0
) -> Tensor:
    """Turn white noise into a draw whose covariance is the curvature of `divergence` at 0.

    With the probabilities p of the target, the curvature is ``diag(p) - p pᵀ`` for classes and
    spans, ``diag(p (1 - p))`` for labels, ``2 I / spread`` for a regression and
    ``2 I / ‖target‖²`` for hidden states, each divided by the number of what it is averaged over.

    Args:
        target: Output of the dense model, ``[batch, ..., features]``.
        mask: Tokens that count, bool ``[batch, tokens]``; None counts all.
        noise: Independent standard normal numbers, of the shape of `target`.
        kind: What the outputs mean.
        spread: For a regression, what the squared error is divided by.

    Returns:
        The draw, of the shape of `target`. It is 0 at tokens that do not count.
    """
    target = at_least_float(target)
    if kind == "hidden":
        norm = target.square().sum(-1)
        total = _total(norm if mask is None else norm * mask)
        scale = torch.where(total > 0, 2 / total.clamp(min=_TINY), 2.0).sqrt()
        draw = noise
    else:
        if kind == "regression":
            draw = noise * math.sqrt(2 / spread)
        elif kind == "labels":
            probability = target.sigmoid()
            draw = noise * (probability * (1 - probability) / target.shape[-1]).sqrt()
        else:
            logits = _inside(target, mask) if kind == "spans" else target
            mask = None if kind == "spans" else mask
            probability = logits.softmax(-1)
            root = noise * probability.sqrt()
            draw = root - probability * root.sum(-1, keepdim=True)
        tokens = math.prod(target.shape[1:-1])
        counts = torch.full((len(target),), tokens) if mask is None else mask.sum(1).clamp(min=1)
        scale = counts.to(draw).rsqrt()
    draw = draw * scale.view(-1, *[1] * (draw.dim() - 1))
    return draw if mask is None else draw * mask.unsqueeze(-1)


def _kl(output: Tensor, target: Tensor) -> Tensor:
    """KL(target, output) of the logits in the last dimension, in nats."""
    goal = target.log_softmax(-1)
    return (goal.exp() * (goal - output.log_softmax(-1))).sum(-1)


def _yes_no(logit: Tensor) -> Tensor:
    """The logits of yes and of no, in a new last dimension."""
    return torch.stack([logit, torch.zeros_like(logit)], -1)


def _inside(logits: Tensor, mask: Tensor | None) -> Tensor:
    """Logits over positions ``[batch, spans, tokens]`` with those of padding out of reach."""
    return logits if mask is None else logits.masked_fill(~mask.unsqueeze(1), -1e4)


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
    return (values * mask).sum(1) / mask.sum(1).clamp(min=1)
