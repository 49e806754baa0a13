"""What the rivals know of the data: moments of the inner activations of the dense model."""

import contextlib
import re
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from solpath.model.discovery import find_pairs
from solpath.model.masks import energy_hooks
from solpath.pair import Pair, Side
from solpath.running.forward import run


@dataclass
class Moments:
    """Sums over tokens of rows ``[..., channels]`` and of their products, in float64."""

    count: float
    first: Tensor
    second: Tensor

    @property
    def mean(self) -> Tensor:
        """``[..., channels]``."""
        return self.first / self.count

    @property
    def energy(self) -> Tensor:
        """The mean square of every channel, ``[..., channels]``."""
        return self.second.diagonal(dim1=-2, dim2=-1) / self.count

    @property
    def gram(self) -> Tensor:
        """The second moment, ``[..., channels, channels]``."""
        return self.second / self.count

    @property
    def variance(self) -> Tensor:
        """Of every channel, ``[..., channels]``."""
        return (self.energy - self.mean.square()).clamp(min=0)

    @property
    def covariance(self) -> Tensor:
        """``[..., channels, channels]``."""
        return self.gram - self.mean.unsqueeze(-1) * self.mean.unsqueeze(-2)


@dataclass
class Calibration:
    """The dense model on the calibration batches.

    Attributes:
        pairs: of the model.
        batches: what the moments are of.
        inner: for ``vo`` and ``mlp``, the input of the right-hand layer, all heads together.
        query: for ``qk``, query heads by key-value head, ``[heads, repeat, ...]``; after the norm
            over the heads, if there is one.
        key: for ``qk``, ``[heads, 1, ...]``.
        value: for ``vo``, the values, ``[heads, 1, ...]``.
        energy: for ``qk`` with norms over the heads, what these norms see (see `energy_hooks`).
        influence: block to 1 - cosine of its input and output, the mean over tokens.
        memo: what a rival computes once for all sizes.
    """

    pairs: Sequence[Pair]
    batches: Sequence[Any]
    inner: dict[str, Moments] = field(default_factory=dict)
    query: dict[str, Moments] = field(default_factory=dict)
    key: dict[str, Moments] = field(default_factory=dict)
    value: dict[str, Moments] = field(default_factory=dict)
    energy: dict[str, Tensor] = field(default_factory=dict)
    influence: dict[str, float] = field(default_factory=dict)
    memo: dict[Hashable, Any] = field(default_factory=dict)

    def once(self, key: Hashable, compute: Callable[[], Any]) -> Any:
        """What `compute` returned the first time."""
        if key not in self.memo:
            self.memo[key] = compute()
        return self.memo[key]


def block_of(pair: Pair) -> str:
    """The block of a pair, ``encoder.layer.0``: its name up to the first number."""
    match = re.match(r"(?:.*?\.)?\d+(?=\.)", pair.name)
    return match[0] if match else pair.name


@torch.no_grad()
def calibrate(model: nn.Module, batches: Sequence[Any]) -> Calibration:
    """Run the dense model over all batches once."""
    found = Calibration(find_pairs(model), batches)
    cosines = dict.fromkeys((block_of(pair) for pair in found.pairs), (0.0, 0))
    with contextlib.ExitStack() as stack:
        tokens = Tokens()
        for pair in found.pairs:
            left, right = pair.left[0], pair.right
            watched = [(found.value, left, True), (found.inner, right, False)]
            if pair.kind == "qk":
                watched = [(found.query, left, True), (found.key, right, True)]
            for where, side, heads in watched[pair.kind == "mlp" :]:
                note = _adding(where, pair, side, tokens, heads)
                stack.enter_context(watch(model, pair, side, note))
        for block in cosines:
            hook = _comparing(cosines, block, tokens)
            handle = model.get_submodule(block).register_forward_hook(hook)
            stack.callback(handle.remove)
        normed = [pair for pair in found.pairs if pair.norms]
        for batch in batches:
            tokens.of(batch)
            with energy_hooks(model, normed, batch) as energy:
                run(model, batch, labels=False)
            found.energy = {
                name: found.energy[name] + value if found.energy else value
                for name, value in energy.items()
            }
    found.influence = {block: 1 - total / count for block, (total, count) in cosines.items()}
    return found


@contextlib.contextmanager
def watch(
    model: nn.Module, pair: Pair, side: Side, note: Callable[[Tensor], None]
) -> Iterator[None]:
    """Show `note` the inner activation at a layer: its output before, its input after it.

    Queries and keys that are normed are shown after their norm.
    """
    module = model.get_submodule(side.module)
    if pair.norms:
        norm = pair.norms[0 if side is pair.left[0] else 1]
        module = model.get_submodule(norm.module)
        handle = module.register_forward_hook(
            lambda module, args, output: note(output.movedim(norm.heads_dim, 2).flatten(2))
        )
    elif side.axis == 0:
        handle = module.register_forward_hook(lambda module, args, output: note(output))
    else:
        handle = module.register_forward_pre_hook(lambda module, args: note(args[0]))
    try:
        yield
    finally:
        handle.remove()


def couples(pair: Pair, moments: Moments) -> Tensor:
    """The energy of every unit of queries or keys, ``[heads, repeat, width]``."""
    return moments.energy.unflatten(-1, (pair.channels, pair.width)).sum(-2)


class Tokens:
    """Picks the tokens of an activation that are not padding."""

    def __init__(self) -> None:
        self.mask: Tensor | None = None

    def of(self, batch: Any) -> None:
        """Set the batch that is run next."""
        mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
        self.mask = None if mask is None else mask.bool()

    def rows(self, states: Tensor) -> Tensor:
        """``[batch, tokens, n] -> [rows, n]``."""
        if self.mask is not None and states.shape[:2] == self.mask.shape:
            return states[self.mask]
        return states.flatten(0, -2)


def by_head(pair: Pair, side: Side, rows: Tensor) -> Tensor:
    """``[rows, n] -> [heads, repeat, rows, channels * width]``."""
    inside = pair.channels * pair.width
    offset = 0 if pair.norms else side.offset
    part = rows[:, offset : offset + pair.heads * side.repeat * inside]
    return part.reshape(len(rows), pair.heads, side.repeat, inside).permute(1, 2, 0, 3)


def _adding(
    where: dict[str, Moments], pair: Pair, side: Side, tokens: Tokens, heads: bool
) -> Callable[[Tensor], None]:
    def note(states: Tensor) -> None:
        rows = tokens.rows(states).double()
        rows = by_head(pair, side, rows) if heads else rows
        first, second = rows.sum(-2), rows.mT @ rows
        known = where.get(pair.name)
        if known is None:
            where[pair.name] = Moments(rows.shape[-2], first, second)
            return
        known.count += rows.shape[-2]
        known.first += first
        known.second += second

    return note


def _comparing(cosines: dict[str, tuple[float, int]], block: str, tokens: Tokens) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        output = output if isinstance(output, Tensor) else output[0]
        cosine = functional.cosine_similarity(tokens.rows(args[0]), tokens.rows(output))
        total, count = cosines[block]
        cosines[block] = total + float(cosine.sum()), count + len(cosine)

    return hook
