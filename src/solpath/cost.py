"""What units cost, in parameters and multiply-accumulates (MACs), and what widths add up to."""

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
        macs: multiply-accumulates for one sample of the shape seen in the search.
        macs_share: the same as a share of the dense model.
    """

    sparsity: float
    params: int
    params_share: float
    macs: int
    macs_share: float


@dataclass(frozen=True)
class CostTable:
    """Cost of the dense model and of one unit of each pair.

    Attributes:
        params: parameters of the dense model.
        macs: multiply-accumulates of the dense model for one sample.
        sample: name to shape of one input sample the MACs were counted on.
        unit_params: pair name to parameters per unit.
        unit_macs: pair name to MACs per unit and sample.
    """

    params: int
    macs: int
    sample: Mapping[str, tuple[int, ...]]
    unit_params: Mapping[str, int]
    unit_macs: Mapping[str, int]

    def prunable(self, pairs: Sequence[Pair]) -> int:
        """Parameters in all units of `pairs`."""
        return sum(pair.units * self.unit_params[pair.name] for pair in pairs)

    def achieved(self, pairs: Sequence[Pair], widths: Mapping[str, int]) -> Achieved:
        """Size of the model that keeps ``widths[name]`` units in every head of each pair."""
        removed = {p.name: p.heads * (p.width - widths[p.name]) for p in pairs}
        params = sum(self.unit_params[name] * count for name, count in removed.items())
        macs = sum(self.unit_macs[name] * count for name, count in removed.items())
        return Achieved(
            sparsity=params / self.prunable(pairs),
            params=self.params - params,
            params_share=1 - params / self.params,
            macs=self.macs - macs,
            macs_share=1 - macs / self.macs,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> "CostTable":
        """Inverse of `to_dict`."""
        sample = {name: tuple(shape) for name, shape in value["sample"].items()}
        return cls(**{**value, "sample": sample})
