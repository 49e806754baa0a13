"""The mathematics of the search: pure functions on vectors over all units. See docs/method.md."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor


class Equilibrium(NamedTuple):
    """State of the default search. All float64 ``[units]``.

    Attributes:
        marginal: running mean of the loss of removing each unit (m).
        noise: running estimate of the variance of `marginal`.
        mask: expected mask (M).
    """

    marginal: Tensor
    noise: Tensor
    mask: Tensor


def pull(drive: Float[Tensor, " units"], cost: Float[Tensor, " units"], share: float) -> float:
    """The p for which ``Σ cost · min(drive / p, 1) = share · Σ cost``, exactly.

    The left side falls in p and is linear in 1/p between the sorted drives, so the root is found
    by one sort. If the units with a positive drive cost less than `share`, p is 0 in the limit
    and the smallest positive drive is returned: all of them are kept whole.

    Args:
        drive: non-negative.
        cost: positive.
        share: in (0, 1].
    """
    ordered, index = drive.sort(descending=True)
    weight = cost[index]
    target = share * cost.sum()
    whole = weight.cumsum(0) - weight  # cost of the units before each, kept whole
    partly = (weight * ordered).flip(0).cumsum(0).flip(0)  # cost · drive from each on
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
    """Pull marginals towards the one-shot scale of their pair as far as they are noise.

    With a the least ratio of sums and d the deviation from ``a · scale``, the result is
    ``a · scale + d³ / (d² + strength · noise)``.

    Args:
        marginal: running mean.
        noise: its variance.
        scale: one-shot Gauss-Newton diagonal (h).
        pair: which pair a unit is of.
        strength: 0 returns `marginal`.
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
    marginal: Float[Tensor, " units"], cost: Float[Tensor, " units"], share: float, sharpness: float
) -> Float[Tensor, " units"]:
    """Stationary mask under the pull that keeps `share` of the cost in expectation.

    ``M = min(q / p, 1)`` with ``q = (max(m, 0) / cost) ** sharpness``; sharpness 1 is the
    stationary point of the multilinear extension with a coupling ``p · cost / 2 · M²``.
    """
    drive = (marginal.clamp(min=0) / cost).pow(sharpness)
    top = drive.max()
    if top <= 0:
        return torch.full_like(drive, share)
    drive = drive / top
    return (drive / pull(drive, cost, share)).clamp(max=1)


def unpredicted(
    correlation: Float[Tensor, "n n"], mask: Float[Tensor, " n"]
) -> Float[Tensor, " n"]:
    """Share of each variable's variance that the others cannot predict, as far as they are kept.

    A variable that is kept with probability M enters as if noise of (1 - M)/M times its own
    variance were added, so that one that is always kept predicts fully and one that is never kept
    not at all. With ``A = R + diag((1 - M)/M + 0.01)`` the share of i is ``1 / (A⁻¹)_ii - N_i``.

    Args:
        correlation: R, positive semidefinite with unit diagonal.
        mask: M, in [0, 1].

    Returns:
        In (0, 1].
    """
    kept = mask.clamp(min=1e-3)
    noise = (1 - kept) / kept + 0.01
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(correlation + noise.diag()))
    return (1 / inverse.diagonal() - noise).clamp(1e-3, 1)


def equilibrium_step(
    state: Equilibrium,
    mean: Float[Tensor, " units"],
    variance: Float[Tensor, " units"],
    *,
    scale: Float[Tensor, " units"],
    cost: Float[Tensor, " units"],
    pair: Int[Tensor, " units"],
    share: float,
    momentum: float,
    relaxation: float,
    sharpness: float,
    shrinkage: float,
    own: Float[Tensor, " units"] | None = None,
) -> Equilibrium:
    """One step of the default search.

    Args:
        state: before.
        mean: marginals of this step, averaged over its samples.
        variance: variance of that average.
        share: expected share of the cost to keep.
        own: share of every marginal that counts, see `unpredicted`; None is all of it.
    """
    marginal = momentum * state.marginal + (1 - momentum) * mean
    noise = momentum * state.noise + (1 - momentum) * variance * (1 - momentum) / (1 + momentum)
    clean = shrink(marginal, noise, scale, pair, shrinkage)
    clean = clean if own is None else clean * own
    target = equilibrium_mask(clean, cost, share, sharpness)
    return Equilibrium(marginal, noise, (1 - relaxation) * state.mask + relaxation * target)


def read_order(
    masks: Float[Tensor, "steps units"],
    share: Sequence[float],
    cost: Float[Tensor, " units"],
    shapes: Sequence[tuple[int, int]],
    memory: int,
) -> Float[Tensor, " units"]:
    """Read one nested order off the masks of a search, by elimination from dense to empty.

    A unit stays at a size as long as it gathers mask from there to the end of the search. At step
    k the remaining units are ranked by the sum of their masks over the steps from ``k - memory``
    on, and those that rank lowest leave until ``share[k]`` of the cost is left. Units leave in
    groups of equal rank in every head of a pair, because that is what can be cut.

    Args:
        masks: expected mask after every step.
        share: share of the cost at every step, falling.
        cost: per unit, equal within a pair.
        shapes: ``(heads, width)`` of every pair, in the order of the units.
        memory: steps before k that still count.

    Returns:
        Entry time: the share of the cost that is kept once the unit has entered, in (0, 1].
    """
    tail = masks.double().sum(0)
    forgotten = 0
    sizes = [heads * width for heads, width in shapes]
    entry = torch.zeros_like(tail)
    alive = [torch.ones(shape, dtype=torch.bool) for shape in shapes]
    total = left = float(cost.sum())
    group_cost = [
        float(part[0]) * heads
        for part, (heads, _) in zip(torch.split(cost, sizes), shapes, strict=True)
    ]
    for k, keep in enumerate([*share, 0.0]):
        start = min(max(0, k - memory), len(masks) - 1)
        if start > forgotten:
            tail = tail - masks[forgotten:start].double().sum(0)
            forgotten = start
        if left <= keep * total:
            continue
        groups: list[tuple[float, int, int]] = []
        units: list[Tensor] = []
        for i, (heads, width) in enumerate(shapes):
            part = torch.split(tail, sizes)[i]
            rest = int(alive[i][0].sum())
            value = part.view(heads, width).masked_fill(~alive[i], -1.0)
            ordered, index = value.sort(dim=1, descending=True, stable=True)
            units.append(index)
            groups += [(v, -r, i) for r, v in enumerate(ordered[:, :rest].mean(0).tolist())]
        rows = torch.split(entry, sizes)
        for _, rank, i in sorted(groups):
            if left <= keep * total:
                break
            heads, width = shapes[i]
            unit = units[i][:, -rank]
            rows[i].view(heads, width)[torch.arange(heads), unit] = left / total
            alive[i][torch.arange(heads), unit] = False
            left -= group_cost[i]
    return entry


class Inclusion(NamedTuple):
    """State of the paper's inclusion. All float64 ``[units]``.

    Attributes:
        mask: M.
        dual: V, the dual of the sparse copy.
        entry: time at which V crossed lambda, infinite before.
    """

    mask: Tensor
    dual: Tensor
    entry: Tensor


def sparse_copy(dual: Float[Tensor, " units"], kappa: float, lam: float) -> Float[Tensor, " units"]:
    """Γ = κ · max(V - λ, 0), the minimiser tied to the dual variable (one-sided l1 + ridge)."""
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
    """One step of split linearised Bregman iteration with a diagonal preconditioner.

    ``M ← M - D (∇L(M) + (M - Γ)/ν)`` with ``D = step_size / (h + 1/ν)``, kept in [0, 1];
    ``V ← V + step_size (M - Γ)``, that is a time step of ``step_size · ν`` in
    ``V̇ = (M - Γ)/ν``; the entry time is where V crosses λ, by linear interpolation.

    Args:
        gradient: ∇L at the mask of `state`.
        time: steps taken before this one.
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
    """Entry times, with ``steps · λ / V`` for units that never entered; a total order by time."""
    late = steps * lam / state.dual.clamp(min=1e-12 * lam)
    return torch.where(state.entry.isinf(), late, state.entry)
