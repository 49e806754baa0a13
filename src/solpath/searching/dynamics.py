"""The mathematics of the search: pure functions on vectors over all units. See docs/method.md."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from solpath.planning.removal import groups_by_rank, removal_order


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


def pull(drive: Float[Tensor, " units"], cost: Float[Tensor, " units"], keep: float) -> float:
    """The p for which ``Σ cost · min(drive / p, 1) = keep · Σ cost``, exactly.

    The left side falls in p and is linear in 1/p between the sorted drives, so the root is found
    by one sort. If the units with a positive drive cost less than `keep`, p is 0 in the limit
    and the smallest positive drive is returned: all of them are kept whole.

    Args:
        drive: non-negative.
        cost: positive.
        keep: share of the cost, in (0, 1].
    """
    ordered, index = drive.sort(descending=True)
    weight = cost[index]
    target = keep * cost.sum()
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
    marginal: Float[Tensor, " units"], cost: Float[Tensor, " units"], keep: float, sharpness: float
) -> Float[Tensor, " units"]:
    """Stationary mask under the pull that keeps `keep` of the cost in expectation.

    ``M = min(q / p, 1)`` with ``q = (max(m, 0) / cost) ** sharpness``; sharpness 1 is the
    stationary point of the multilinear extension with a coupling ``p · cost / 2 · M²``.
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
    """Share of each variable's variance that the others, as far as they are kept, cannot predict.

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
    keep: float,
    momentum: float,
    relaxation: float,
    sharpness: float,
    shrinkage: float,
    unexplained: Float[Tensor, " units"] | None = None,
) -> Equilibrium:
    """One step of the default search.

    Args:
        state: before.
        mean: marginals of this step, averaged over its samples.
        variance: variance of that average.
        keep: expected share of the cost to keep.
        unexplained: share of every marginal that counts, see `unexplained_variance`; None is all.
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
    """Read one nested order off the masks of a search, by elimination from dense to empty.

    A unit stays at a size as long as it gathers mask from there to the end of the search. At step
    k the remaining units are ranked by the sum of their masks over the steps from ``k - memory``
    on, and those that rank lowest leave until ``keep[k]`` of the cost is left. Units leave in
    groups of equal rank in every head of a pair, see `solpath.planning.removal`.

    Args:
        masks: expected mask after every step.
        keep: share of the cost at every step, falling.
        cost: per unit, equal within a pair.
        shapes: ``(heads, width)`` of every pair, in the order of the units.
        memory: steps before k that still count.

    Returns:
        Entry time: the share of the cost that is kept once the unit has entered, in (0, 1].
    """
    tail = masks.double().sum(0)
    forgotten = 0
    sizes = [heads * width for heads, width in shapes]
    entry = [torch.zeros(shape, dtype=torch.float64) for shape in shapes]
    alive = [torch.ones(shape, dtype=torch.bool) for shape in shapes]
    first = [0] * len(shapes)
    total = left = float(cost.sum())
    group_cost = torch.stack(
        [part[0] * heads for part, (heads, _) in zip(torch.split(cost, sizes), shapes, strict=True)]
    )
    for k, size in enumerate([*keep, 0.0]):
        start = min(max(0, k - memory), len(masks) - 1)
        if start > forgotten:
            tail = tail - masks[forgotten:start].double().sum(0)
            forgotten = start
        if left <= size * total:
            continue
        values = [
            part.view(shape) for part, shape in zip(torch.split(tail, sizes), shapes, strict=True)
        ]
        groups = [groups_by_rank(value, here) for value, here in zip(values, alive, strict=True)]
        order = removal_order([mean for mean, _ in groups], first)
        spent = group_cost[order.pair].cumsum(0)
        before = left - (spent - group_cost[order.pair])  # cost that is left when a group leaves
        count = int((before > size * total).sum())
        for i in range(len(shapes)):
            own = order.pair[:count] == i
            unit = groups[i][1][:, order.start[:count][own]]
            entry[i].scatter_(1, unit, (before[:count][own] / total).expand(unit.shape))
            alive[i].scatter_(1, unit, False)
        left -= float(spent[count - 1])
    return torch.cat([times.flatten() for times in entry])


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
