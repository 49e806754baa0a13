"""How near one output is to another, summed over what is compared; one function for each kind."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from solpath.objective import Kind, divergence
from solpath.running.forward import at_least_float


def compare(output: Tensor, target: Tensor, mask: Tensor | None, *, kind: Kind) -> dict[str, float]:
    """Return sums of metrics, and under ``"count"`` what they are sums over.

    Args:
        output: Output of the smaller model, ``[batch, ..., features]``.
        target: Output of the dense model, of the same shape.
        mask: Tokens that count, bool ``[batch, tokens]``; None counts all.
        kind: What the outputs mean; for a regression see `relative_to_spread`.

    Returns:
        ``relative_error`` always. For classes, and summed over positions: ``cosine``, ``kl`` and
        ``agreement`` (equal argmax). For labels and spans, summed over samples: ``kl`` and
        ``agreement`` (the mean over labels, or over start and end, of equal decisions). For hidden
        states, summed over samples: ``cosine`` of the averages over tokens.
    """
    y, t = at_least_float(output), at_least_float(target)
    if kind == "classes":
        return _classes(y, t, mask)
    if kind == "hidden":
        return _hidden(y, t, mask)
    divergences = divergence(y, t, mask, kind=kind)
    if kind == "spans":
        if mask is not None:
            y, t = (value.masked_fill(~mask.unsqueeze(1), -math.inf) for value in (y, t))
        same = (y.argmax(-1) == t.argmax(-1)).float().mean(-1)
    else:
        same = _over_tokens(((y > 0) == (t > 0)).float().mean(-1), mask)
    error = _relative_error(output, target, mask if kind == "labels" else None)
    return {
        "kl": divergences.sum().item(),
        "agreement": same.sum().item(),
        "relative_error": error.sum().item(),
        "count": len(y),
    }


def relative_to_spread(values: Sequence[tuple[Tensor, Tensor]]) -> float:
    """Return the squared error of all outputs over the spread of all targets, 1 - R².

    The spread is the squared distance of the targets from their mean. Targets that are all equal
    are compared with their own square.

    Args:
        values: Outputs and targets of every batch, ``[batch, ..., features]``.
    """
    y, t = (
        torch.cat(
            [at_least_float(part).double().reshape(-1, part.shape[-1]).cpu() for part in column]
        )
        for column in zip(*values, strict=True)
    )
    error, spread = (y - t).square().sum(), (t - t.mean(0)).square().sum()
    square = t.square().sum()
    return float(error / (spread if spread > 1e-12 * square else square).clamp(min=_tiny(t)))


def _classes(y: Tensor, t: Tensor, mask: Tensor | None) -> dict[str, float]:
    """Sums over positions."""
    classes = y.shape[-1]
    y, t = y.reshape(-1, classes), t.reshape(-1, classes)
    if mask is not None:
        y, t = y[mask.flatten()], t[mask.flatten()]
    log_y, log_t = y.log_softmax(-1), t.log_softmax(-1)
    error = (y - t).square().sum(-1) / t.square().sum(-1).clamp(min=_tiny(t))
    return {
        "cosine": functional.cosine_similarity(y, t).sum().item(),
        "kl": (log_t.exp() * (log_t - log_y)).sum().item(),
        "agreement": float((y.argmax(-1) == t.argmax(-1)).sum().item()),
        "relative_error": error.sum().item(),
        "count": len(y),
    }


def _hidden(y: Tensor, t: Tensor, mask: Tensor | None) -> dict[str, float]:
    """Sums over samples."""
    batch, width = y.shape[0], y.shape[-1]
    y, t = y.reshape(batch, -1, width), t.reshape(batch, -1, width)
    weight = _weight(t, mask)
    tokens = weight.sum(dim=1).clamp(min=1)
    pooled_y, pooled_t = (y * weight).sum(dim=1) / tokens, (t * weight).sum(dim=1) / tokens
    return {
        "cosine": functional.cosine_similarity(pooled_y, pooled_t).sum().item(),
        "relative_error": _relative_error(y, t, mask).sum().item(),
        "count": batch,
    }


def _relative_error(y: Tensor, t: Tensor, mask: Tensor | None) -> Tensor:
    """The squared error of every sample over its squared target, ``[batch]``."""
    y, t = (at_least_float(value).reshape(len(value), -1, value.shape[-1]) for value in (y, t))
    weight = _weight(t, mask)
    error = ((y - t).square() * weight).sum(dim=(1, 2))
    return error / (t.square() * weight).sum(dim=(1, 2)).clamp(min=_tiny(t))


def _weight(t: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        mask = torch.ones(t.shape[:2], dtype=torch.bool, device=t.device)
    return mask.unsqueeze(-1).to(t.dtype)


def _over_tokens(values: Tensor, mask: Tensor | None) -> Tensor:
    """The mean over the tokens that count, ``[batch]``."""
    if values.dim() == 1:
        return values
    if mask is None:
        return values.flatten(1).mean(1)
    return (values * mask).sum(1) / mask.sum(1).clamp(min=1)


def _tiny(value: Tensor) -> float:
    return math.sqrt(torch.finfo(value.dtype).tiny)
