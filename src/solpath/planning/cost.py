"""What units cost under every measure, and what the units of a member add up to."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from solpath.pair import Pair
from solpath.reading import whole


@dataclass(frozen=True)
class Achieved:
    """The size of one member under every measure.

    Attributes:
        sparsity: Share of the prunable parameters that is removed.
        params: Parameters of the whole model.
        params_share: `params` as a share of the dense model's.
        bytes: Bytes of all saved tensors, in the dtype of the dense model.
        macs: Multiply-accumulates for one sample of the shape seen in the search.
        macs_share: `macs` as a share of the dense model's.
        cache: Bytes of the key-value cache per generated token; 0 where there is no cache.
        others: Sizes under the measures that were added to `solpath.model.counting.MEASURES`, by
            name.
    """

    sparsity: float
    params: int
    params_share: float
    bytes: int
    macs: int
    macs_share: float
    cache: int
    others: Mapping[str, int] = field(default_factory=dict)

    def size(self, measure: str) -> int:
        """Return the size under one measure.

        Args:
            measure: Name of the measure.

        Raises:
            KeyError: The measure was not counted.
        """
        known = {"params": self.params, "bytes": self.bytes, "macs": self.macs}
        return {**known, "cache": self.cache, **self.others}[measure]

    def to_dict(self) -> dict[str, Any]:
        """Return the sizes as plain values, for JSON. Added measures stand beside the others."""
        value = asdict(self)
        others = value.pop("others")
        return {**value, **others}

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> "Achieved":
        """Return the sizes that `to_dict` described.

        Args:
            value: What `to_dict` returned, also after a round trip through JSON.

        Raises:
            ValueError: A size is missing or not a number. The message names it.
        """
        for name, number in value.items():
            if type(number) not in (int, float):
                raise ValueError(f"achieved.{name} is not a number")
        known = cls.__dataclass_fields__.keys() - {"others"}
        if missing := sorted(known - value.keys()):
            raise ValueError(f"achieved.{missing[0]} is missing")
        others = {name: number for name, number in value.items() if name not in known}
        return cls(**{name: value[name] for name in known}, others=others)


@dataclass(frozen=True)
class CostTable:
    """What the dense model and one unit of every pair cost, by measure.

    Attributes:
        dense: Measure to what the dense model takes. ``"params"`` counts parameters. ``"bytes"``
            counts bytes of all saved tensors, parameters and buffers, a tied one once. ``"macs"``
            counts multiply-accumulates for one sample. ``"cache"`` counts bytes of the key-value
            cache per generated token, in the dtype of the weights.
        unit: Measure to pair name to what one unit takes.
        sample: Name to shape of every tensor of the sample on which ``"macs"`` was counted.

    Example:
        >>> path.costs.dense["params"], path.costs.prunable(path.pairs)
        (37922, 16704)
    """

    dense: Mapping[str, int]
    unit: Mapping[str, Mapping[str, int]]
    sample: Mapping[str, tuple[int, ...]]

    def only(self, pairs: Sequence[Pair]) -> "CostTable":
        """Return the table without the units of other pairs.

        Args:
            pairs: Some of the pairs of the model.
        """
        names = [pair.name for pair in pairs]
        unit = {measure: {n: value[n] for n in names} for measure, value in self.unit.items()}
        return CostTable(self.dense, unit, self.sample)

    def prunable(self, pairs: Sequence[Pair]) -> int:
        """Return the number of parameters in all units.

        Args:
            pairs: Every pair of the dense model.
        """
        return sum(pair.units * self.unit["params"][pair.name] for pair in pairs)

    def achieved(self, pairs: Sequence[Pair], widths: Mapping[str, int]) -> Achieved:
        """Return the size of the member in which the heads have the given widths.

        Args:
            pairs: Every pair of the dense model.
            widths: Pair name to the units that every head keeps.
        """
        removed = {p.name: p.heads * (p.width - widths[p.name]) for p in pairs}
        lost = {
            measure: sum(unit[name] * count for name, count in removed.items())
            for measure, unit in self.unit.items()
        }
        left = {measure: whole - lost[measure] for measure, whole in self.dense.items()}
        return Achieved(
            sparsity=lost["params"] / self.prunable(pairs),
            params=left.pop("params"),
            params_share=1 - lost["params"] / self.dense["params"],
            bytes=left.pop("bytes"),
            macs=left.pop("macs"),
            macs_share=1 - lost["macs"] / self.dense["macs"],
            cache=left.pop("cache"),
            others=left,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the costs as plain values, for JSON. Unit costs are under ``unit_<measure>``."""
        unit = {f"unit_{measure}": dict(value) for measure, value in self.unit.items()}
        return {**self.dense, "sample": dict(self.sample), **unit}

    @classmethod
    def from_dict(cls, value: Mapping[str, Any], pairs: Sequence[Pair]) -> "CostTable":
        """Return the costs that `to_dict` described.

        Args:
            value: What `to_dict` returned, also after a round trip through JSON.
            pairs: Every pair that has units in it.

        Raises:
            KeyError: A measure or the sample is missing.
            TypeError: A field is not of its type.
            ValueError: A number cannot be what it is said to be. The message names the measure.
        """
        measures = [name for name in value if f"unit_{name}" in value]
        if missing := {"params", "bytes", "macs", "cache"} - set(measures):
            raise KeyError(min(missing))
        names = {pair.name for pair in pairs}
        for measure in measures:
            unit, dense = value[f"unit_{measure}"], value[measure]
            if set(unit) != names:
                raise ValueError(f"costs.unit_{measure}: must name every pair")
            units = sum(pair.units * whole(unit[pair.name]) for pair in pairs)
            if units > whole(dense) or (measure in ("params", "macs") and not dense):
                raise ValueError(f"costs.{measure}: {dense} is less than all units together, or 0")
        if not sum(value["unit_params"].values()):
            raise ValueError("costs.unit_params: no unit has any")
        return cls(
            dense={name: value[name] for name in measures},
            unit={name: dict(value[f"unit_{name}"]) for name in measures},
            sample={n: tuple(whole(size) for size in s) for n, s in value["sample"].items()},
        )
