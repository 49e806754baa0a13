"""Plans: which units every pair keeps at one size, and how a path is cut to a budget."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from solpath.config import check_count
from solpath.errors import BudgetError, ConfigError, FingerprintError
from solpath.pair import Fingerprint, Pair
from solpath.planning.cost import Achieved, CostTable
from solpath.planning.latency_table import LatencyTable


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
        turned: of a plan that was read back: the pairs whose units are along another basis, which
            it no longer has, so that they cannot be found in the dense model.
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
    turned: tuple[str, ...] = ()
    latency_ms: Mapping[str, float] = field(default_factory=dict)

    def turns(self) -> dict[str, Tensor]:
        """The basis of every pair that loses units; pairs that stay whole are not turned.

        Raises:
            FingerprintError: the plan was read from a saved model, which has no use for a basis.
        """
        cut = [pair.name for pair in self.pairs if self.widths[pair.name] < pair.width]
        if lost := [name for name in cut if name in self.turned and name not in self.basis]:
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
            "achieved": asdict(self.achieved),
            "fingerprint": asdict(self.fingerprint),
            "gains": {name: gain.tolist() for name, gain in self.gains.items()},
            "turned": sorted({*self.basis, *self.turned}),
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
                achieved=Achieved(**value["achieved"]),
                fingerprint=Fingerprint(**value["fingerprint"]),
                gains={pair.name: _gain(pair, value["gains"]) for pair in pairs if pair.norms},
                turned=tuple(str(name) for name in value["turned"]),
                latency_ms={str(n): float(ms) for n, ms in value["latency_ms"].items()},
            )
        except KeyError as error:
            raise ValueError(f"{error.args[0]}: is missing") from error
        except (TypeError, AttributeError) as error:
            raise ValueError(f"plan has a value of the wrong type ({error})") from error


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
    energy: Mapping[str, Tensor],
    *,
    sparsity: float | None = None,
    params: float | None = None,
    bytes: float | None = None,
    macs: float | None = None,
    cache: float | None = None,
    latency_ms: float | None = None,
    latency: LatencyTable | None = None,
    multiple_of: int = 1,
    min_width: int = 0,
    protect: Sequence[str] = (),
) -> Plan:
    """Cut a score to a budget. See `SolutionPath.plan` for the arguments.

    Every layer loses its units one rank at a time: the k-th best unit of all its heads together,
    in blocks of `multiple_of` ranks. Blocks leave in the order of their mean score, and the
    budget only decides how many leave, so plans with the same options are nested.

    Args:
        score: pair name to ``[heads, width]``; higher stays longer.
    """
    budgets = {"sparsity": sparsity, "params": params, "bytes": bytes, "macs": macs}
    budgets |= {"cache": cache, "latency_ms": latency_ms}
    name, value = _budget(budgets)
    check_count("multiple_of", multiple_of, 1)
    check_count("min_width", min_width, 0)
    unmatched = [p for p in protect if not any(fnmatchcase(pair.name, p) for pair in pairs)]
    if unmatched:
        raise ConfigError(f"protect pattern {unmatched[0]!r} matches no pair.")

    departures = _departures(pairs, score, multiple_of, min_width, protect)
    times: dict[str, float] = {}
    if name == "latency_ms":
        if latency is None:
            raise BudgetError(
                "latency_ms needs latency=, a table from solpath.measure_latency(model, batch)."
            )
        latency.check(fingerprint.architecture, pairs)
        count, times["predicted"] = _fast_enough(value, latency, pairs, departures)
    elif latency is not None:
        raise BudgetError(f"latency= is a table for latency_ms=, not for {name}=.")
    else:
        count = _nearest(name, value, costs, pairs, departures)
    widths = departures.widths_after(pairs, count)
    kept = {p.name: best_units(score[p.name], widths[p.name]) for p in pairs}
    asked: dict[str, Any] = {name: value, "multiple_of": multiple_of, "min_width": min_width}
    asked["protect"] = list(protect)
    gains = {
        pair.name: norm_gain(_mask(pair, kept[pair.name]).double(), energy[pair.name])
        for pair in pairs
        if pair.norms
    }
    achieved = costs.achieved(pairs, widths)
    return Plan(tuple(pairs), kept, asked, achieved, fingerprint, gains, latency_ms=times)


@dataclass(frozen=True, eq=False)
class Departures:
    """Blocks of ranks in the order they leave; int64 ``[blocks]`` each.

    Attributes:
        owner: index of the pair.
        start: first rank; the pair is as wide as this once the block is gone.
        ranks: ranks of the block, each one unit of every head.
    """

    owner: Tensor
    start: Tensor
    ranks: Tensor

    def widths_after(self, pairs: Sequence[Pair], count: int) -> dict[str, int]:
        """Width of every pair once the first `count` blocks are gone."""
        dense = torch.tensor([pair.width for pair in pairs])
        left = dense.scatter_reduce(0, self.owner[:count], self.start[:count], "amin").tolist()
        return dict(zip((pair.name for pair in pairs), left, strict=True))

    def every_width(self, pairs: Sequence[Pair]) -> dict[str, Tensor]:
        """`widths_after` every count. Pair name to int64 ``[blocks + 1]``."""
        result = {}
        for i, pair in enumerate(pairs):
            width = torch.full((len(self.owner) + 1,), pair.width)
            own = self.owner == i
            width[1:][own] = self.start[own]
            result[pair.name] = width.cummin(0).values
        return result


def _departures(
    pairs: Sequence[Pair],
    score: Mapping[str, Tensor],
    size: int,
    min_width: int,
    protect: Sequence[str],
) -> Departures:
    """Blocks of `size` ranks, the least mean score first, whatever the budget is counted in."""
    means, starts, owners, lengths = [torch.zeros(0).double()], [], [], []
    for i, pair in enumerate(pairs):
        ranks = score[pair.name].double().sort(dim=1, descending=True).values.mean(dim=0)
        start = torch.arange(0, pair.width, size)
        if any(fnmatchcase(pair.name, pattern) for pattern in protect):
            start = start[:0]
        start = start[start >= min_width]
        length = (pair.width - start).clamp(max=size)
        total = torch.nn.functional.pad(ranks.cumsum(0), (1, 0))
        mean = ranks[start] if size == 1 else (total[start + length] - total[start]) / length
        means.append(mean.cummin(0).values)  # whatever rounding does, ranks leave from the end
        starts.append(start)
        owners.append(torch.full_like(start, i))
        lengths.append(length)
    mean, start, owner, ranks = (torch.cat(parts) for parts in (means, starts, owners, lengths))
    order = (-start).argsort(stable=True)  # of equals, the last rank leaves first
    order = order[mean[order].argsort(stable=True)]
    return Departures(owner[order], start[order], ranks[order])


def best_units(score: Tensor, width: int) -> Tensor:
    """The `width` best units of each head, ascending. ``[heads, n] -> int64 [heads, width]``."""
    order = score.argsort(dim=1, descending=True, stable=True)
    return order[:, :width].sort(dim=1).values


def _budget(budgets: Mapping[str, float | None]) -> tuple[str, float]:
    """The one budget that is given."""
    given = {name: value for name, value in budgets.items() if value is not None}
    if len(given) != 1:
        names = ", ".join(given) or "none"
        raise BudgetError(f"give exactly one of {', '.join(budgets)}; got {names}.")
    [(name, value)] = given.items()
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise BudgetError(f"{name} must be a finite number, got {value!r}.")
    return name, value


def _nearest(
    name: str, value: float, costs: CostTable, pairs: Sequence[Pair], departures: Departures
) -> int:
    """How many blocks leave, for the size nearest to a budget in anything that units add up to."""
    target, unit = _target(name, value, costs, pairs)
    each = torch.tensor([pair.heads * unit[pair.name] for pair in pairs])
    step = each[departures.owner] * departures.ranks
    removed = torch.cat([torch.zeros(1, dtype=torch.int64), step.cumsum(0)])
    if removed[-1] < target and target - removed[-1] > 0.5 * max(step.tolist(), default=0):
        smallest = departures.widths_after(pairs, len(step))
        raise BudgetError(_unreachable(name, value, costs.achieved(pairs, smallest), costs))
    return int((removed.double() - target).abs().numpy().argmin())


def _target(
    name: str, value: float, costs: CostTable, pairs: Sequence[Pair]
) -> tuple[float, Mapping[str, int]]:
    """What must be removed, and the unit cost it is counted in."""
    if name == "sparsity":
        if not 0 <= value < 1:
            raise BudgetError(f"sparsity must be in [0, 1), got {value!r}: 0.4 removes 40 %.")
        return value * costs.prunable(pairs), costs.unit_params
    dense = costs.dense(name)
    if not dense:
        raise BudgetError(f"{name} is no budget for this model: it has none.")
    if not 0 < value <= dense:
        raise BudgetError(
            f"{name} must be a share in (0, 1] or a count up to {dense:,}, got {value!r}."
        )
    kept = value * dense if value <= 1 else value
    return dense - kept, costs.unit(name)


def _unreachable(name: str, value: float, smallest: Achieved, costs: CostTable) -> str:
    if name == "sparsity":
        return f"sparsity {value} is not reachable: 0 to {smallest.sparsity:.4f} are."
    dense, low = costs.dense(name), getattr(smallest, name)
    share = low / dense
    return (
        f"{name} {value} is not reachable: {low:,} to {dense:,} are "
        f"({share:.4f} to 1 as a share of the dense model)."
    )


def _fast_enough(
    value: float, table: LatencyTable, pairs: Sequence[Pair], departures: Departures
) -> tuple[int, float]:
    """How few blocks must leave for a predicted latency of `value` or less, and that latency."""
    predicted = table.predict(departures.every_width(pairs))
    fits = (predicted <= value).nonzero()
    if value > predicted[0] or not len(fits):
        raise BudgetError(
            f"latency_ms {value} is not reachable: {predicted.min().item():.2f} to "
            f"{predicted[0].item():.2f} ms are, by the table of latencies."
        )
    count = int(fits[0])
    return count, predicted[count].item()
