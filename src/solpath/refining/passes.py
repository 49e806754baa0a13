"""Where the forward passes of compensation wait, and what the dense one gives there."""

import math
from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

from torch import Tensor, nn

from solpath.data.source import shapes_of
from solpath.pair import Pair
from solpath.refining.layerwise import Enough, Group, LayerCall, Stream, lockstep, run_part
from solpath.refining.streams import residual_streams
from solpath.running.forward import Batch
from solpath.running.hooks import Hook
from solpath.running.memory import LiveStorages
from solpath.running.modes import entered, undoing
from solpath.running.placement import is_placed
from solpath.running.recompute import blocks_of

Calls = Generator[tuple[Group, Iterable[LayerCall]], None, None]
"""The groups that a model's forward passes wait at, and the calls there, as `lockstep` yields."""


@dataclass(frozen=True)
class Waits:
    """Where the forward passes of a dense model and of the smaller ones wait for one another.

    Attributes:
        groups: The layers that all models run, those with the same input in all of them together.
        last: The layers after an inner dimension; each is a group of its own.
        streams: The residual streams that those add to, by layer, where one was found.
        blocks: The blocks that hold the layers, if all models run them in one order.
        unseen: The layers that no model ran.
    """

    groups: Sequence[Group]
    last: Set[str]
    streams: Mapping[str, Stream]
    blocks: Sequence[str]
    unseen: Set[str]

    @contextmanager
    def running(
        self,
        dense: nn.Module,
        models: Sequence[nn.Module],
        batches: Sequence[Batch],
        *,
        in_parts: bool,
    ) -> Iterator[list[Calls]]:
        """Run all models side by side while the block runs.

        Args:
            dense: The dense model.
            models: The smaller ones.
            batches: The batches.
            in_parts: Wait at the blocks, and run them in parts.

        Yields:
            The calls of the dense model, which at the `last` layers say what comes out of them;
            then those of each smaller one, which say what goes into every layer.
        """
        blocks = self.blocks if in_parts else ()
        calls = [
            lockstep(
                model,
                batches,
                self.groups,
                self.streams,
                after=self.last if model is dense else (),
                blocks=blocks,
                unseen=self.unseen,
            )
            for model in (dense, *models)
        ]

        def close() -> None:
            for one in calls:
                one.close()

        with undoing(close):
            yield calls


def waits_of(
    dense: nn.Module, models: Sequence[nn.Module], pairs: Sequence[Pair], sample: Batch
) -> Waits:
    """Find out where forward passes are to wait, by looking at some.

    Args:
        dense: The dense model.
        models: The smaller ones.
        pairs: The pairs whose layers are refitted.
        sample: The batch to run.
    """
    sides = [side.module for pair in pairs for side in pair.sides]
    last = {pair.right.module for pair in pairs if pair.kind != "qk"}
    runs = [input_groups(model, sides, sample) for model in (dense, *models)]
    homes = [{name: i for i, group in enumerate(run) for name in group} for run in runs]
    found: dict[Any, list[str]] = {}
    for name in (name for group in runs[-1] for name in group):
        if all(name in home for home in homes):  # a fused attention does not call its layers
            alone = name if name in last else ""
            found.setdefault((alone, *(home[name] for home in homes)), []).append(name)
    groups = [tuple(group) for group in found.values()]
    common = {name for group in groups for name in group}
    streams = residual_streams(dense, sorted(last & common), sample)
    blocks = _common_blocks(dense, runs, common)
    return Waits(groups, last, streams, blocks, set(sides).difference(*homes))


def input_groups(model: nn.Module, layers: Iterable[str], sample: Batch) -> list[Group]:
    """Return those of `layers` that a forward pass runs as modules, in groups of equal input.

    Layers are in one group if they get the same tensor and none of the others runs between them:
    query, key and value, or gate and up. What counts is the first time that a layer runs.

    Args:
        model: The model. It runs until all layers have run; its hooks are removed afterwards.
        layers: Dotted paths of the layers.
        sample: The batch to run.
    """
    names = list(dict.fromkeys(layers))
    found: list[list[str]] = []
    seen: set[str] = set()
    last: list[Tensor] = []

    def noting(name: str) -> Hook:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            if name in seen:
                return
            seen.add(name)
            if last and last[0] is args[0]:
                found[-1].append(name)
            else:
                found.append([name])
            last[:] = [args[0]]
            if len(seen) == len(names):
                raise Enough

        return Hook(model.get_submodule(name), "before", hook)

    run_part(model, sample, (noting(name) for name in names))
    return [tuple(group) for group in found]


def _common_blocks(
    dense: nn.Module, runs: Sequence[Sequence[Group]], layers: Set[str]
) -> list[str]:
    """Return the blocks of some layers, or none unless all models run them in one order."""
    if is_placed(dense):  # every part of a block would load its weights again
        return []
    orders = [blocks_of(dense, [n for group in run for n in group if n in layers]) for run in runs]
    return orders[0] if all(order == orders[0] for order in orders) else []


def held_bytes(
    waits: Waits,
    dense: nn.Module,
    models: Sequence[nn.Module],
    sample: Batch,
    batches: Sequence[Batch],
) -> int:
    """Return how much memory the passes of all models hold while they wait at the groups.

    That is measured on one batch, and more for others in proportion to what they hold.

    Args:
        waits: From `waits_of`.
        dense: The dense model.
        models: The smaller ones.
        sample: The batch to run.
        batches: The batches that are to run side by side.
    """
    live = LiveStorages()
    with entered(live), waits.running(dense, models, [sample], in_parts=False) as calls:
        held = max((live.alive for _ in zip_longest(*calls)), default=0)
    return held * sum(map(_elements, batches)) // _elements(sample)


def _elements(batch: Batch) -> int:
    return max(math.prod(shape) for shape in shapes_of(batch).values())


class DenseCalls:
    """The layer calls of the dense model, each kept until every smaller model has used it."""

    def __init__(self, calls: Calls, models: int) -> None:
        self._calls, self._models = calls, models
        self._kept: dict[Group, Iterable[LayerCall]] = {}
        self._uses: Counter[Group] = Counter()

    def use(self, group: Group) -> Iterable[LayerCall]:
        """Return the calls of a group. Models may run neighbours in different orders."""
        while group not in self._kept:
            other, calls = next(self._calls)
            self._kept[other] = calls
            del calls
        self._uses[group] += 1
        return self._kept.pop(group) if self._uses[group] == self._models else self._kept[group]
