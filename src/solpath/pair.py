"""Pairs: what can be pruned. In a pair, two linear maps meet in an inner dimension."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

Kind = Literal["qk", "vo", "mlp"]


@dataclass(frozen=True)
class Side:
    """One linear layer of a pair, and the layout of the inner dimension in it.

    The inner dimension runs along the layer's outputs or its inputs, as
    ``[heads, repeat, channels, width]`` with the `heads`, `channels` and `width` of the pair, or as
    ``[heads, repeat, width, channels]`` where the pair is interleaved. Channels of other pairs may
    lie between two heads.

    Attributes:
        module: Dotted name of the layer in the model.
        axis: 0 where units are outputs of the layer (and entries of its bias), 1 where they are
            inputs.
        repeat: Heads of this layer per head of the pair: query heads per key-value head under
            grouped queries, otherwise 1.
        offset: Index of the first inner channel in the layer. It is above 0 for keys and values
            in a fused query-key-value projection.
        step: Channels from one head of the layer to the next; 0 where they are adjacent.
        pitch: Channels from the first head of the layer in one head of the pair to that in the
            next; 0 where it is ``repeat`` steps.
    """

    module: str
    axis: Literal[0, 1]
    repeat: int = 1
    offset: int = 0
    step: int = 0
    pitch: int = 0


@dataclass(frozen=True)
class Norm:
    """A norm over every head of the queries or of the keys.

    Attributes:
        module: Dotted name of the norm in the model.
        heads_dim: Dimension of its input that runs over the heads, -2 or -3.
    """

    module: str
    heads_dim: int


@dataclass(frozen=True)
class Pair:
    """Two linear maps that meet in an inner dimension of ``heads * width`` units.

    Attributes:
        name: Name of the pair, unique in the model, such as ``encoder.layer.0.attention.qk``.
        kind: ``"qk"`` (query-key), ``"vo"`` (value-output) or ``"mlp"`` (fc1-fc2).
        heads: Heads, each of which keeps the same number of units: key-value heads, or 1 for
            ``mlp``.
        width: Units per head in the dense model.
        left: The layers before the inner dimension: query; value; fc1, or gate and up.
        right: The layer after it: output; fc2. For ``qk`` it is the key projection.
        cost: Parameters that leave with one unit, biases included.
        channels: Inner channels per unit and head: 2 for a rotary couple, otherwise 1.
        cache: Elements of the key-value cache that one unit takes per token.
        norms: The norm of the queries and that of the keys, where the heads are normalised;
            otherwise empty.
        interleaved: Whether the channels of one unit are neighbours; otherwise they are `width`
            apart.

    Example:
        >>> pair = path.pairs[0]
        >>> pair.name, pair.kind, pair.heads, pair.width, pair.cost
        ('bert.encoder.layer.0.attention.qk', 'qk', 4, 8, 66)
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
    interleaved: bool = False

    @property
    def units(self) -> int:
        """Number of units in all heads."""
        return self.heads * self.width

    @property
    def sides(self) -> tuple[Side, ...]:
        """All layers that are cut, the right-hand one last."""
        return (*self.left, self.right)

    @property
    def mask_side(self) -> Side:
        """The layer whose output (axis 0) or input (axis 1) is multiplied by the mask."""
        return self.left[0] if self.kind == "qk" else self.right

    def channel_index(self, side: Side, kept: Tensor) -> Tensor:
        """Return the positions in `side` of the inner channels of some units.

        Args:
            side: One of `sides`.
            kept: Kept units of every head, int64 ``[heads, r]``.

        Returns:
            int64 ``[heads * repeat * channels * r]``, in the order of `unit_of_channel`. In the
            smaller layer they stand in ascending order.

        Example:
            >>> query, key = Side("query", 0), Side("key", 0)
            >>> pair = Pair("qk", "qk", heads=2, width=4, left=(query,), right=key, cost=10)
            >>> pair.channel_index(key, torch.tensor([[0, 3], [1, 2]])).tolist()
            [0, 3, 5, 6]
        """
        step = side.step or self.channels * self.width
        head = torch.arange(self.heads).view(-1, 1, 1, 1) * (side.pitch or side.repeat * step)
        copy = torch.arange(side.repeat).view(-1, 1, 1) * step
        apart, stride = (1, self.channels) if self.interleaved else (self.width, 1)
        channel = torch.arange(self.channels).view(-1, 1) * apart
        unit = kept.view(self.heads, 1, 1, -1) * stride
        return (side.offset + head + copy + channel + unit).flatten()

    def channels_of(self, side: Side) -> Tensor:
        """Return the positions in `side` of all inner channels, in the order of `unit_of_channel`.

        Args:
            side: One of `sides`.
        """
        return self.channel_index(side, torch.arange(self.width).repeat(self.heads, 1))

    def unit_of_channel(self, side: Side) -> Tensor:
        """Return the unit that every inner channel of `side` belongs to, see `channels_of`.

        Args:
            side: One of `sides`.

        Returns:
            Index into the units of all heads laid end to end,
            int64 ``[heads * repeat * channels * width]``.
        """
        unit = torch.arange(self.units).view(self.heads, 1, 1, self.width)
        return unit.expand(-1, side.repeat, self.channels, -1).flatten()

    def to_dict(self) -> dict[str, Any]:
        """Return the pair as plain values, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> "Pair":
        """Return the pair that `to_dict` described.

        Args:
            value: What `to_dict` returned, also after a round trip through JSON.

        Raises:
            KeyError: A layer or the norms are missing.
            TypeError: Another field is missing or unknown, or a layer is not a mapping.
        """
        left = tuple(Side(**side) for side in value["left"])
        right, norms = Side(**value["right"]), tuple(Norm(**norm) for norm in value["norms"])
        return cls(**{**value, "left": left, "right": right, "norms": norms})


@dataclass(frozen=True)
class Fingerprint:
    """What a path or a plan remembers of its dense model, to recognise it.

    Attributes:
        architecture: Class name of the model.
        digests: Pair name to the first digits of a SHA-256 of the weights and biases of its
            layers.
    """

    architecture: str
    digests: Mapping[str, str]

    def differences(self, other: "Fingerprint") -> str:
        """Return in words how `other` differs, or an empty string when it does not.

        Args:
            other: The fingerprint to compare with, of the model at hand.
        """
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
