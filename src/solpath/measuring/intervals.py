"""Confidence intervals of means over samples, which may weigh more or less than others.

A metric over tokens is a ratio: the sum over all tokens divided by their number. Tokens of one text
are alike, so it is texts that are drawn at random, and what varies is a sum and a count per text.
The intervals come from the usual linearisation of a ratio (Cochran, Sampling Techniques, 1977,
section 6.4), with Student's t, and for shares from Wilson's interval at the effective number of
draws (Korn and Graubard, Survey Methodology 24, 1998, give that number). They hold for some tens of
samples and more that were drawn independently.
"""

import math

import torch
from torch import Tensor

LEVEL = 0.95
"""The confidence of every interval."""


def mean_interval(sums: Tensor, counts: Tensor) -> tuple[float, float] | None:
    """Return a confidence interval of ``sum(sums) / sum(counts)`` over what samples may be drawn.

    Args:
        sums: The sum of every sample, ``[samples]``.
        counts: What each is a sum over, positive, of the same shape.

    Returns:
        Its lower and upper end; None of fewer than two samples.

    Example:
        >>> low, high = mean_interval(torch.tensor([1.0, 2.0, 3.0]), torch.ones(3))
        >>> round(low, 2), round(high, 2)  # 2 ± 4.30 / sqrt(3)
        (-0.48, 4.48)
    """
    from scipy.stats import t

    if len(sums) < 2:
        return None
    mean, error = _mean_and_error(sums, counts)
    half = float(t.ppf((1 + LEVEL) / 2, len(sums) - 1)) * error
    return mean - half, mean + half


def share_interval(sums: Tensor, counts: Tensor) -> tuple[float, float] | None:
    """Return such an interval of a share, whose ends stay within 0 and 1.

    Args:
        sums: How many of a sample there are, ``[samples]``, each at most its count.
        counts: Of how many, positive, of the same shape.

    Returns:
        Its lower and upper end. Also where all samples agree, which says little of few samples: 10
        of 10 is 0.72 to 1.

    Example:
        >>> low, high = share_interval(torch.ones(10), torch.ones(10))
        >>> round(low, 2), round(high, 2)
        (0.72, 1.0)
    """
    from scipy.stats import norm

    if len(sums) < 2:
        return None
    mean, error = _mean_and_error(sums, counts)
    spread = mean * (1 - mean)
    draws = min(spread / error**2, float(counts.sum())) if error > 0 and spread > 0 else len(sums)
    square = float(norm.ppf((1 + LEVEL) / 2)) ** 2
    middle = (mean + square / (2 * draws)) / (1 + square / draws)
    half = math.sqrt(square * (spread / draws + square / (4 * draws**2))) / (1 + square / draws)
    return max(0.0, middle - half), min(1.0, middle + half)


def _mean_and_error(sums: Tensor, counts: Tensor) -> tuple[float, float]:
    """Return a ratio of totals and its standard error."""
    total = counts.sum()
    mean = sums.sum() / total
    square = (sums - mean * counts).square().sum() * len(sums) / (len(sums) - 1)
    return float(mean), float(torch.sqrt(square) / total)
