"""How near one output is to another, summed over what is compared; one function for each kind."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from solpath.divergence import Kind, divergence
from solpath.running.forward import at_least_float


def figure(value: float) -> str:
    """Return a metric for people: four decimals, or two digits where those would say too little.

    Args:
        value: The metric.

    Example:
        >>> figure(0.98765), figure(0.000012), figure(0.0)
        ('0.9877', '1.2e-05', '0.0000')
    """
    return f"{value:.1e}" if 0 < abs(value) < 0.001 else f"{value:.4f}"


def compare(
    output: Tensor, target: Tensor, mask: Tensor | None, *, kind: Kind
) -> dict[str, Tensor]:
    """Return sums of metrics for every sample, and under ``"count"`` what they are sums over.

    Args:
        output: Output of the smaller model, ``[batch, ..., features]``.
        target: Output of the dense model, of the same shape.
        mask: Tokens that count, bool ``[batch, tokens]``; None counts all.
        kind: What the outputs mean; for a regression see `spread_errors`.

    Returns:
        Name to float64 ``[batch]``, on the CPU. ``relative_error`` always. For classes, and summed
        over the positions of a sample: ``cosine``, ``kl`` and ``agreement`` (equal argmax). For
        labels and spans, one value a sample: ``kl`` and ``agreement`` (the mean over labels, or
        over start and end, of equal decisions). For hidden states, one value a sample: ``cosine``
        of the averages over tokens.
    """
    y, t = at_least_float(output), at_least_float(target)
    if kind == "classes":
        return _classes(y, t, mask)
    if kind == "hidden":
        return _of_samples(_hidden(y, t, mask))
    divergences = divergence(y, t, mask, kind=kind)
    if kind == "spans" and mask is not None:  # [batch, 2, tokens]
        y, t = (value.masked_fill(~mask.unsqueeze(1), 0) for value in (y, t))
    error = _relative_error(y, t, mask if kind == "labels" else None)
    if kind == "labels":
        same = _over_tokens(((y > 0) == (t > 0)).float().mean(-1), mask)
    else:
        if mask is not None:
            y, t = (value.masked_fill(~mask.unsqueeze(1), -math.inf) for value in (y, t))
        same = (y.argmax(-1) == t.argmax(-1)).float().mean(-1)
    return _of_samples({"kl": divergences, "agreement": same, "relative_error": error})


def spread_errors(
    values: Sequence[tuple[Tensor, Tensor, Tensor | None]],
) -> tuple[Tensor, Tensor]:
    """Return the squared error of every sample, and its share of the spread of all targets.

    The sum of the first over the sum of the second is 1 - R². The spread is the squared distance of
    the targets from their mean. Targets that are all equal are compared with their own square.

    Args:
        values: Outputs and targets of every batch, ``[batch, ..., features]``, and the tokens that
            count, bool ``[batch, tokens]``, or None if all do.

    Returns:
        Two float64 tensors ``[samples]``, on the CPU.
    """
    triples = [(*map(_in_rows, (y, t)), _weight(_in_rows(t), mask).cpu()) for y, t, mask in values]
    rows = torch.cat([t[weight[..., 0] > 0] for _, t, weight in triples])
    mean = rows.mean(0)
    if (rows - mean).square().sum() <= 1e-12 * rows.square().sum():
        mean = torch.zeros_like(mean)
    errors = torch.cat([((y - t).square() * weight).sum((1, 2)) for y, t, weight in triples])
    spread = torch.cat([((t - mean).square() * weight).sum((1, 2)) for _, t, weight in triples])
    return errors, spread.clamp(min=_tiny(rows) / len(spread))


def _in_rows(value: Tensor) -> Tensor:
    """An output as float64 ``[batch, rows, features]`` on the CPU."""
    return at_least_float(value).double().cpu().reshape(len(value), -1, value.shape[-1])


def _classes(y: Tensor, t: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
    """Sums over the positions of every sample."""
    batch, classes = len(y), y.shape[-1]
    y, t = y.reshape(-1, classes), t.reshape(-1, classes)
    rows = torch.arange(batch).repeat_interleave(len(y) // max(batch, 1))
    if mask is not None:
        y, t, rows = y[mask.flatten()], t[mask.flatten()], rows[mask.flatten().cpu()]
    log_y, log_t = y.log_softmax(-1), t.log_softmax(-1)
    error = (y - t).square().sum(-1) / t.square().sum(-1).clamp(min=_tiny(t))
    found = {
        "cosine": functional.cosine_similarity(y, t),
        "kl": (log_t.exp() * (log_t - log_y)).sum(-1),
        "agreement": y.argmax(-1) == t.argmax(-1),
        "relative_error": error,
        "count": torch.ones(len(y)),
    }
    none = torch.zeros(batch, dtype=torch.float64)
    return {name: none.index_add(0, rows, value.double().cpu()) for name, value in found.items()}


def _hidden(y: Tensor, t: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
    """One value a sample."""
    batch, width = y.shape[0], y.shape[-1]
    y, t = y.reshape(batch, -1, width), t.reshape(batch, -1, width)
    weight = _weight(t, mask)
    tokens = weight.sum(dim=1).clamp(min=1)
    pooled_y, pooled_t = (y * weight).sum(dim=1) / tokens, (t * weight).sum(dim=1) / tokens
    return {
        "cosine": functional.cosine_similarity(pooled_y, pooled_t),
        "relative_error": _relative_error(y, t, mask),
    }


def _of_samples(values: dict[str, Tensor]) -> dict[str, Tensor]:
    found = {name: value.double().cpu() for name, value in values.items()}
    return {**found, "count": torch.ones_like(found["relative_error"])}


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
