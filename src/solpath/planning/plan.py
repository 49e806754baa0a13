"""Plans: which units every pair keeps at one size."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from solpath.errors import FingerprintError
from solpath.pair import Fingerprint, Pair
from solpath.planning.budget import Budget, Constraints, blocks_to_remove
from solpath.planning.cost import Achieved, CostTable
from solpath.planning.removal import groups_by_rank, removal_order

EXTRACTED = "solpath_plan"
"""The attribute of an extracted model that holds its plan."""


@dataclass(frozen=True, eq=False)
class Plan:
    """The units one family member keeps.

    Attributes:
        pairs: every pair of the dense model.
        kept: pair name to int64 ``[heads, r]``, ascending; r may be 0.
        asked: the budget and its options.
        achieved: size under every measure.
        fingerprint: the model the plan is for.
        gains: for pairs with norms, pair name to float64 ``[heads, query heads per head]``: what
            the normed query is multiplied by, see `norm_gain`.
        basis: see `SolutionPath.basis`.
        dropped_rotations: of a plan that was read from a saved model: the pairs whose basis was
            not saved with it, so that their units cannot be found in the dense model.
        latency_ms: of a plan for a latency: ``"predicted"`` by the table and, from
            `plan_for_latency`, ``"measured"`` on the extracted model.
    """

    pairs: tuple[Pair, ...]
    kept: Mapping[str, Tensor]
    asked: Mapping[str, Any]
    achieved: Achieved
    fingerprint: Fingerprint
    gains: Mapping[str, Tensor] = field(default_factory=dict)
    basis: Mapping[str, Tensor] = field(default_factory=dict)
    dropped_rotations: tuple[str, ...] = ()
    latency_ms: Mapping[str, float] = field(default_factory=dict)

    def rotations(self) -> dict[str, Tensor]:
        """The basis of every pair that loses units; pairs that stay whole are not rotated.

        Raises:
            FingerprintError: the plan was read from a saved model, which has no use for a basis.
        """
        cut = [pair.name for pair in self.pairs if self.widths[pair.name] < pair.width]
        dropped = {*self.dropped_rotations} - {*self.basis}
        if lost := [name for name in cut if name in dropped]:
            raise FingerprintError(
                f"the basis of {lost[0]} is not in this plan, which was read from a saved model; "
                "plan again from the path."
            )
        return {name: self.basis[name] for name in cut if name in self.basis}

    @property
    def widths(self) -> dict[str, int]:
        """Units each head keeps, by pair name."""
        return {name: index.shape[1] for name, index in self.kept.items()}

    def masks(self) -> dict[str, Tensor]:
        """The same choice as 0/1 masks: pair name to float32 ``[heads * width]``."""
        return {pair.name: _mask(pair, self.kept[pair.name]).flatten() for pair in self.pairs}

    def __repr__(self) -> str:
        size = self.achieved
        times = "".join(f"{name} {ms:.2f} ms, " for name, ms in self.latency_ms.items())
        return (
            f"Plan(sparsity={size.sparsity:.4f}, params={size.params:,} ({size.params_share:.1%}), "
            f"macs={size.macs:,} ({size.macs_share:.1%}), {times}asked={dict(self.asked)})"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "pairs": [pair.to_dict() for pair in self.pairs],
            "kept": {name: index.tolist() for name, index in self.kept.items()},
            "asked": dict(self.asked),
            "achieved": self.achieved.to_dict(),
            "fingerprint": asdict(self.fingerprint),
            "gains": {name: gain.tolist() for name, gain in self.gains.items()},
            "turned": sorted({*self.basis, *self.dropped_rotations}),
            "latency_ms": dict(self.latency_ms),
        }

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> "Plan":
        """Inverse of `to_dict`. Every index is checked; raises `ValueError` naming the field."""
        try:
            pairs = tuple(Pair.from_dict(pair) for pair in value["pairs"])
            kept = {pair.name: _index(pair, value["kept"][pair.name]) for pair in pairs}
            if set(value["kept"]) != set(kept):
                raise ValueError("kept: names a pair that is not in pairs")
            return cls(
                pairs=pairs,
                kept=kept,
                asked=dict(value["asked"]),
                achieved=Achieved.from_dict(value["achieved"]),
                fingerprint=Fingerprint(**value["fingerprint"]),
                gains={pair.name: _gain(pair, value["gains"]) for pair in pairs if pair.norms},
                dropped_rotations=tuple(str(name) for name in value["turned"]),
                latency_ms={str(n): float(ms) for n, ms in value["latency_ms"].items()},
            )
        except KeyError as error:
            raise ValueError(f"{error.args[0]}: is missing") from error
        except (TypeError, AttributeError) as error:
            raise ValueError(f"plan has a value of the wrong type ({error})") from error


def plan_of(model: object) -> Plan | None:
    """The plan that a model was cut to; None for one that was not extracted."""
    plan = getattr(model, EXTRACTED, None)
    return plan if isinstance(plan, Plan) else None


def _mask(pair: Pair, kept: Tensor) -> Tensor:
    return torch.zeros(pair.heads, pair.width).scatter_(1, kept, 1.0)


def _index(pair: Pair, rows: Any) -> Tensor:
    """Check nested lists of kept units against `pair`; int64 ``[heads, r]``."""
    where = f"kept[{pair.name!r}]"
    if not isinstance(rows, list) or len(rows) != pair.heads:
        raise ValueError(f"{where}: expected {pair.heads} lists, one per head")
    for row in rows:
        if not isinstance(row, list) or len(row) != len(rows[0]):
            raise ValueError(f"{where}: heads must keep the same number of units")
        if any(type(unit) is not int or not 0 <= unit < pair.width for unit in row):
            raise ValueError(f"{where}: units must be integers in 0..{pair.width - 1}")
        if any(a >= b for a, b in pairwise(row)):
            raise ValueError(f"{where}: units must be ascending and distinct")
    return torch.tensor(rows, dtype=torch.int64).view(pair.heads, -1)


def _gain(pair: Pair, gains: Mapping[str, Any]) -> Tensor:
    gain = torch.tensor(gains[pair.name], dtype=torch.float64)
    shape = (pair.heads, pair.left[0].repeat)
    if gain.shape != shape or not gain.isfinite().all():
        raise ValueError(f"gains[{pair.name!r}]: expected finite numbers of shape {shape}")
    return gain


def norm_gain(mask: Tensor, energy: Tensor) -> Tensor:
    """What makes up for channels that a norm over the head no longer sees.

    A norm over the kept channels alone, with the sum of squares divided by the dense width, blows
    them up to the dense energy. Multiplied by the root of the share of the energy that they had,
    queries and keys keep their size on average.

    Args:
        mask: ``[..., heads, width]``.
        energy: ``[heads, query heads per head + 1, width]``, sums of squares of every unit of
            the queries, then of the key.

    Returns:
        ``[..., heads, query heads per head]``, the product of the factors of query and key.
    """
    energy = energy.to(mask)
    share = (mask.unsqueeze(-2) * energy).sum(-1) / energy.sum(-1).clamp(min=1e-30)
    root = share.clamp(min=1e-6).sqrt()
    return root[..., :-1] * root[..., -1:]


def make_plan(
    pairs: Sequence[Pair],
    score: Mapping[str, Tensor],
    costs: CostTable,
    fingerprint: Fingerprint,
    budget: Budget,
    constraints: Constraints,
    energy: Mapping[str, Tensor],
    basis: Mapping[str, Tensor],
) -> Plan:
    """Cut a score to a budget.

    Every pair loses its units by rank, in blocks of `Constraints.multiple_of` ranks. Blocks leave
    in the order of their mean score, and the budget only decides how many leave, so plans with
    equal constraints are nested.

    Args:
        pairs: every pair of the dense model.
        score: pair name to ``[heads, width]``; higher stays longer.
        costs: of the dense model and of its units.
        fingerprint: of the dense model.
        budget: what to cut to.
        constraints: what to respect.
        energy: see `SolutionPath.energy`.
        basis: see `SolutionPath.basis`.

    Raises:
        BudgetError: the budget is out of range or not reachable.
        ConfigError: a pattern of `constraints` matches no pair.
        FingerprintError: the latency table is for a model of other shapes.
    """
    constraints.check_patterns(pairs)
    if budget.latency is not None:
        budget.latency.check(fingerprint.architecture, pairs)
    order = removal_order(
        [groups_by_rank(score[pair.name].double())[0] for pair in pairs],
        [pair.width if constraints.protects(pair) else constraints.min_width for pair in pairs],
        constraints.multiple_of,
    )
    count, latency_ms = blocks_to_remove(budget, pairs, costs, order)
    widths = order.widths_after(pairs, count)
    kept = {pair.name: best_units(score[pair.name], widths[pair.name]) for pair in pairs}
    return Plan(
        pairs=tuple(pairs),
        kept=kept,
        asked={budget.measure: budget.value, **constraints.to_dict()},
        achieved=costs.achieved(pairs, widths),
        fingerprint=fingerprint,
        gains={
            pair.name: norm_gain(_mask(pair, kept[pair.name]).double(), energy[pair.name])
            for pair in pairs
            if pair.norms
        },
        basis=basis,
        latency_ms=latency_ms,
    )


def best_units(score: Tensor, width: int) -> Tensor:
    """The `width` best units of each head, ascending. ``[heads, n] -> int64 [heads, width]``."""
    order = score.argsort(dim=1, descending=True, stable=True)
    return order[:, :width].sort(dim=1).values
