"""How far an output is from that of the dense model, and draws of the curvature there.

What is compared follows from what the output means (`Kind`):

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
from typing import Literal

import torch
from torch import Tensor

from solpath.running.forward import at_least_float

_TINY = 1e-30

Kind = Literal["classes", "labels", "spans", "regression", "hidden"]
"""What an output means, and so how far one is from another."""


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
        return token_mean((output - target).square().sum(-1) / spread, mask)
    if kind == "labels":
        return token_mean(_kl(_yes_no(output), _yes_no(target)).mean(-1), mask)
    if kind == "spans":
        return token_mean(_kl(_inside(output, mask), _inside(target, mask)), None)
    return token_mean(_kl(output, target), mask)


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
        return averaged(draw, mask)
    draw = draw * scale.view(-1, *[1] * (draw.dim() - 1))
    return draw if mask is None else draw * mask.unsqueeze(-1)


def averaged(draw: Tensor, mask: Tensor | None) -> Tensor:
    """Turn independent draws for the tokens into one for their mean, of the same shape.

    Args:
        draw: A draw for every token, ``[batch, ..., features]``.
        mask: Tokens that count, bool ``[batch, tokens]``; None counts all. The draw is 0 at others.
    """
    tokens = math.prod(draw.shape[1:-1])
    counts = torch.full((len(draw),), tokens) if mask is None else mask.sum(1).clamp(min=1)
    draw = draw * counts.to(draw).rsqrt().view(-1, *[1] * (draw.dim() - 1))
    return draw if mask is None else draw * mask.unsqueeze(-1)


def token_mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """Average over the tokens that count, ``[batch, ...] -> [batch]``.

    Args:
        values: A value for every token, or for every sample, which stays as it is.
        mask: Tokens that count, bool ``[batch, tokens]``; None counts all.
    """
    if values.dim() == 1:
        return values
    if mask is None:
        return values.flatten(1).mean(1)
    return (values * mask).sum(1) / mask.sum(1).clamp(min=1)


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


def _total(values: Tensor) -> Tensor:
    """Sum all but the first dimension."""
    return values.flatten(1).sum(1) if values.dim() > 1 else values
