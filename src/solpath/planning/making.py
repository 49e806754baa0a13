"""Make a plan: from the score of all units to those that one budget keeps."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from solpath.errors import ConfigError
from solpath.pair import Fingerprint, Pair
from solpath.planning.budget import Budget, blocks_to_remove
from solpath.planning.constraint_cost import ConstraintCost, score_beside
from solpath.planning.constraints import Constraints, attention_of
from solpath.planning.cost import CostTable
from solpath.planning.plan import Plan, norm_gain, unit_mask
from solpath.planning.removal import groups_by_rank, removal_order


def make_plan(
    pairs: Sequence[Pair],
    score: Mapping[str, Tensor],
    costs: CostTable,
    fingerprint: Fingerprint,
    budget: Budget,
    constraints: Constraints,
    energy: Mapping[str, Tensor],
    basis: Mapping[str, Tensor],
    unreached: tuple[str, ...] = (),
) -> Plan:
    """Return the plan that cuts a score to a budget.

    Every pair loses its units by rank, in blocks of `Constraints.multiple_of` ranks. Blocks leave
    in the order of their mean score, and the budget decides only how many, so plans with equal
    constraints are nested.

    Args:
        pairs: Every pair of the dense model.
        score: Pair name to ``[heads, width]``. Units with a higher score stay longer.
        costs: What the dense model and its units cost.
        fingerprint: Identity of the dense model.
        budget: What to cut to.
        constraints: What to respect.
        energy: See `SolutionPath.energy`.
        basis: See `SolutionPath.basis`.
        unreached: See `SolutionPath.unreached`.

    Raises:
        BudgetError: The budget is out of range or not reachable.
        ConfigError: The model cannot respect the constraints; see `Constraints.check`.
        FingerprintError: The latency table is for a model of another class or other shapes.
    """
    constraints.check(pairs, unreached)
    if budget.latency is not None:
        check_timed(constraints.whole_groups)
        budget.latency.check(fingerprint.architecture, pairs, unreached)
    ranked = _ranked(pairs, score, constraints)
    turned = constraints.ranked(pairs)
    teams, first = constraints.teams(turned)
    order = removal_order([mean for mean, _ in ranked], first, teams)
    count, latency_ms = blocks_to_remove(budget, turned, costs, order)
    widths = order.widths_after(turned, count)
    kept: dict[str, Tensor] = {}
    heads: dict[str, Tensor] = {}
    for pair, (_, units) in zip(pairs, ranked, strict=True):
        best = units[:, : widths[pair.name]].sort(dim=1).values
        if constraints.by_head(pair):
            kept[pair.name] = torch.arange(pair.width).repeat(best.shape[1], 1)
            heads |= {pair.name: best[0]} if best.shape[1] < pair.heads else {}
        else:
            kept[pair.name] = best
    achieved, cost = costs.achieved(turned, widths), None
    if constraints.binding:
        measure = budget.measure if budget.measure in costs.unit else "params"
        cost = ConstraintCost(*score_beside(pairs, score, kept, costs, heads, measure))
    return Plan(
        pairs=tuple(pairs),
        kept=kept,
        asked={budget.measure: budget.value, **constraints.to_dict()},
        achieved=achieved,
        fingerprint=fingerprint,
        gains={
            pair.name: norm_gain(
                unit_mask(pair, kept[pair.name], heads.get(pair.name)).double(), energy[pair.name]
            )
            for pair in pairs
            if pair.norms
        },
        basis=basis,
        latency_ms=latency_ms,
        unreached=unreached,
        heads=heads,
        constraint_cost=cost,
    )


def check_timed(whole_groups: bool) -> None:
    """Raise `ConfigError` if no budget in milliseconds goes with a constraint.

    Args:
        whole_groups: Whether attentions lose whole heads.
    """
    if whole_groups:
        raise ConfigError("whole_groups: latency tables know widths of heads, not their number.")


def _ranked(
    pairs: Sequence[Pair], score: Mapping[str, Tensor], constraints: Constraints
) -> list[tuple[Tensor, Tensor]]:
    """Return the mean value at every rank of every pair, and the units of every rank.

    With shared couples, all heads of the pairs of rotary couples have the same units at every rank:
    those with the best sum over the heads and pairs of equal width. Where whole heads leave, a rank
    is a head, and the best is the one with the best sum over all pairs of its attention, weighted
    by cost. The mean value at a rank is of the pair's own scores.
    """
    totals: dict[object, Tensor] = {}
    keys: list[object] = []
    for pair in pairs:
        own = score[pair.name].double()
        key: object = None
        if constraints.by_head(pair):
            key, own = attention_of(pair), own.sum(1) * pair.cost
        elif constraints.shared_couples and pair.channels > 1:
            key, own = pair.width, own.sum(0)
        keys.append(key)
        if key is not None:
            totals[key] = totals[key] + own if key in totals else own
    ranked = []
    for pair, key in zip(pairs, keys, strict=True):
        own = score[pair.name].double()
        if key is None:
            ranked.append(groups_by_rank(own))
            continue
        order = totals[key].argsort(descending=True, stable=True)
        if constraints.by_head(pair):
            ranked.append((own.mean(1)[order], order.unsqueeze(0)))
        else:
            ranked.append((own[:, order].mean(0), order.expand(pair.heads, -1)))
    return ranked
