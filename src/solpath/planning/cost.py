"""What units cost under every measure, and what the sizes of a model sum to."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from solpath.pair import Pair


@dataclass(frozen=True)
class Achieved:
    """The size of one model under every measure.

    Attributes:
        sparsity: share of the prunable parameters that is removed.
        params: parameters of the whole model.
        params_share: the same as a share of the dense model.
        bytes: of all saved tensors, in the dtype of the model.
        macs: multiply-accumulates for one sample of the shape seen in the search.
        macs_share: the same as a share of the dense model.
        cache: bytes of the key-value cache per generated token; 0 where there is no cache.
        others: by name, under measures that were added to `solpath.model.counting.MEASURES`.
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
        """The size under one measure. Raises `KeyError` for one that was not counted."""
        known = {"params": self.params, "bytes": self.bytes, "macs": self.macs}
        return {**known, "cache": self.cache, **self.others}[measure]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; other measures stand beside the known ones."""
        value = asdict(self)
        others = value.pop("others")
        return {**value, **others}

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> "Achieved":
        """Inverse of `to_dict`. Raises `ValueError` naming what is missing or no number."""
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
    """Cost of the dense model and of one unit of each pair, keyed by measure.

    Attributes:
        dense: measure to what the dense model takes. ``"params"``: parameters; ``"bytes"``: of
            all tensors that it saves, weights and buffers, a tied one once; ``"macs"``:
            multiply-accumulates for one sample; ``"cache"``: bytes of its key-value cache per
            generated token, in the dtype of the weights.
        unit: measure to pair name to what one unit takes.
        sample: name to shape of one input sample that the MACs were counted on.
    """

    dense: Mapping[str, int]
    unit: Mapping[str, Mapping[str, int]]
    sample: Mapping[str, tuple[int, ...]]

    def prunable(self, pairs: Sequence[Pair]) -> int:
        """Parameters in all units of `pairs`."""
        return sum(pair.units * self.unit["params"][pair.name] for pair in pairs)

    def achieved(self, pairs: Sequence[Pair], widths: Mapping[str, int]) -> Achieved:
        """Size of the model that keeps ``widths[name]`` units in every head of each pair."""
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
        """Plain values, for JSON: every measure, and behind ``unit_`` its units."""
        unit = {f"unit_{measure}": dict(value) for measure, value in self.unit.items()}
        return {**self.dense, "sample": dict(self.sample), **unit}

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> "CostTable":
        """Inverse of `to_dict`. Raises `KeyError` or `TypeError` on anything else."""
        measures = [name for name in value if f"unit_{name}" in value]
        if missing := {"params", "bytes", "macs", "cache"} - set(measures):
            raise KeyError(min(missing))
        return cls(
            dense={name: value[name] for name in measures},
            unit={name: dict(value[f"unit_{name}"]) for name in measures},
            sample={name: tuple(shape) for name, shape in value["sample"].items()},
        )
