"""Plans: which units every pair keeps at one size."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from solpath.errors import ConfigError, FingerprintError
from solpath.pair import Fingerprint, Pair, pairs_from
from solpath.planning.constraint_cost import ConstraintCost
from solpath.planning.constraints import attention_of
from solpath.planning.cost import Achieved

EXTRACTED = "solpath_plan"
"""Name of the attribute of an extracted model that holds its plan."""


@dataclass(frozen=True, eq=False)
class Plan:
    """The units that one member keeps.

    Attributes:
        pairs: Every pair of the dense model.
        kept: Pair name to the kept units of every kept head, int64 ``[kept heads, r]``, ascending.
            r may be 0.
        asked: The budget and the constraints.
        achieved: The size under every measure.
        fingerprint: Identity of the dense model.
        gains: For pairs with norms over the heads, pair name to the gains of the normed queries,
            float64 ``[heads, query heads per head]`` (see `norm_gain`).
        basis: See `SolutionPath.basis`.
        dropped_rotations: Names of pairs that were rotated to a basis which is not in this plan,
            because the plan was read from a saved model. Their units cannot be found in the dense
            model.
        latency_ms: For a latency budget, milliseconds of one forward pass: ``"predicted"`` by the
            table and, from `plan_for_latency`, ``"measured"`` on the extracted model.
        unreached: See `SolutionPath.unreached`.
        heads: For pairs that lose whole heads, pair name to the heads that are kept, int64
            ``[kept heads]``, ascending. All others keep all heads.
        constraint_cost: What the constraints cost; None where there are none.

    Example:
        >>> plan = path.plan(sparsity=0.5, protect=["*layer.0.*"])
        >>> [width for name, width in plan.widths.items() if ".layer.0." in name]
        [8, 8, 64]
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
    unreached: tuple[str, ...] = ()
    heads: Mapping[str, Tensor] = field(default_factory=dict)
    constraint_cost: ConstraintCost | None = None

    def units_of(self, pair: Pair) -> Tensor:
        """Return the units of a pair that the plan keeps: all of them, if it is not in `pairs`.

        Args:
            pair: A pair of the dense model.

        Returns:
            int64 ``[kept heads, r]``, ascending.
        """
        if pair.name in self.kept:
            return self.kept[pair.name]
        return torch.arange(pair.width).expand(pair.heads, -1)

    def rotations(self) -> dict[str, Tensor]:
        """Return the basis of every pair that loses units. A pair that keeps all is not rotated.

        Raises:
            FingerprintError: The basis is not in this plan, which was read from a saved model.
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
        """Units that every kept head keeps, by pair name."""
        return {name: index.shape[1] for name, index in self.kept.items()}

    def masks(self) -> dict[str, Tensor]:
        """Return the plan as masks of 0 and 1: pair name to float32 ``[heads * width]``."""
        return {pair.name: self._mask(pair).flatten() for pair in self.pairs}

    def _mask(self, pair: Pair) -> Tensor:
        return unit_mask(pair, self.kept[pair.name], self.heads.get(pair.name))

    def __repr__(self) -> str:
        size = self.achieved
        whole = f"{len(self.unreached)} unreached pairs whole, " if self.unreached else ""
        cost = self.constraint_cost
        whole += "" if cost is None else f"{cost.kept_score:.1%} of the score, "
        asked = [name for name in self.asked if name in {"bytes", "cache", *size.others}]
        sizes = "".join(f"{name}={size.size(name):,}, " for name in asked)
        times = "".join(f"{name} {ms:.2f} ms, " for name, ms in self.latency_ms.items())
        return (
            f"Plan(sparsity={size.sparsity:.4f}, params={size.params:,} ({size.params_share:.1%}), "
            f"macs={size.macs:,} ({size.macs_share:.1%}), {sizes}{times}{whole}"
            f"asked={dict(self.asked)})"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as plain values, for JSON: of a basis, only the names of its pairs."""
        return {
            "pairs": [pair.to_dict() for pair in self.pairs],
            "kept": {name: index.tolist() for name, index in self.kept.items()},
            "asked": dict(self.asked),
            "achieved": self.achieved.to_dict(),
            "fingerprint": asdict(self.fingerprint),
            "gains": {name: gain.tolist() for name, gain in self.gains.items()},
            "turned": sorted({*self.basis, *self.dropped_rotations}),
            "latency_ms": dict(self.latency_ms),
            **({"unreached": list(self.unreached)} if self.unreached else {}),
            **(
                {"heads": {n: index.tolist() for n, index in self.heads.items()}}
                if self.heads
                else {}
            ),
            **({"constraint_cost": cost.to_dict()} if (cost := self.constraint_cost) else {}),
        }

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> "Plan":
        """Return the plan that `to_dict` described, without its basis. Every index is checked.

        Args:
            value: What `to_dict` returned, also after a round trip through JSON.

        Raises:
            ValueError: A field is missing or wrong. The message names it.
        """
        try:
            pairs = pairs_from(value["pairs"])
            named = {pair.name: pair for pair in pairs}
            if {*value["kept"], *value.get("heads", {})} - set(named):
                raise ValueError("kept or heads: names a pair that is not in pairs")
            heads = {n: _heads(named[n], index) for n, index in value.get("heads", {}).items()}
            _check_together(pairs, heads)
            kept = {
                n: _index(pair, value["kept"][n], len(heads.get(n, range(pair.heads))))
                for n, pair in named.items()
            }
            cost = value.get("constraint_cost")
            return cls(
                pairs=pairs,
                kept=kept,
                asked=dict(value["asked"]),
                achieved=Achieved.from_dict(value["achieved"]),
                fingerprint=Fingerprint.from_dict(value["fingerprint"]),
                gains={pair.name: _gain(pair, value["gains"]) for pair in pairs if pair.norms},
                dropped_rotations=tuple(str(name) for name in value["turned"]),
                latency_ms={str(n): float(ms) for n, ms in value["latency_ms"].items()},
                unreached=tuple(str(name) for name in value.get("unreached", ())),
                heads=heads,
                constraint_cost=None if cost is None else ConstraintCost.from_dict(cost),
            )
        except KeyError as error:
            raise ValueError(f"{error.args[0]}: is missing") from error
        except (TypeError, AttributeError) as error:
            raise ValueError(f"plan has a value of the wrong type ({error})") from error


def plan_of(model: object) -> Plan | None:
    """Return the plan that a model was cut to, or None if it was not extracted.

    Args:
        model: Any object.

    Example:
        >>> plan_of(model) is None, round(plan_of(small).achieved.sparsity, 1)
        (True, 0.5)
    """
    plan = getattr(model, EXTRACTED, None)
    return plan if isinstance(plan, Plan) else None


def check_plan(plan: Any) -> None:
    """Raise `ConfigError` unless `plan` is a plan.

    Args:
        plan: What a user gave.
    """
    if not isinstance(plan, Plan):
        raise ConfigError(
            f"plan must be a Plan, got a {type(plan).__name__}; make one of the path with "
            "path.plan(sparsity=0.4)."
        )


def unit_mask(pair: Pair, kept: Tensor, heads: Tensor | None = None) -> Tensor:
    """Return a mask of 0 and 1, ``[heads, width]``.

    Args:
        pair: A pair of the dense model.
        kept: See `Plan.kept`.
        heads: See `Plan.heads`. None is all.
    """
    mask = torch.zeros(pair.heads, pair.width)
    if heads is None:
        return mask.scatter_(1, kept, 1.0)
    return mask.index_copy_(0, heads, torch.zeros(kept.shape[0], pair.width).scatter_(1, kept, 1.0))


def _heads(pair: Pair, index: Any) -> Tensor:
    """Check a list of kept heads against `pair` and return it as int64 ``[kept heads]``."""
    where = f"heads[{pair.name!r}]"
    if pair.kind not in ("qk", "vo") or not isinstance(index, list) or not index:
        raise ValueError(f"{where}: expected a list of heads, of an attention")
    if any(type(head) is not int or not 0 <= head < pair.heads for head in index):
        raise ValueError(f"{where}: heads must be integers in 0..{pair.heads - 1}")
    if any(a >= b for a, b in pairwise(index)):
        raise ValueError(f"{where}: heads must be ascending and distinct")
    return torch.tensor(index, dtype=torch.int64)


def _check_together(pairs: Sequence[Pair], heads: Mapping[str, Tensor]) -> None:
    """Raise `ValueError` unless the pairs of one attention keep the same heads."""
    found: dict[str, list[int] | None] = {}
    for pair in pairs:
        own = heads[pair.name].tolist() if pair.name in heads else None
        if pair.kind in ("qk", "vo") and found.setdefault(attention_of(pair), own) != own:
            raise ValueError(f"heads[{pair.name!r}]: the pairs of an attention keep the same heads")


def _index(pair: Pair, rows: Any, heads: int) -> Tensor:
    """Check nested lists of kept units against `pair` and return them as int64 ``[heads, r]``."""
    where = f"kept[{pair.name!r}]"
    if not isinstance(rows, list) or len(rows) != heads:
        raise ValueError(f"{where}: expected {heads} lists, one per head")
    for row in rows:
        if not isinstance(row, list) or len(row) != len(rows[0]):
            raise ValueError(f"{where}: heads must keep the same number of units")
        if any(type(unit) is not int or not 0 <= unit < pair.width for unit in row):
            raise ValueError(f"{where}: units must be integers in 0..{pair.width - 1}")
        if any(a >= b for a, b in pairwise(row)):
            raise ValueError(f"{where}: units must be ascending and distinct")
    return torch.tensor(rows, dtype=torch.int64).view(heads, -1)


def _gain(pair: Pair, gains: Mapping[str, Any]) -> Tensor:
    """Check the gains of `pair` and return them as float64 ``[heads, query heads per head]``."""
    gain = torch.tensor(gains[pair.name], dtype=torch.float64)
    shape = (pair.heads, pair.left[0].repeat)
    if gain.shape != shape or not gain.isfinite().all():
        raise ValueError(f"gains[{pair.name!r}]: expected finite numbers of shape {shape}")
    return gain


def norm_gain(mask: Tensor, energy: Tensor) -> Tensor:
    """Return the gain that makes up for channels that a norm over the heads no longer sees.

    The norm runs over the kept channels and still divides by the dense width, so it scales them up
    to the energy of all. Multiplied by the root of the share of the energy that they had, queries
    and keys keep their size on average (docs/method.md, "What is removed").

    Args:
        mask: Mask of the units, ``[..., heads, width]``. Half precision is computed in float32,
            because sums of squares exceed its range.
        energy: Sums of squares of every unit of the queries, then of the key,
            ``[heads, query heads per head + 1, width]``.

    Returns:
        The product of the factors of query and key, ``[..., heads, query heads per head]``, in
        float32 at least.

    Example:
        >>> mask, energy = torch.tensor([[1.0, 0.0]]), torch.tensor([[[3.0, 1.0], [3.0, 1.0]]])
        >>> norm_gain(mask, energy).tolist()
        [[0.75]]
    """
    mask = mask.to(torch.promote_types(mask.dtype, torch.float32))
    energy = energy.to(mask)
    share = (mask.unsqueeze(-2) * energy).sum(-1) / energy.sum(-1).clamp(min=1e-30)
    root = share.clamp(min=1e-6).sqrt()
    return root[..., :-1] * root[..., -1:]


def best_units(score: Tensor, width: int) -> Tensor:
    """Return the best units of every head, in ascending order of their index.

    Args:
        score: Score of every unit, ``[heads, n]``. Of equal scores, the earlier unit wins.
        width: Units that every head keeps.

    Returns:
        int64 ``[heads, width]``.
    """
    order = score.argsort(dim=1, descending=True, stable=True)
    return order[:, :width].sort(dim=1).values
