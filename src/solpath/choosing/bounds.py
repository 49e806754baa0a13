"""Upper confidence bounds of a mean that hold at every sample size.

| samples | bound |
|---|---|
| -1, 0 or 1 | `paired_upper`, exact |
| in [0, 1] | `mean_upper`, by betting |

Both ask that the samples are independent draws of one distribution, and of nothing else.
"""

import math

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

_POINTS = 128  # values of the nuisance parameter
_TAIL = 1e-9  # probability that is cut off at either end of a sum, and added to the result
_NOTHING = 1e-13  # a probability that is not looked into
_HALVINGS = 24
_BOLDEST = 0.75  # of what can be bet without ever losing all of it


def paired_upper(worse: int, better: int, samples: int, delta: float) -> float:
    """Return an upper bound of the expectation of pairs that are worse (1), equal or better (-1).

    With p the probability of worse and q that of better, the bound is that of p - q. The outcomes
    (worse, better) are put in the order of an approximate upper bound. The one returned is the
    least d such that at p - q = d and at every q the outcomes up to the one that was seen are
    together as rare as `delta`; q goes through an interval that misses it with a probability of
    ``delta / 20``, which is taken off first. Between the points of q that are looked at, the
    probability is bounded: it falls with p and rises with q.

    The smallest bound in a given order is that of Buehler, "Confidence intervals for the product of
    two binomial parameters", JASA 1957; for paired proportions see Lloyd & Moldovan, "Exact
    one-sided confidence limits for the difference between two correlated proportions", Statistics
    in Medicine 2007. The interval for q is the idea of Berger & Boos, "P values maximized over a
    confidence set for the nuisance parameter", JASA 1994.

    Args:
        worse: Number of samples that are worse.
        better: Number of samples that are better.
        samples: Number of samples, at least 1.
        delta: Probability with which the bound may be too low, in (0, 1).

    Returns:
        The bound, in [-1, 1].

    Example:
        >>> paired_upper(0, 0, 300, 0.05) < 0.011, paired_upper(30, 20, 1000, 0.05) > 0.02
        (True, True)
    """
    from scipy.optimize import brentq
    from scipy.special import betainc, betaincinv, gammaln

    left_out = delta / 20
    least = float(betaincinv(better, samples - better + 1, left_out / 2)) if better else 0.0
    most_q = 1.0
    if better < samples:
        most_q = float(betaincinv(better + 1, samples - better, 1 - left_out / 2))
    step = (most_q - least) / _POINTS
    q = np.minimum(least + step * np.arange(1, _POINTS + 1), 1 - 1e-15)[:, None]
    first, last = _likely(samples, least, most_q)
    b = np.arange(first, last + 1)
    most = _most_worse(b, worse, better, samples, delta)
    chosen = gammaln(samples + 1) - gammaln(b + 1) - gammaln(samples - b + 1)
    chance_of_b = np.exp(chosen + b * np.log(q) + (samples - b) * np.log1p(-q))
    point, at = np.nonzero((chance_of_b > _NOTHING) & (most >= 0) & (most < samples - b))
    certain = np.where(most >= 0, chance_of_b, 0).sum(
        1
    )  # where a sum is not looked into, all of it
    certain -= np.bincount(point, chance_of_b[point, at], _POINTS)
    weight, rest, most, q = chance_of_b[point, at], (samples - b)[at], most[at], q[:, 0]

    def rarity(difference: float) -> float:
        """How much more probable the outcomes up to the seen one are than they may be."""
        p = np.clip(q + difference, 0, 1 - q)
        up_to = betainc(rest - most, most + 1, 1 - np.clip(p / (1 - q), 0, 1)[point])
        total = certain + np.bincount(point, weight * up_to, _POINTS)
        possible = 2 * q + difference - step <= 1
        return float(np.where(possible, total, 0).max()) + 2 * _TAIL - (delta - left_out)

    # The point at the upper end of a step stands for all of it, with d larger by the step.
    low, high, fine = (worse - better) / samples, 1.0, step / 50
    near = low + 3 * math.sqrt(worse + better + 9) / samples
    if near < 1 and rarity(near) < 0:
        high = near
    elif rarity(1.0) > 0:
        return 1.0
    found: float = brentq(rarity, low, high, xtol=fine) if rarity(low) > 0 else low
    return min(found + step + 2 * fine, 1.0)


def _likely(samples: int, low: float, high: float) -> tuple[int, int]:
    """Return a range of counts that a binomial of any probability in [low, high] seldom leaves.

    By Bernstein's inequality, at most with the probability `_TAIL` at either end.
    """
    cut = -math.log(_TAIL)

    def reach(chance: float) -> float:
        return math.sqrt(2 * samples * chance * (1 - chance) * cut + (cut / 3) ** 2) + cut / 3

    widest = [low, high, min(max(low, 0.5), high)]
    first = min(samples * chance - reach(chance) for chance in widest)
    last = max(samples * chance + reach(chance) for chance in widest)
    return max(0, math.floor(first)), min(samples, math.ceil(last))


def _most_worse(b: NDArray[np.int64], worse: int, better: int, samples: int, delta: float) -> Array:
    """Return how many samples are worse, at most, for every count of better ones.

    That is in outcomes up to the seen one, in the order of ``s + z sqrt(a + b + 1 - s² / n)`` with
    s = a - b, which is n times the upper bound of a normal approximation. -1 stands for no outcome.
    The counts never fall, so that the probability of all these outcomes falls with p and rises with
    q.
    """
    from scipy.special import ndtri

    z2 = float(ndtri(1 - min(delta, 0.5))) ** 2
    seen = worse - better
    spread = worse + better + 1 - seen**2 / samples
    limit = seen + math.sqrt(z2 * max(spread, 0.0))  # n times that of the seen outcome
    square = 1 + z2 / samples
    half = limit + z2 / 2
    inside = half**2 - square * (limit**2 - z2 * (2 * b + 1))
    root = np.where(inside > 0, (half - np.sqrt(np.maximum(inside, 0))) / square, limit)
    most = np.floor(b + np.minimum(root, limit) + 1e-9)
    most = np.where(b >= better, np.maximum(most, worse), most)
    return np.clip(np.maximum.accumulate(most), -1, samples - b)


def mean_upper(values: Array, delta: float) -> Array:
    """Return an upper bound of the expectation of values in [0, 1].

    Whoever bets against the mean being m, sample after sample and never more than he has, gets
    ``1 / delta`` times his stake with a probability of at most `delta` if m is the mean, or more.
    The bound is the least m against which he does. Stakes are those of Waudby-Smith & Ramdas,
    "Estimating means of bounded random variables by betting", JRSS B 2024, section 4.2 (predictable
    plug-in, hedged), on one side.

    Args:
        values: float64 ``[..., samples]`` in [0, 1], in an order that does not depend on them.
        delta: Probability with which the bound may be too low, in (0, 1).

    Returns:
        The bounds, float64 ``[...]`` in [0, 1].

    Example:
        >>> values = np.random.default_rng(0).beta(1, 99, 1000)
        >>> bool(values.mean() < mean_upper(values, 0.05) < 0.015)
        True
    """
    count = values.shape[-1]
    seen = np.arange(1, count + 1)
    mean = (0.5 + values.cumsum(-1)) / (seen + 1)
    spread = (0.25 + np.square(values - mean).cumsum(-1)) / (seen + 1)
    before = np.concatenate([np.full_like(values[..., :1], 0.25), spread[..., :-1]], -1)
    bet = np.sqrt(-2 * math.log(delta) / (count * before))
    low, high = np.zeros(values.shape[:-1]), np.ones(values.shape[:-1])
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        m = middle[..., None]
        stake = np.minimum(bet, _BOLDEST / np.maximum(1 - m, 1e-12))
        won = np.log1p(stake * (m - values)).cumsum(-1).max(-1) >= -math.log(delta)
        low, high = np.where(won, low, middle), np.where(won, middle, high)
    return high
