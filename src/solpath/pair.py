"""What can be pruned: pairs of linear maps that meet in an inner dimension nobody outside sees."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

Kind = Literal["qk", "vo", "mlp"]


@dataclass(frozen=True)
class Side:
    """One linear layer of a pair and how its inner dimension is laid out.

    The inner dimension is the layer's rows (outputs) or columns (inputs), in the order
    ``[heads, repeat, channels, width]`` with `heads`, `channels`, `width` from the pair.

    Attributes:
        module: dotted path of the layer in the model.
        axis: 0 when a unit is outputs of the layer (with their bias), 1 when it is inputs.
        repeat: heads of this layer per head of the pair (query heads per key-value head).
        offset: first of its channels in the layer; above 0 in fused query-key-value projections.
    """

    module: str
    axis: Literal[0, 1]
    repeat: int = 1
    offset: int = 0


@dataclass(frozen=True)
class Norm:
    """A norm over every head of the queries or of the keys.

    Attributes:
        module: dotted path in the model.
        heads_dim: the dimension of its input that runs over heads, -2 or -3.
    """

    module: str
    heads_dim: int


@dataclass(frozen=True)
class Pair:
    """Two linear maps sharing `heads * width` removable units.

    Attributes:
        name: unique in the model, for example ``encoder.layer.0.attention.qk``.
        kind: ``"qk"`` (query-key), ``"vo"`` (value-output) or ``"mlp"`` (fc1-fc2).
        heads: heads that each keep the same number of units (key-value heads; 1 for ``mlp``).
        width: units per head in the dense model.
        left: the layers before the inner dimension (query; value; fc1, or gate and up).
        right: the layer after it (output; fc2). For ``qk`` it is the key projection.
        cost: parameters, biases included, that removing one unit removes.
        channels: inner channels per unit and head: 2 for a rotary couple, otherwise 1.
        cache: elements of the key-value cache, per token, that one unit takes.
        norms: the norm of the query and that of the key between projection and logits, if any.
    """

    name: str
    kind: Kind
    heads: int
    width: int
    left: tuple[Side, ...]
    right: Side
    cost: int
    channels: int = 1
    cache: int = 0
    norms: tuple[Norm, ...] = ()

    @property
    def units(self) -> int:
        """Number of removable units."""
        return self.heads * self.width

    @property
    def sides(self) -> tuple[Side, ...]:
        """Every layer that is cut."""
        return (*self.left, self.right)

    @property
    def mask_side(self) -> Side:
        """The layer whose input (axis 1) or output (axis 0) carries the mask."""
        return self.left[0] if self.kind == "qk" else self.right

    def channel_index(self, side: Side, kept: Tensor) -> Tensor:
        """Inner channels of `side` that belong to the units `kept`.

        Args:
            side: one of `sides`.
            kept: int64 ``[heads, r]``, kept unit of each head.

        Returns:
            int64 ``[heads * repeat * channels * r]``, in the layout of the smaller layer.
        """
        first = torch.arange(self.heads * side.repeat * self.channels) * self.width + side.offset
        first = first.view(self.heads, side.repeat, self.channels, 1)
        return (first + kept.view(self.heads, 1, 1, -1)).flatten()

    def unit_of_channel(self, side: Side) -> Tensor:
        """For every inner channel of `side`, the flat index of its unit. int64 ``[channels]``."""
        unit = torch.arange(self.units).view(self.heads, 1, 1, self.width)
        return unit.expand(-1, side.repeat, self.channels, -1).flatten()

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> "Pair":
        """Inverse of `to_dict`. Raises `KeyError` or `TypeError` on anything else."""
        left = tuple(Side(**side) for side in value["left"])
        right, norms = Side(**value["right"]), tuple(Norm(**norm) for norm in value["norms"])
        return cls(**{**value, "left": left, "right": right, "norms": norms})


@dataclass(frozen=True)
class Fingerprint:
    """Which model a path belongs to.

    Attributes:
        architecture: class name of the model.
        digests: pair name to a SHA-256 prefix of the weights and biases of its layers.
    """

    architecture: str
    digests: Mapping[str, str]

    def differences(self, other: "Fingerprint") -> str:
        """What differs from `other`, in words; empty when nothing does."""
        if self.architecture != other.architecture:
            return f"the class is {other.architecture}, not {self.architecture}"
        if set(self.digests) != set(other.digests):
            names = sorted(set(self.digests) ^ set(other.digests))
            return f"the pairs differ, for example {names[0]}"
        changed = [n for n, digest in self.digests.items() if other.digests[n] != digest]
        if changed:
            share = f"{len(changed)} of {len(self.digests)} pairs"
            return f"the weights differ in {share}, first {changed[0]}"
        return ""
