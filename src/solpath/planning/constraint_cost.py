"""What the constraints of a plan cost, in score and in the loss that the search saw."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from solpath.pair import Pair
from solpath.planning.cost import CostTable
from solpath.planning.removal import groups_by_rank, removal_order


@dataclass(frozen=True)
class ConstraintCost:
    """What the constraints of a plan cost, beside the plan without constraints.

    A unit counts with its score above the least score of all units, times its parameters.

    Attributes:
        kept_score: The score that the plan keeps, as a share of what the plan without constraints
            keeps at the same size. It may be a little above 1, because sizes come in steps.
        equal_sparsity: The sparsity at which the plan without constraints keeps as much score.
        loss: The loss that the search saw at the sparsity of the plan, see `SolutionPath.curve`.
            None on the path of a baseline, which saw none.
        equal_loss: The loss that it saw at `equal_sparsity`: about where the constraints bring the
            plan. None where `loss` is.
    """

    kept_score: float
    equal_sparsity: float
    loss: float | None = None
    equal_loss: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the numbers as plain values, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> "ConstraintCost":
        """Return what `to_dict` described.

        Raises:
            ValueError: A number is missing, unknown or not a number. The message names it.
        """
        known = cls.__dataclass_fields__
        if wrong := sorted(known.keys() ^ value.keys()):
            raise ValueError(f"constraint_cost.{wrong[0]} is missing or unknown")
        for name, number in value.items():
            allowed = (int, float, type(known[name].default))
            if type(number) not in allowed:
                raise ValueError(f"constraint_cost.{name} is not a number")
        return cls(**value)


def score_beside(
    pairs: Sequence[Pair],
    score: Mapping[str, Tensor],
    kept: Mapping[str, Tensor],
    costs: CostTable,
    heads: Mapping[str, Tensor],
    measure: str,
) -> tuple[float, float]:
    """Return `kept_score` and `equal_sparsity` of `ConstraintCost`.

    Args:
        pairs: Every pair of the dense model.
        score: Pair name to ``[heads, width]``.
        kept: See `Plan.kept`.
        heads: See `Plan.heads`.
        costs: What the dense model and its units cost.
        measure: The measure in which the plan without constraints has the size of the plan.
    """
    least = min(float(score[pair.name].min()) for pair in pairs)
    worth = {p.name: (score[p.name].double() - least) * costs.unit["params"][p.name] for p in pairs}
    whole = {p.name: heads.get(p.name, torch.arange(p.heads)) for p in pairs}
    plan = sum(float(worth[n].index_select(0, whole[n]).gather(1, kept[n]).sum()) for n in worth)
    groups = [groups_by_rank(score[pair.name].double())[0] for pair in pairs]
    order = removal_order(groups, [0] * len(pairs))
    unit = costs.unit[measure]
    removed = sum((p.units - kept[p.name].numel()) * unit[p.name] for p in pairs)
    lost, size = torch.zeros(2, len(order.pair) + 1, dtype=torch.float64)
    for i, pair in enumerate(pairs):
        own = order.pair == i
        cost = costs.unit["params"][pair.name] * pair.heads
        lost[1:][own] = (groups[i][order.start[own]] - least) * cost
        size[1:][own] = unit[pair.name] * pair.heads
    left = (lost.sum() - lost.cumsum(0)).clamp(min=0)
    free = float(left[(size.cumsum(0) - removed).abs().argmin()])
    alike = int((left - plan).abs().argmin())
    sparsity = costs.achieved(pairs, order.widths_after(pairs, alike)).sparsity
    return plan / free if free else 1.0, sparsity
