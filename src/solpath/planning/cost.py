"""What units cost in parameters, bytes and multiply-accumulates (MACs), and what widths sum to."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
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
    """

    sparsity: float
    params: int
    params_share: float
    bytes: int
    macs: int
    macs_share: float
    cache: int


@dataclass(frozen=True)
class CostTable:
    """Cost of the dense model and of one unit of each pair.

    Attributes:
        params: parameters of the dense model.
        bytes: of all tensors that it saves, weights and buffers, a tied one once.
        macs: multiply-accumulates of the dense model for one sample.
        cache: bytes of its key-value cache per generated token, in the dtype of the weights.
        sample: name to shape of one input sample the MACs were counted on.
        unit_params: pair name to parameters per unit.
        unit_bytes: pair name to bytes per unit.
        unit_macs: pair name to MACs per unit and sample.
        unit_cache: pair name to bytes of the cache per unit and token.
    """

    params: int
    bytes: int
    macs: int
    cache: int
    sample: Mapping[str, tuple[int, ...]]
    unit_params: Mapping[str, int]
    unit_bytes: Mapping[str, int]
    unit_macs: Mapping[str, int]
    unit_cache: Mapping[str, int]

    def dense(self, measure: str) -> int:
        """The dense model under ``"params"``, ``"bytes"``, ``"macs"`` or ``"cache"``."""
        whole = {"params": self.params, "bytes": self.bytes, "macs": self.macs}
        return (whole | {"cache": self.cache})[measure]

    def unit(self, measure: str) -> Mapping[str, int]:
        """One unit of every pair under ``"params"``, ``"bytes"``, ``"macs"`` or ``"cache"``."""
        units = {"params": self.unit_params, "bytes": self.unit_bytes, "macs": self.unit_macs}
        return (units | {"cache": self.unit_cache})[measure]

    def prunable(self, pairs: Sequence[Pair]) -> int:
        """Parameters in all units of `pairs`."""
        return sum(pair.units * self.unit_params[pair.name] for pair in pairs)

    def achieved(self, pairs: Sequence[Pair], widths: Mapping[str, int]) -> Achieved:
        """Size of the model that keeps ``widths[name]`` units in every head of each pair."""
        removed = {p.name: p.heads * (p.width - widths[p.name]) for p in pairs}
        lost = {
            measure: sum(self.unit(measure)[name] * count for name, count in removed.items())
            for measure in ("params", "bytes", "macs", "cache")
        }
        return Achieved(
            sparsity=lost["params"] / self.prunable(pairs),
            params=self.params - lost["params"],
            params_share=1 - lost["params"] / self.params,
            bytes=self.bytes - lost["bytes"],
            macs=self.macs - lost["macs"],
            macs_share=1 - lost["macs"] / self.macs,
            cache=self.cache - lost["cache"],
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> "CostTable":
        """Inverse of `to_dict`."""
        sample = {name: tuple(shape) for name, shape in value["sample"].items()}
        return cls(**{**value, "sample": sample})
