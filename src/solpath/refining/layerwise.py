"""Run many batches side by side, each waiting at every layer for the others."""

import weakref
from collections import deque
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

from greenlet import GreenletExit, getcurrent, greenlet
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from solpath.errors import BatchError
from solpath.running.forward import Batch, run
from solpath.running.hooks import Hook, hooked

Group = tuple[str, ...]
"""Dotted paths of layers that get one and the same input, with no other layer between them."""


class Enough(BaseException):
    """A hook raises it to end a part of a forward pass: what comes later is not needed."""


class Place(NamedTuple):
    """A tensor in a forward pass: what goes into a module, or what comes out of it.

    Attributes:
        module: Dotted path of the module.
        output: Whether it is the output of the module; otherwise its first input.
    """

    module: str
    output: bool


@dataclass(frozen=True)
class Stream:
    """The residual stream that a layer adds to: it becomes ``stream + gain * output``.

    Attributes:
        place: Where the stream can be seen before the layer runs.
        gain: The factor of each channel of the layer's output, ``[features]``; usually 1.
    """

    place: Place
    gain: Tensor


@dataclass(frozen=True)
class LayerCall:
    """One batch at the layers of one group, which run for the first time.

    Attributes:
        value: The input of the layers; of a group that was waited for behind it, its output.
        stream: What the output will be added to, if that was found.
    """

    value: Tensor
    stream: Tensor | None


_Stops = deque[tuple[Group, LayerCall | None]]


class _Run(greenlet):
    """The forward pass of one batch, which pauses where hooks tell it to.

    Attributes:
        seen: What was seen at places that a later layer needs.
        needed: The layers that still need what is seen at a place.
        stops: The layer calls since the last pause; without a call, the block that it waits at.
        waiting: The groups that have not run yet.
        blocks: The blocks that have not run yet.
        inputs: The input that each layer of a group that has begun must get.
        asked: The group up to which the block that it waits at is to run, and nothing more.
    """

    def __init__(
        self,
        model: nn.Module,
        batch: Batch,
        groups: Iterable[Group],
        streams: Mapping[str, Stream],
        blocks: Iterable[str],
    ) -> None:
        super().__init__(lambda: self._forward(model, batch))
        self.driver = getcurrent()
        self.seen: dict[Place, Tensor] = {}
        self.needed: dict[Place, set[str]] = {}
        for name, stream in streams.items():
            self.needed.setdefault(stream.place, set()).add(name)
        self.stops: _Stops = deque()
        self.waiting = set(groups)
        self.blocks = set(blocks)
        self.inputs: dict[str, weakref.ref[Tensor]] = {}
        self.asked: Group | None = None

    @classmethod
    def current(cls) -> "_Run":
        """Return the run whose forward pass is under way."""
        one = getcurrent()
        assert isinstance(one, cls)
        return one

    @staticmethod
    def _forward(model: nn.Module, batch: Batch) -> None:
        run(model, batch, labels=False)

    def note(self, place: Place, value: Tensor) -> None:
        """Keep what is seen at a place, if a layer still needs it."""
        if self.needed[place]:
            self.seen[place] = value

    def use(self, place: Place, name: str) -> Tensor:
        """Return what was seen last at a place. It is forgotten once no layer needs it any more.

        A part of a block only looks: the layer is still to run.
        """
        if self.asked is not None:
            return self.seen[place]
        self.needed[place].discard(name)
        return self.seen[place] if self.needed[place] else self.seen.pop(place)

    def pause(self) -> None:
        """Go on with the driver, until it switches back."""
        self.driver.switch()

    def advance(self) -> None:
        """Run up to the next pause, or to the end."""
        if not self.stops and not self.dead:
            self.switch()

    def call(self) -> LayerCall:
        """Return the next layer call, and forget it."""
        _, call = self.stops.popleft()
        assert call is not None
        return call

    def ask(self, group: Group) -> LayerCall:
        """Run the block that this waits at up to a group, and wait there again."""
        self.asked = group
        self.switch()
        self.asked = None
        if not self.stops:
            raise BatchError(f"one batch does not run {group[0]} where another does.")
        return self.call()

    def answer(self, group: Group, call: LayerCall) -> None:
        """End the part of the block that was asked for."""
        self.stops.append((group, call))
        raise Enough

    def in_parts(self, forward: Callable[..., Any], args: Any, kwargs: Any) -> None:
        """Run parts of a block for as long as the driver asks for some.

        What is seen in a part is forgotten: the next part sees it again.
        """
        seen = self.seen
        self.pause()
        while self.asked is not None:
            self.seen = dict(seen)
            with suppress(Enough):
                _run_copied(forward, args, kwargs)
            self.seen = seen
            self.pause()


def _run_copied(forward: Callable[..., Any], args: Any, kwargs: Any) -> None:
    """Run a block on copies of its inputs, since it may change them in place."""
    args, kwargs = tree_map_only(Tensor, Tensor.clone, (args, kwargs))
    forward(*args, **kwargs)


@dataclass(frozen=True)
class _Asked(Iterable[LayerCall]):
    """The calls of a group inside a block, each computed when it is read."""

    runs: Sequence[_Run]
    group: Group

    def __iter__(self) -> Iterator[LayerCall]:
        return (one.ask(self.group) for one in self.runs)


def lockstep(
    model: nn.Module,
    batches: Sequence[Batch],
    groups: Sequence[Group],
    streams: Mapping[str, Stream],
    after: Collection[str] = (),
    blocks: Collection[str] = (),
    unseen: Collection[str] = (),
) -> Generator[tuple[Group, Iterable[LayerCall]], None, None]:
    """Run all batches side by side, so that all of them reach a layer before any runs it.

    In memory are the activations that the forward passes hold where they wait, and streams that
    a later layer needs. A layer that runs again later is not waited for again. The passes end at
    the last group: what the model does after it does not run.

    Args:
        model: The model. Its hooks are removed at the end.
        batches: The batches to run.
        groups: The layers to wait at, from `input_groups`.
        streams: The residual streams to look at, by layer, from `residual_streams`.
        after: Those layers, each a group of its own, of which the outputs are wanted. They run
            without waiting, and are yielded before the next group runs.
        blocks: Dotted paths of blocks to wait at, in place of the groups inside. A call of such a
            group is computed whenever it is read, by running the block up to there: the least
            memory, for more time. The bits are the same.
        unseen: Layers that a batch did not run when the groups were found, and that none may run.

    Yields:
        The group that all batches wait at, and the layer call of each batch, which can be read
        again until the next group is asked for. Then the batches run this one with the weights that
        it has by then. Neither is kept here, so what the caller lets go of is free.

    Raises:
        BatchError: Two batches run the layers in different orders, one runs a layer that is
            `unseen`, or a batch gives layers of a group different inputs.
    """
    homes = {group: block for group in groups for block in blocks if _is_inside(group, block)}

    def stops_at(one: _Run, group: Group) -> bool:
        return group not in homes or homes[group] in one.blocks

    def call(one: _Run, name: str, value: Tensor) -> LayerCall:
        stream = streams.get(name)
        return LayerCall(value, None if stream is None else one.use(stream.place, name))

    def wait_at(name: str, group: Group) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            one = _Run.current()
            if one.asked == group:
                one.answer(group, call(one, name, args[0]))
            if one.asked is not None:
                return
            if group in one.waiting:
                one.waiting.remove(group)
                one.inputs.update(dict.fromkeys(group, weakref.ref(args[0])))
                if stops_at(one, group):
                    one.stops.append((group, call(one, name, args[0])))
                    one.pause()
                else:
                    call(one, name, args[0])  # forgets the stream
            expected = one.inputs.pop(name, None)
            if expected is not None and expected() is not args[0]:
                raise BatchError(
                    f"{' and '.join(group)} got the same input on the first batch, and another "
                    "on a later one; leave out batches that the model treats otherwise."
                )
            if not one.waiting and not one.inputs:
                raise GreenletExit

        return hook

    def note_output(name: str, group: Group) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            one = _Run.current()
            if one.asked == group:
                one.answer(group, call(one, name, output))
            if one.asked is None and group in one.waiting:
                one.waiting.remove(group)
                passed = call(one, name, output)
                if stops_at(one, group):  # what follows may change both in place
                    stream = None if passed.stream is None else passed.stream.clone()
                    one.stops.append((group, LayerCall(output.clone(), stream)))
                if not one.waiting:
                    raise GreenletExit

        return hook

    def note(place: Place) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Any = None) -> None:
            _Run.current().note(place, output if place.output else args[0])

        return hook

    def wait_before(block: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            one = _Run.current()
            if block in one.blocks:
                one.blocks.remove(block)
                one.stops.append(((block,), None))
                one.in_parts(module.forward, args, kwargs)

        return hook

    def refuse(name: str) -> Any:
        def hook(module: nn.Module, args: Any) -> None:
            raise BatchError(
                f"a later batch runs {name}, and the first does not; give batches that all run "
                "the same layers, for example all with images or all without."
            )

        return hook

    def waiting() -> Iterator[Hook]:
        for name in unseen:
            yield Hook(model.get_submodule(name), "before", refuse(name))
        for group in groups:
            for name in group:
                module = model.get_submodule(name)
                if name in after:
                    yield Hook(module, "after", note_output(name, group))
                else:
                    yield Hook(module, "before", wait_at(name, group))
        for place in {stream.place for stream in streams.values()}:
            when: Any = "after" if place.output else "before"
            yield Hook(model.get_submodule(place.module), when, note(place))
        for block in set(homes.values()):
            yield Hook(model.get_submodule(block), "call", wait_before(block))

    runs = [_Run(model, batch, groups, streams, homes.values()) for batch in batches]
    with hooked(waiting()):
        try:
            while True:
                for one in runs:
                    one.advance()
                names = {one.stops[0][0][0] if one.stops else "the end" for one in runs}
                if len(names) > 1:
                    low, high = min(names), max(names)
                    raise BatchError(f"one batch runs {low} where another runs {high}.")
                if names == {"the end"}:
                    return
                group = runs[0].stops[0][0]
                if group in groups:
                    yield group, [one.call() for one in runs]
                    continue
                for one in runs:
                    one.stops.popleft()
                for inside, home in homes.items():
                    if (home,) == group and inside in runs[0].waiting:
                        yield inside, _Asked(runs, inside)
        finally:
            for one in runs:
                if not one.dead:
                    one.throw()  # GreenletExit: its forward pass ends there


def _is_inside(group: Group, block: str) -> bool:
    return all(name.startswith(f"{block}.") for name in group)


def run_part(model: nn.Module, sample: Batch, hooks: Iterable[Hook]) -> None:
    """Run a model with hooks, to its end or until one of them raises `Enough`.

    Args:
        model: The model. The hooks are removed at the end.
        sample: The batch to run.
        hooks: The hooks.
    """
    with hooked(hooks), suppress(Enough):
        run(model, sample, labels=False)
