"""Run many batches side by side, each waiting at every layer for the others."""

from collections.abc import Container, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from greenlet import getcurrent, greenlet
from torch import Tensor, nn

from solpath.errors import BatchError
from solpath.model.hooks import Hook, hooked
from solpath.running.forward import Batch, run

_REACH = 60  # inputs and outputs of modules to look at on each side of a layer's output
_TOKENS = 32  # tokens of a sample in which residual streams are looked for


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
    """One batch at one layer.

    Attributes:
        hidden: The input of the layer.
        stream: What the output will be added to, if that was found.
        output: The output of the layer, if it was waited for.
    """

    hidden: Tensor
    stream: Tensor | None
    output: Tensor | None = None


class _Run(greenlet):
    """The forward pass of one batch, which pauses where hooks tell it to."""

    def __init__(self, model: nn.Module, batch: Batch) -> None:
        super().__init__(lambda: self._forward(model, batch))
        self.driver = getcurrent()
        self.seen: dict[Place, Tensor] = {}

    @classmethod
    def current(cls) -> "_Run":
        """Return the run whose forward pass is under way."""
        one = getcurrent()
        assert isinstance(one, cls)
        return one

    @staticmethod
    def _forward(model: nn.Module, batch: Batch) -> None:
        run(model, batch, labels=False)


def lockstep(
    model: nn.Module,
    batches: Sequence[Batch],
    layers: Iterable[str],
    streams: Mapping[str, Stream],
    after: Container[str] = (),
) -> Generator[tuple[str, list[LayerCall]], None, None]:
    """Run all batches side by side, so that all of them reach a layer before any runs it.

    Args:
        model: The model. Its hooks are removed at the end.
        batches: The batches to run.
        layers: Dotted paths of the layers to wait at.
        streams: The residual streams to look at, by layer, from `residual_streams`.
        after: Those of `layers` to wait behind, so that their outputs are known.

    Yields:
        The layer that all batches wait at, and the layer call of each batch. When the next layer is
        asked for, the batches run this one with the weights that it has by then. A layer of `after`
        has run before it is yielded.

    Raises:
        BatchError: Two batches run the layers in different orders.
    """

    def wait_at(name: str) -> Any:
        stream = streams.get(name)

        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Any = None) -> None:
            one = _Run.current()
            known = None if stream is None else one.seen[stream.place]
            one.driver.switch((name, LayerCall(args[0], known, output)))

        return hook

    def note(place: Place) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Any = None) -> None:
            _Run.current().seen[place] = output if place.output else args[0]

        return hook

    def waiting() -> Iterator[Hook]:
        for name in layers:
            module = model.get_submodule(name)
            yield Hook(module, "after" if name in after else "before", wait_at(name))
        for place in {stream.place for stream in streams.values()}:
            when: Any = "after" if place.output else "before"
            yield Hook(model.get_submodule(place.module), when, note(place))

    runs = [_Run(model, batch) for batch in batches]
    with hooked(waiting()):
        try:
            while any(stops := [one.switch() for one in runs]):
                names = {stop[0] if stop else "the end" for stop in stops}
                if len(names) > 1:
                    low, high = min(names), max(names)
                    raise BatchError(f"one batch runs {low} where another runs {high}.")
                yield stops[0][0], [call for _, call in stops]
        finally:
            for one in runs:
                if not one.dead:
                    one.throw()  # GreenletExit: its forward pass ends there


def layers_run(model: nn.Module, layers: Iterable[str], sample: Batch) -> list[str]:
    """Return those of `layers` that a forward pass runs as modules, in the order they run."""
    found: dict[str, None] = {}

    def noting(name: str) -> Hook:
        return Hook(model.get_submodule(name), "before", lambda *args: found.setdefault(name))

    with hooked(noting(name) for name in layers):
        run(model, sample, labels=False)
    return list(found)


def residual_streams(model: nn.Module, layers: Sequence[str], sample: Batch) -> dict[str, Stream]:
    """Find out where the outputs of `layers` are added to a residual stream, by looking.

    The input t of a later module is the stream after the sum, and an earlier tensor a is the stream
    before it, if ``t = a + gain * output`` holds for all tokens, channel by channel. The tensors
    are inputs and outputs of modules that have no children. A sample of one token shows nothing:
    some gain always fits it.

    Args:
        model: The dense model. It runs once, and its hooks are removed afterwards.
        layers: Dotted paths of the layers.
        sample: A few samples to run.

    Returns:
        The stream of every layer for which such tensors were found, by layer.
    """
    log: list[tuple[Place, Tensor]] = []
    with _logging(model, log):
        run(model, sample, labels=False)
    tolerance = max(1e-4, 4 * torch.finfo(next(model.parameters()).dtype).eps)
    found: dict[str, Stream] = {}
    for i, (place, output) in enumerate(log):
        if place.module not in layers or not place.output or place.module in found:
            continue
        if len(output) < 2:
            continue
        nearest = log[max(0, i - _REACH) : i][::-1]
        before = [(where, value) for where, value in nearest if value.shape == output.shape]
        for where, after in log[i + 1 : i + _REACH]:
            if where.output or after.shape != output.shape or torch.equal(after, output):
                continue
            stream = _sum_of(before, output, after, tolerance)
            if stream is not None:
                found[place.module] = stream
                break
    return found


def _sum_of(
    before: Sequence[tuple[Place, Tensor]], output: Tensor, after: Tensor, tolerance: float
) -> Stream | None:
    """Return the first stream among `before` that `output`, times a gain, turns into `after`."""
    energy = output.square().sum(0).clamp(min=1e-30)
    for place, value in before:
        step = after - value
        gain = (step * output).sum(0) / energy
        if gain.any() and (step - gain * output).norm() < tolerance * after.norm():
            return Stream(place, gain)
    return None


@contextmanager
def _logging(model: nn.Module, log: list[tuple[Place, Tensor]]) -> Iterator[None]:
    """Log the first input and the output of every module without children, ``[n, features]``."""

    def note(place: Place, value: Any) -> None:
        if isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 1:
            value = value if value.dim() == 2 else value[:, :_TOKENS].flatten(0, -2)
            log.append((place, value.float().clone()))

    def before(name: str) -> Any:
        return lambda module, args: note(Place(name, False), args[0] if args else None)

    def after(name: str) -> Any:
        return lambda module, args, output: note(Place(name, True), output)

    def logging() -> Iterator[Hook]:
        for name, module in model.named_modules():
            if not any(True for _ in module.children()):
                yield Hook(module, "before", before(name))
                yield Hook(module, "after", after(name))

    with hooked(logging()):
        yield
