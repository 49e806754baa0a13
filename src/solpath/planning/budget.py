"""Budgets, and how many units must leave to meet them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from solpath.errors import BudgetError
from solpath.pair import Pair
from solpath.planning.cost import CostTable
from solpath.planning.latency_table import LatencyTable
from solpath.planning.removal import RemovalOrder


@dataclass(frozen=True)
class Budget:
    """How large a member may be, under one measure.

    Attributes:
        measure: What the value is counted in: ``"sparsity"``, ``"latency_ms"``, or a measure that
            the path has counted: ``"params"``, ``"bytes"``, ``"macs"``, ``"cache"``, or one of
            your own (see `solpath.model.counting.MEASURES`).
        value: For ``"sparsity"``, the share of the prunable parameters to remove, in [0, 1). For
            ``"latency_ms"``, the milliseconds that one forward pass may take. For any other
            measure, what to keep: a share of the dense model in (0, 1], or a count above 1.
        latency: The table that predicts ``"latency_ms"``; None for any other measure.

    Raises:
        BudgetError: The value is not a finite number, the table is missing, or there is a table
            that the measure has no use for.

    Example:
        >>> round(path.plan(Budget("macs", 0.5)).achieved.macs_share, 1)
        0.5
    """

    measure: str
    value: float
    latency: LatencyTable | None = None

    def __post_init__(self) -> None:
        number = isinstance(self.value, int | float) and not isinstance(self.value, bool)
        if not number or not math.isfinite(self.value):
            raise BudgetError(f"{self.measure} must be a finite number, got {self.value!r}.")
        if self.measure != "latency_ms" and self.latency is not None:
            raise BudgetError(f"latency= is a table for latency_ms=, not for {self.measure}=.")
        if self.measure == "latency_ms" and self.latency is None:
            raise BudgetError(
                "latency_ms needs latency=, a table from solpath.measure_latency(model, batch)."
            )

    @classmethod
    def of(
        cls, values: Mapping[str, float | None], latency: LatencyTable | None = None
    ) -> "Budget":
        """Return the one budget that is given among several.

        Args:
            values: Measure to value, or to None where no budget is given.
            latency: The table for ``"latency_ms"``.

        Raises:
            BudgetError: None or several are given, or the given one is refused by `Budget`.
        """
        given = {name: value for name, value in values.items() if value is not None}
        if len(given) != 1:
            names = ", ".join(given) or "none"
            raise BudgetError(f"give exactly one of {', '.join(values)}; got {names}.")
        [(name, value)] = given.items()
        return cls(name, value, latency)


def blocks_to_remove(
    budget: Budget, pairs: Sequence[Pair], costs: CostTable, order: RemovalOrder
) -> tuple[int, dict[str, float]]:
    """Return how many blocks leave to meet a budget, and the latency that is predicted then.

    The size is the one nearest to the budget, above or below it. For a latency it is the largest
    that is predicted to be fast enough.

    Args:
        budget: What to meet.
        pairs: Every pair of the dense model.
        costs: What the dense model and its units cost.
        order: The removal order.

    Returns:
        The number of blocks, and for a latency ``{"predicted": milliseconds}``, otherwise nothing.

    Raises:
        BudgetError: The budget is out of range, not reachable, or under a measure that `costs`
            does not know.
    """
    if budget.latency is None:
        return _nearest(budget, pairs, costs, order), {}
    predicted = budget.latency.predict(order.every_width(pairs))
    fits = (predicted <= budget.value).nonzero()
    if budget.value > predicted[0] or not len(fits):
        raise BudgetError(
            f"latency_ms {budget.value} is not reachable: {predicted.min().item():.2f} to "
            f"{predicted[0].item():.2f} ms are, by the table of latencies."
        )
    count = int(fits[0])
    return count, {"predicted": predicted[count].item()}


def _nearest(budget: Budget, pairs: Sequence[Pair], costs: CostTable, order: RemovalOrder) -> int:
    """Return how many blocks leave for the size nearest to a budget that is no latency."""
    target, unit = _target(budget, pairs, costs)
    each = torch.tensor([pair.heads * unit[pair.name] for pair in pairs])
    step = torch.zeros(order.blocks, dtype=torch.int64)
    step.index_add_(0, order.block, each[order.pair] * order.ranks)
    removed = torch.cat([torch.zeros(1, dtype=torch.int64), step.cumsum(0)])
    if removed[-1] < target and target - removed[-1] > 0.5 * max(step.tolist(), default=0):
        smallest = costs.achieved(pairs, order.widths_after(pairs, len(step)))
        if budget.measure == "sparsity":
            reachable = f"0 to {smallest.sparsity:.4f} are."
        else:
            low, dense = smallest.size(budget.measure), costs.dense[budget.measure]
            reachable = (
                f"{low:,} to {dense:,} are ({low / dense:.4f} to 1 as a share of the dense model)."
            )
        widths = torch.tensor([pair.width for pair in pairs])
        if removed[-1] < (each * widths).sum():
            reachable += " The constraints keep the rest."
        raise BudgetError(f"{budget.measure} {budget.value} is not reachable: {reachable}")
    return int((removed.double() - target).abs().numpy().argmin())


def _target(
    budget: Budget, pairs: Sequence[Pair], costs: CostTable
) -> tuple[float, Mapping[str, int]]:
    """Return how much must be removed, and what one unit of every pair takes of it."""
    name, value = budget.measure, budget.value
    if name == "sparsity":
        if not 0 <= value < 1:
            raise BudgetError(f"sparsity must be in [0, 1), got {value!r}: 0.4 removes 40 %.")
        return value * costs.prunable(pairs), costs.unit["params"]
    if name not in costs.dense:
        known = ", ".join(["sparsity", *costs.dense, "latency_ms"])
        raise BudgetError(f"this path does not count {name!r}; it knows {known}.")
    dense = costs.dense[name]
    if not dense:
        raise BudgetError(f"{name} is no budget for this model: it has none.")
    if not 0 < value <= dense:
        raise BudgetError(
            f"{name} must be a share in (0, 1] or a count up to {dense:,}, got {value!r}."
        )
    kept = value * dense if value <= 1 else value
    return dense - kept, costs.unit[name]
