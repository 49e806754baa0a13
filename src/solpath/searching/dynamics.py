"""The mathematics of both searches: pure functions on vectors over all units (docs/method.md)."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from solpath.planning.removal import Elimination

_AT_ONCE = 8  # steps whose masks are in float64 at a time


class Equilibrium(NamedTuple):
    """State of the default search, each part float64 ``[units]``.

    Attributes:
        marginal: Running mean of the loss of removing each unit (m).
        noise: Running estimate of the variance of `marginal` (v).
        mask: Expected mask (M), in [0, 1].
    """

    marginal: Tensor
    noise: Tensor
    mask: Tensor


def pull(drive: Float[Tensor, " units"], cost: Float[Tensor, " units"], keep: float) -> float:
    """Return the pull p at which ``Σ cost · min(drive / p, 1) = keep · Σ cost``, exactly.

    The left side falls in p and is linear in 1/p between the sorted drives, so one sort finds the
    root. If the units with a positive drive cost less than `keep`, no pull is small enough: the
    smallest positive drive is returned, which keeps all of them whole. It is 1 if no drive is
    positive.

    Args:
        drive: How strongly each unit resists the pull, not negative.
        cost: Parameters of each unit, positive.
        keep: Share of the cost to keep, in (0, 1].

    Example:
        >>> drive = torch.tensor([6.0, 2.0, 1.0, 1.0])
        >>> pull(drive, torch.ones(4), keep=0.5)
        4.0
        >>> (drive / 4.0).clamp(max=1).tolist()
        [1.0, 0.5, 0.25, 0.25]
    """
    ordered, index = drive.sort(descending=True)
    weight = cost[index]
    target = keep * cost.sum()
    whole = weight.cumsum(0) - weight  # cost of the units before each, kept whole
    partly = (weight * ordered).flip(0).cumsum(0).flip(0)  # cost · drive, from each on
    root = partly / (target - whole)
    valid = (whole < target) & (ordered <= root)
    if valid.any() and root[valid][0] > 0:
        return float(root[valid][0])
    positive = ordered[ordered > 0]
    return float(positive[-1]) if len(positive) else 1.0


def shrink(
    marginal: Float[Tensor, " units"],
    noise: Float[Tensor, " units"],
    scale: Float[Tensor, " units"],
    pair: Int[Tensor, " units"],
    strength: float,
) -> Float[Tensor, " units"]:
    """Draw noisy marginals to the one-shot scale; docs/method.md, "The mask at its equilibrium".

    In every pair, a is the sum of the marginals over the sum of the scale, at least 0. A marginal
    that deviates by d from ``a · scale`` becomes ``a · scale + d³ / (d² + strength · noise)``.
    Where the marginal is certain it stays; where it is noise, the scale takes its place.

    Args:
        marginal: Running mean of the marginals.
        noise: Variance of that mean.
        scale: One-shot scale (h): the Gauss-Newton diagonal at the dense model.
        pair: Index of the pair of every unit.
        strength: Weight of the noise. 0 returns `marginal` unchanged.
    """
    if strength == 0:
        return marginal
    pairs = int(pair.max()) + 1
    total = marginal.new_zeros(pairs).index_add(0, pair, marginal)
    base = marginal.new_zeros(pairs).index_add(0, pair, scale)
    ratio = torch.where(base > 0, total / base, 0).clamp(min=0)
    expected = ratio[pair] * scale
    deviation = marginal - expected
    square = deviation.square()
    kept = torch.where(square > 0, square / (square + strength * noise), 0)
    return expected + deviation * kept


def equilibrium_mask(
    marginal: Float[Tensor, " units"], cost: Float[Tensor, " units"], keep: float, sharpness: float
) -> Float[Tensor, " units"]:
    """Return the stationary mask under the pull that keeps `keep` of the cost in expectation.

    The mask is ``M = min(q / p, 1)`` with ``q = (max(m, 0) / cost) ** sharpness`` and the pull p.
    Sharpness 1 gives the stationary point of the multilinear extension with a coupling
    ``p · cost / 2 · M²`` (docs/method.md). If no marginal is positive, every unit gets `keep`.

    Args:
        marginal: Loss of removing each unit (m).
        cost: Parameters of each unit, positive.
        keep: Share of the cost to keep, in (0, 1].
        sharpness: Exponent of the marginals per cost, positive.
    """
    drive = (marginal.clamp(min=0) / cost).pow(sharpness)
    top = drive.max()
    if top <= 0:
        return torch.full_like(drive, keep)
    drive = drive / top
    return (drive / pull(drive, cost, keep)).clamp(max=1)


def unexplained_variance(
    correlation: Float[Tensor, "n n"], mask: Float[Tensor, " n"]
) -> Float[Tensor, " n"]:
    """Return the share of every variable's variance that kept variables cannot predict.

    A variable that is kept with probability M predicts as if noise of (1 - M)/M times its own
    variance were added to it. So a variable that is always kept predicts fully, and one that is
    never kept predicts nothing. With ``N = (1 - M)/M + 0.01`` and ``A = R + diag(N)``, the share is
    ``1 / (A⁻¹)_ii - N_i`` (docs/method.md, "Compensation").

    Args:
        correlation: Correlations of the variables (R), positive semidefinite, 1 on the diagonal.
        mask: Probability that each is kept (M), in [0, 1].

    Returns:
        The shares, in [0.001, 1].

    Example:
        >>> twins, kept = torch.ones(2, 2), torch.tensor([1.0, 0.0])
        >>> unexplained_variance(twins, kept).double().round(decimals=2).tolist()
        [1.0, 0.01]
    """
    kept = mask.clamp(min=1e-3)
    noise = (1 - kept) / kept + 0.01
    noisy = correlation.clone()
    noisy.diagonal().add_(noise)
    factor = torch.linalg.cholesky(noisy)
    del noisy
    inverse = torch.cholesky_inverse(factor)
    return (1 / inverse.diagonal() - noise).clamp(1e-3, 1)


def equilibrium_step(
    state: Equilibrium,
    mean: Float[Tensor, " units"],
    variance: Float[Tensor, " units"],
    *,
    scale: Float[Tensor, " units"],
    cost: Float[Tensor, " units"],
    pair: Int[Tensor, " units"],
    keep: float,
    momentum: float,
    relaxation: float,
    sharpness: float,
    shrinkage: float,
    unexplained: Float[Tensor, " units"] | None = None,
) -> Equilibrium:
    """Return the state after one step of the default search (docs/method.md).

    Args:
        state: State before the step.
        mean: Marginals of this step, averaged over its samples.
        variance: Variance of that average.
        scale: One-shot scale (h), see `shrink`.
        cost: Parameters of each unit.
        pair: Index of the pair of every unit.
        keep: Share of the cost to keep in expectation.
        momentum: Weight of the past in the running means.
        relaxation: Share of the way to its equilibrium that the mask moves.
        sharpness: See `equilibrium_mask`.
        shrinkage: Strength of `shrink`.
        unexplained: Unexplained variance, by which marginals are multiplied. None counts them in
            full.
    """
    marginal = momentum * state.marginal + (1 - momentum) * mean
    noise = momentum * state.noise + (1 - momentum) * variance * (1 - momentum) / (1 + momentum)
    clean = shrink(marginal, noise, scale, pair, shrinkage)
    clean = clean if unexplained is None else clean * unexplained
    target = equilibrium_mask(clean, cost, keep, sharpness)
    return Equilibrium(marginal, noise, (1 - relaxation) * state.mask + relaxation * target)


def read_order(
    masks: Float[Tensor, "steps units"],
    keep: Sequence[float],
    cost: Float[Tensor, " units"],
    shapes: Sequence[tuple[int, int]],
    memory: int,
) -> Float[Tensor, " units"]:
    """Read one nested order from the masks of a search, by elimination from dense to empty.

    At step k the remaining units are ranked by the sum of their masks from step ``k - memory`` to
    the end of the search. The lowest leave until ``keep[k]`` of the cost is left. They leave in
    groups of equal rank in every head of a pair (see `solpath.planning.removal`).

    Args:
        masks: Expected mask after every step.
        keep: Share of the cost to keep at every step, falling.
        cost: Parameters of each unit, float64, equal within a pair.
        shapes: ``(heads, width)`` of every pair, in the order of the units.
        memory: Steps before k that still count.

    Returns:
        Entry time: the share of the cost that is kept once the unit is in, in (0, 1].

    Example:
        >>> masks = torch.tensor([[1.0, 0.6], [0.9, 0.1]])
        >>> read_order(masks, [0.5, 0.1], torch.ones(2).double(), [(1, 2)], memory=0).tolist()
        [0.5, 1.0]
    """
    elimination = Elimination(shapes, cost)
    tail = _sum(masks)
    forgotten = 0
    for k, size in enumerate([*keep, 0.0]):
        start = min(max(0, k - memory), len(masks) - 1)
        if start > forgotten:
            tail = tail - _sum(masks[forgotten:start])
            forgotten = start
        elimination.shrink(size, tail)
    return elimination.entry


def _sum(masks: Tensor) -> Tensor:
    """Sum masks over steps in float64, a few at a time; sums of float16 are exact."""
    total = torch.zeros(masks.shape[1], dtype=torch.float64)
    for start in range(0, len(masks), _AT_ONCE):
        total += masks[start : start + _AT_ONCE].double().sum(0)
    return total


class Inclusion(NamedTuple):
    """State of the paper's differential inclusion, each part float64 ``[units]``.

    Attributes:
        mask: Mask (M), in [0, 1].
        dual: Dual variable (V) of the sparse copy of the mask.
        entry: Time in steps at which V crossed λ, infinite before that.
    """

    mask: Tensor
    dual: Tensor
    entry: Tensor


def sparse_copy(dual: Float[Tensor, " units"], kappa: float, lam: float) -> Float[Tensor, " units"]:
    """Return Γ = κ · max(V - λ, 0), the sparse copy of the mask that belongs to a dual variable.

    It solves V ∈ ∂Ω(Γ) for Ω(Γ) = λ‖Γ‖₁ + ‖Γ‖²/2κ and Γ ≥ 0 (docs/method.md).

    Args:
        dual: Dual variable (V).
        kappa: Inverse of the ridge (κ).
        lam: Threshold (λ).
    """
    return kappa * (dual - lam).clamp(min=0)


def inclusion_step(
    state: Inclusion,
    gradient: Float[Tensor, " units"],
    *,
    scale: Float[Tensor, " units"],
    nu: float,
    kappa: float,
    lam: float,
    step_size: float,
    time: int,
) -> Inclusion:
    """Return the state after one step of the paper's differential inclusion (arXiv 2501.03289).

    The step is a split linearised Bregman iteration with a diagonal preconditioner:
    ``M ← M - D (∇L(M) + (M - Γ)/ν)`` with ``D = step_size / (h + 1/ν)``, kept in [0, 1], then
    ``V ← V + step_size (M - Γ)``, a time step of ``step_size · ν`` in ``V̇ = (M - Γ)/ν``. A unit
    enters where V first crosses λ, by linear interpolation between steps.

    Args:
        state: State before the step.
        gradient: ∇L at the mask of `state`.
        scale: One-shot scale (h), see `shrink`.
        nu: Inverse of the coupling (ν).
        kappa: Inverse of the ridge on the sparse copy (κ).
        lam: Threshold (λ).
        step_size: Share of the way to its stationary point that the mask moves.
        time: Steps taken before this one.
    """
    gamma = sparse_copy(state.dual, kappa, lam)
    direction = gradient + (state.mask - gamma) / nu
    mask = (state.mask - step_size / (scale + 1 / nu) * direction).clamp(0, 1)
    dual = state.dual + step_size * (mask - gamma)
    crossing = (state.dual < lam) & (dual >= lam)
    fraction = (lam - state.dual) / (dual - state.dual)
    entry = torch.where(crossing & state.entry.isinf(), time + fraction, state.entry)
    return Inclusion(mask, dual, entry)


def extrapolated_entry(state: Inclusion, lam: float, steps: int) -> Float[Tensor, " units"]:
    """Return the entry times in steps, with ``steps · λ / V`` for units that have not entered.

    A unit that has not entered comes after all that have, because its V is below λ.

    Args:
        state: State after the last step.
        lam: Threshold (λ).
        steps: Steps taken.
    """
    late = steps * lam / state.dual.clamp(min=1e-12 * lam)
    return torch.where(state.entry.isinf(), late, state.entry)
