"""Pairs: what can be pruned. In a pair, two linear maps meet in an inner dimension."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from solpath.reading import whole

Kind = Literal["qk", "vo", "mlp", "experts"]


@dataclass(frozen=True)
class Side:
    """One linear layer of a pair, and the layout of the inner dimension in it.

    The inner dimension runs along the layer's outputs or its inputs, as
    ``[heads, repeat, channels, width]`` with the `heads`, `channels` and `width` of the pair, or as
    ``[heads, repeat, width, channels]`` where the pair is interleaved. Channels of other pairs may
    lie between two heads. The experts of a mixture are one layer, whose channels are those of one
    expert after the other.

    Attributes:
        module: Dotted name of the layer in the model; of experts, that of their weights.
        axis: 0 where units are outputs of the layer (and entries of its bias), 1 where they are
            inputs.
        repeat: Heads of this layer per head of the pair: query heads per key-value head under
            grouped queries, otherwise 1.
        offset: Index of the first inner channel in the layer. It is above 0 for keys and values
            in a fused query-key-value projection.
        step: Channels from one head of the layer to the next; 0 where they are adjacent.
        pitch: Channels from the first head of the layer in one head of the pair to that in the
            next; 0 where it is ``repeat`` steps.
        stride: Channels from one unit to the next. It is 2 where gate and up of experts alternate.
    """

    module: str
    axis: Literal[0, 1]
    repeat: int = 1
    offset: int = 0
    step: int = 0
    pitch: int = 0
    stride: int = 1


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
        kind: ``"qk"`` (query-key), ``"vo"`` (value-output), ``"mlp"`` (fc1-fc2) or ``"experts"``
            (the MLPs of a mixture).
        heads: Heads, each of which keeps the same number of units: key-value heads, experts, or 1
            for ``mlp``.
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

    def channel_index(self, side: Side, kept: Tensor, heads: Tensor | None = None) -> Tensor:
        """Return the positions in `side` of the inner channels of some units.

        Args:
            side: One of `sides`.
            kept: Kept units of every kept head, int64 ``[kept heads, r]``.
            heads: The heads that are kept, int64 ``[kept heads]``. None is all.

        Returns:
            int64 ``[kept heads * repeat * channels * r]``, in the order of `unit_of_channel`. In
            the smaller layer they stand in ascending order.

        Example:
            >>> query, key = Side("query", 0), Side("key", 0)
            >>> pair = Pair("qk", "qk", heads=2, width=4, left=(query,), right=key, cost=10)
            >>> pair.channel_index(key, torch.tensor([[0, 3], [1, 2]])).tolist()
            [0, 3, 5, 6]
        """
        step = side.step or self.channels * self.width
        heads = torch.arange(self.heads) if heads is None else heads
        head = heads.view(-1, 1, 1, 1) * (side.pitch or side.repeat * step)
        copy = torch.arange(side.repeat).view(-1, 1, 1) * step
        apart, stride = (1, self.channels) if self.interleaved else (self.width, 1)
        channel = torch.arange(self.channels).view(-1, 1) * apart
        unit = kept.view(len(heads), 1, 1, kept.shape[1]) * (stride * side.stride)
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
            ValueError: A field has a value that no pair can have. The message names it.
        """
        left = tuple(_side(side) for side in value["left"])
        right, norms = _side(value["right"]), tuple(_norm(norm) for norm in value["norms"])
        pair = cls(**{**value, "left": left, "right": right, "norms": norms})
        if not left or len(norms) not in (0, 2) or pair.kind not in get_args(Kind):
            raise ValueError("pairs: a pair needs a kind, layers on its left, and no norm or two")
        if not isinstance(pair.name, str) or type(pair.interleaved) is not bool:
            raise ValueError(f"pairs: {pair.name!r} has a name or interleaved of a wrong type")
        for number, least in ((pair.cache, 0), *((n, 1) for n in (pair.heads, pair.width))):
            whole(number, least)
        for number in (pair.cost, pair.channels):
            whole(number, 1)
        return pair


def pairs_from(values: Sequence[Mapping[str, Any]]) -> tuple[Pair, ...]:
    """Return the pairs that `Pair.to_dict` described.

    Args:
        values: What `Pair.to_dict` returned, for every pair.

    Raises:
        KeyError, TypeError, ValueError: See `Pair.from_dict`; also if two have one name, or there
            are none.
    """
    pairs = tuple(Pair.from_dict(value) for value in values)
    if not pairs or len({pair.name for pair in pairs}) < len(pairs):
        raise ValueError("pairs: there are none, or two have one name")
    return pairs


def flatten(pairs: Sequence[Pair], values: Mapping[str, Tensor]) -> Tensor:
    """Lay the values of all pairs end to end: ``{name: [heads, width]}`` to ``[units]``.

    Args:
        pairs: Every pair, in the order of the units.
        values: Pair name to a value for every unit.
    """
    return torch.cat([values[pair.name].flatten() for pair in pairs])


def unflatten(pairs: Sequence[Pair], values: Tensor) -> dict[str, Tensor]:
    """Split the values of all units by pair: ``[units]`` to ``{name: [heads, width]}``.

    Args:
        pairs: Every pair, in the order of the units.
        values: A value for every unit.
    """
    parts = torch.split(values, [pair.units for pair in pairs])
    return {p.name: part.view(p.heads, p.width) for p, part in zip(pairs, parts, strict=True)}


def _side(value: Mapping[str, Any]) -> Side:
    side = Side(**value)
    for number, least in ((side.repeat, 1), (side.offset, 0), (side.step, 0), (side.pitch, 0)):
        whole(number, least)
    whole(side.stride, 1)
    if not isinstance(side.module, str) or whole(side.axis) > 1:
        raise ValueError(f"pairs: {side.module!r} is no name of a layer, or its axis not 0 or 1")
    return side


def _norm(value: Mapping[str, Any]) -> Norm:
    norm = Norm(**value)
    if not isinstance(norm.module, str) or norm.heads_dim not in (-2, -3):
        raise ValueError(f"pairs: {norm.module!r} is no name of a norm, or heads_dim not -2 or -3")
    return norm


@dataclass(frozen=True)
class Fingerprint:
    """What a path or a plan remembers of its dense model, to recognise it.

    Attributes:
        architecture: Class name of the model.
        digests: Pair name to the first digits of a SHA-256 of the weights and biases of its
            layers.
        dtype: The dtypes that these weights had, such as ``"bfloat16"``, sorted and joined by
            commas. It is empty in version 1.
        version: How `digests` were made, 1 or 2. Those of version 2 are equal for equal numbers,
            whatever dtype holds them; those of version 1 hold for one dtype. See
            docs/file-formats.md.
    """

    architecture: str
    digests: Mapping[str, str]
    dtype: str = ""
    version: int = 1

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> "Fingerprint":
        """Return the fingerprint that `dataclasses.asdict` described.

        Args:
            value: The dict, also after a round trip through JSON.

        Raises:
            TypeError: A field is missing or unknown, or not of its type.
            ValueError: The version is unknown.
        """
        found = cls(**value)
        texts = [found.architecture, found.dtype, *found.digests, *dict(found.digests).values()]
        if not all(isinstance(text, str) for text in texts):
            raise TypeError("fingerprint: the class, the dtype and all digests must be texts")
        if whole(found.version, 1) > 2:
            raise ValueError(f"fingerprint: version {found.version} is unknown, update solpath")
        return found

    def differences(self, other: "Fingerprint") -> str:
        """Return in words how `other` differs, or an empty string when it does not.

        Args:
            other: The fingerprint to compare with, of the model at hand and of the same version.
        """
        if self.architecture != other.architecture:
            return f"the class is {other.architecture}, not {self.architecture}"
        if set(self.digests) != set(other.digests):
            names = sorted(set(self.digests) ^ set(other.digests))
            return f"the pairs differ, for example {names[0]}"
        changed = [n for n, digest in self.digests.items() if other.digests[n] != digest]
        if not changed:
            return ""
        share = f"{len(changed)} of {len(self.digests)} pairs"
        found = f"the weights differ in {share}, first {changed[0]}"
        if self.dtype == other.dtype:
            return found
        if self.version == 1:
            return (
                f"{found}; its digests are of an older version and fit one dtype only, that of the "
                f"search: these weights are {other.dtype}, so load the model in the other dtype"
            )
        return (
            f"{found}; it was made from {self.dtype} weights, and these are {other.dtype}. If they "
            f"were rounded, load the model in {self.dtype} and cast the smaller one"
        )
