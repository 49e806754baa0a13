"""Refit what is left of a cut model to the dense one, layer by layer, in closed form."""

import copy
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from greenlet import getcurrent, greenlet
from torch import Tensor, nn
from torch.nn import functional

from solpath.data import batch_size, check_device, share
from solpath.discover import EXTRACTED
from solpath.errors import BatchError, ConfigError, UnsupportedModelError
from solpath.measurement import evaluating
from solpath.objective import Batch, divergence, has_logits, output_tensor, run, token_mask
from solpath.plan import Plan
from solpath.progress import progress_bar
from solpath.slicing import LinearMap, linear_map

Model = TypeVar("Model", bound=nn.Module)

_CHECKED = 4  # every so many batches, one decides whether a refit is kept
_REACH = 60  # inputs and outputs of modules between a layer's output and its residual stream
_SAMPLES, _TOKENS = 8, 32  # of one batch, from which the residual streams are found


def compensate(
    small: Model,
    dense: nn.Module,
    batches: Iterable[Any],
    *,
    ridge: float = 0.03,
    progress: bool = True,
) -> Model:
    """A copy of `small` whose cut layers make up for what was cut, without training.

    Layer by layer, in the order they run, the weights and biases of every pair are refitted by
    least squares, on what the refitted layers before give, to what the dense layer gives on the
    same tokens. A layer that adds to a residual stream is fitted to the dense stream, so that it
    also takes back the error of the layers before. Tokens are weighted by the inverse variance of
    that stream, by which the norm that follows divides. A refit stays only if it lowers the error
    on batches that it was not fitted on (every fourth); the whole copy stays only if it is nearer
    to `dense` on these. See docs/method.md.

    Both models are left as they were found. The same inputs give the same bits on one machine.

    Args:
        small: from `extract` or `load`, with the plan it was cut to.
        dense: the model it was cut from, on the same device.
        batches: iterable of what both models take, without labels; all of them are used and kept
            in memory, and so is one layer's activations of all of them. Tens of thousands of
            tokens are well spent: the more, the better the fit.
        ridge: pull towards the present weights, as a share of each input's own energy.
        progress: show a progress bar.

    Returns:
        A model like `small` with other weights: same class, plan, names and shapes.

    Raises:
        UnsupportedModelError: `small` was not extracted.
        ConfigError: `ridge` is not positive.
        BatchError: fewer than four batches, batches on another device, or batches that do not run
            the same layers.

    Example:
        >>> small = solpath.extract(model, path.plan(sparsity=0.6))  # doctest: +SKIP
        >>> small = solpath.compensate(small, model, batches)  # doctest: +SKIP
    """
    plan = getattr(small, EXTRACTED, None)
    if not isinstance(plan, Plan):
        raise UnsupportedModelError(
            f"this {type(small).__name__} was not extracted; call solpath.extract(model, plan)."
        )
    if not ridge > 0:
        raise ConfigError(f"ridge must be positive, got {ridge!r}.")
    batches = list(batches)
    if len(batches) < _CHECKED:
        raise BatchError(f"compensate needs at least {_CHECKED} batches, got {len(batches)}.")
    device = next(dense.parameters()).device
    for batch in batches:
        check_device(batch, device)

    result = copy.deepcopy(small, {id(plan): plan})
    with torch.no_grad(), torch.random.fork_rng(), evaluating(dense), evaluating(result):
        _refit_(result, dense, plan, batches, ridge, progress)
        held = batches[_CHECKED - 1 :: _CHECKED]
        with evaluating(small):
            before, after = _divergences(dense, (small, result), held)
    return result if after < before else copy.deepcopy(small, {id(plan): plan})


def _refit_(
    model: nn.Module,
    dense: nn.Module,
    plan: Plan,
    batches: Sequence[Batch],
    ridge: float,
    progress: bool,
) -> None:
    """Refit every layer of `model` that is part of a pair, in the order they run."""
    last = [pair.right.module for pair in plan.pairs if pair.kind != "qk"]
    sample = share(batches[0], 0, min(_SAMPLES, batch_size(batches[0])))
    layers = [side.module for pair in plan.pairs for side in pair.sides]
    common = set(_visited(dense, layers, sample))  # a fused attention runs without its layers
    layers = [name for name in _visited(model, layers, sample) if name in common]
    streams = _streams(dense, last, sample)
    with ExitStack() as stack:
        report = stack.enter_context(progress_bar("compensate", "", len(layers), 0, show=progress))
        wanted, given = (
            stack.enter_context(closing(_lockstep(one, batches, layers, streams)))
            for one in (dense, model)
        )
        goals: dict[str, list[_Visit]] = {}  # the two may run neighbours in another order
        done: set[str] = set()
        for name, visits in given:
            if name in done:  # a layer that runs twice is fitted to its first inputs
                continue
            done.add(name)
            while name not in goals:
                goals.setdefault(*next(wanted))
            report()
            linear = linear_map(model, name)
            if not linear.out_features:
                continue
            teacher = linear_map(dense, name) if name in last else linear
            fit, check = _Moments(), _Moments()
            for i, (batch, goal, visit) in enumerate(
                zip(batches, goals.pop(name), visits, strict=True)
            ):
                moments = check if i % _CHECKED == _CHECKED - 1 else fit
                moments.add(batch, linear, teacher, goal, visit, streams.get(name))
            weight, bias = fit.solve(ridge, linear.bias is not None)
            if check.gain(weight, bias) > 0:
                update = weight if linear.outputs == 0 else weight.T
                linear.weight.add_(update.to(linear.weight))
                if linear.bias is not None:
                    linear.bias.add_(bias.to(linear.bias))


@dataclass(frozen=True)
class _Stream:
    """The residual stream that a layer adds to: ``stream + gain * output`` is what it becomes.

    Attributes:
        module: path of the module that the stream goes into, or comes out of.
        output: whether it comes out of it.
        gain: ``[features]``.
    """

    module: str
    output: bool
    gain: Tensor


@dataclass(frozen=True)
class _Visit:
    """One batch at one layer: its input, and the stream that its output will be added to."""

    hidden: Tensor
    stream: Tensor | None


class _Run(greenlet):
    """The forward pass of one batch, which waits where it is told to."""

    def __init__(self, model: nn.Module, batch: Batch) -> None:
        super().__init__(lambda: self._forward(model, batch))
        self.driver = getcurrent()
        self.streams: dict[tuple[str, bool], Tensor] = {}

    @classmethod
    def current(cls) -> "_Run":
        """The one that runs now."""
        one = getcurrent()
        assert isinstance(one, cls)
        return one

    @staticmethod
    def _forward(model: nn.Module, batch: Batch) -> None:
        run(model, batch, labels=False)


def _lockstep(
    model: nn.Module,
    batches: Sequence[Batch],
    layers: Iterable[str],
    streams: Mapping[str, _Stream],
) -> Generator[tuple[str, list[_Visit]], None, None]:
    """Run all batches side by side, so that each layer sees all of them before any runs it.

    Yields:
        The layer that all batches wait at, and each one's visit. They run it, as it then is, when
        the next is asked for.
    """

    def wait_at(name: str) -> Any:
        stream = streams.get(name)
        key = stream and (stream.module, stream.output)

        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            one = _Run.current()
            one.driver.switch((name, _Visit(args[0], one.streams[key] if key else None)))

        return hook

    def note(key: tuple[str, bool]) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Any = None) -> None:
            _Run.current().streams[key] = output if key[1] else args[0]

        return hook

    handles = [
        model.get_submodule(name).register_forward_pre_hook(wait_at(name)) for name in layers
    ]
    for key in {(stream.module, stream.output) for stream in streams.values()}:
        module = model.get_submodule(key[0])
        if key[1]:
            handles.append(module.register_forward_hook(note(key)))
        else:
            handles.append(module.register_forward_pre_hook(note(key)))
    runs = [_Run(model, batch) for batch in batches]
    try:
        while any(stops := [one.switch() for one in runs]):
            names = {stop[0] if stop else "the end" for stop in stops}
            if len(names) > 1:
                raise BatchError(f"one batch runs {min(names)} where another runs {max(names)}.")
            yield stops[0][0], [visit for _, visit in stops]
    finally:
        for handle in handles:
            handle.remove()
        for one in runs:
            if not one.dead:
                one.throw()  # GreenletExit: its forward pass ends there


class _Moments:
    """What a least-squares fit of a layer's change needs of the tokens; float64 sums.

    With x the input, r what the output lacks and w the weight of a token: Σ w x xᵀ, Σ w r xᵀ,
    Σ w x, Σ w r, Σ w.
    """

    def __init__(self) -> None:
        self._square: Tensor | float = 0.0
        self._cross: Tensor | float = 0.0
        self._input: Tensor | float = 0.0
        self._lack: Tensor | float = 0.0
        self._weight: Tensor | float = 0.0

    def add(
        self,
        batch: Batch,
        linear: LinearMap,
        teacher: LinearMap,
        goal: _Visit,
        visit: _Visit,
        stream: _Stream | None,
    ) -> None:
        """Take in the tokens of one batch that are not padding."""
        keep = _counted(batch, visit.hidden)
        hidden, whole = _tokens(visit.hidden, keep), _tokens(goal.hidden, keep)
        weight = hidden.new_ones(len(hidden), 1)
        if teacher is linear:
            lack = _affine(linear, whole - hidden, bias=False)
        else:
            wanted = _affine(teacher, whole)
            lack = wanted - _affine(linear, hidden)
            if stream is not None and goal.stream is not None and visit.stream is not None:
                there, here = _tokens(goal.stream, keep), _tokens(visit.stream, keep)
                variance = (there + stream.gain * wanted).var(-1, keepdim=True)
                weight = 1 / variance.clamp(min=1e-12)
                lack = lack + torch.where(stream.gain != 0, (there - here) / stream.gain, 0)
        weighted = hidden * weight
        self._square = self._square + (weighted.T @ hidden).double()
        self._cross = self._cross + (lack.T @ weighted).double()
        self._input = self._input + weighted.sum(0).double()
        self._lack = self._lack + (lack * weight).sum(0).double()
        self._weight = self._weight + weight.sum().double()

    def solve(self, ridge: float, bias: bool) -> tuple[Tensor, Tensor]:
        """Change of weight ``[out, in]`` and bias ``[out]``; without a bias its change is 0."""
        square, cross = torch.as_tensor(self._square), torch.as_tensor(self._cross)
        mean_input = torch.as_tensor(self._input) / self._weight
        mean_lack = torch.as_tensor(self._lack) / self._weight
        if bias:
            square = square - self._weight * torch.outer(mean_input, mean_input)
            cross = cross - self._weight * torch.outer(mean_lack, mean_input)
        energy = square.diagonal().clamp(min=0)
        pull = ridge * energy + 1e-6 * energy.sum() / max(len(energy), 1) + 1e-30
        weight = torch.linalg.solve(square + pull.diag(), cross.T).T
        if not bias:
            return weight, torch.zeros_like(mean_lack)
        return weight, mean_lack - weight @ mean_input

    def gain(self, weight: Tensor, bias: Tensor) -> float:
        """By how much a change lowers the sum of the weighted squared errors."""
        square, cross = torch.as_tensor(self._square), torch.as_tensor(self._cross)
        shift = torch.as_tensor(self._lack) - weight @ torch.as_tensor(self._input)
        lower = 2 * (weight * cross).sum() - (weight @ square * weight).sum()
        return float(lower + (bias * (2 * shift - self._weight * bias)).sum())


def _visited(model: nn.Module, layers: Iterable[str], sample: Batch) -> list[str]:
    """Those of `layers` that a forward pass runs as modules, in the order they run."""
    visited: dict[str, None] = {}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda module, args, name=name: visited.setdefault(name)
        )
        for name in layers
    ]
    try:
        run(model, sample, labels=False)
    finally:
        for handle in handles:
            handle.remove()
    return list(visited)


def _streams(model: nn.Module, layers: Sequence[str], sample: Batch) -> dict[str, _Stream]:
    """Where the outputs of `layers` are added to a residual stream, found by looking.

    A module's input t after the layer is the stream after the sum, and a tensor a before the layer
    the stream before it, if ``t = a + gain * output`` holds for all tokens, channel by channel.
    Layers for which no such tensors go in or out of a module are left out.
    """
    log: list[tuple[str, bool, Tensor]] = []
    with _logging(model, log):
        run(model, sample, labels=False)
    tolerance = max(1e-4, 4 * torch.finfo(next(model.parameters()).dtype).eps)
    found: dict[str, _Stream] = {}
    for i, (layer, is_output, output) in enumerate(log):
        if layer not in layers or not is_output or layer in found:
            continue
        energy = output.square().sum(0).clamp(min=1e-30)
        for _, is_result, after in log[i + 1 : i + _REACH]:
            if is_result or torch.equal(after, output):
                continue
            for name, side, before in reversed(log[max(0, i - _REACH) : i]):
                if before.shape != output.shape or after.shape != output.shape:
                    continue
                step = after - before
                gain = (step * output).sum(0) / energy
                if gain.any() and (step - gain * output).norm() < tolerance * after.norm():
                    found.setdefault(layer, _Stream(name, side, gain))
                    break
            if layer in found:
                break
    return found


@contextmanager
def _logging(model: nn.Module, log: list[tuple[str, bool, Tensor]]) -> Iterator[None]:
    """Note what goes in and out of every module without children: path, out or in, ``[n, d]``."""

    def note(name: str, output: bool, value: Any) -> None:
        if isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 1:
            log.append((name, output, value[:, :_TOKENS].flatten(0, -2).float().clone()))

    def before(name: str) -> Any:
        return lambda module, args: note(name, False, args[0] if args else None)

    def after(name: str) -> Any:
        return lambda module, args, output: note(name, True, output)

    handles = []
    for name, module in model.named_modules():
        if not any(True for _ in module.children()):
            handles.append(module.register_forward_pre_hook(before(name)))
            handles.append(module.register_forward_hook(after(name)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _affine(linear: LinearMap, hidden: Tensor, *, bias: bool = True) -> Tensor:
    """The layer, on ``[tokens, in]``, in the precision of `hidden`."""
    weight = linear.weight if linear.outputs == 0 else linear.weight.T
    shift = linear.bias.to(hidden) if bias and linear.bias is not None else None
    return functional.linear(hidden, weight.to(hidden), shift)


def _counted(batch: Batch, hidden: Tensor) -> Tensor | None:
    """Which tokens of an activation are not padding, by the mask of the same shape, if any."""
    if isinstance(batch, Mapping) and hidden.dim() == 3:
        for name in ("attention_mask", "decoder_attention_mask"):
            mask = batch.get(name)
            if isinstance(mask, Tensor) and mask.shape == hidden.shape[:2]:
                return mask.bool().flatten()
    return None


def _tokens(hidden: Tensor, keep: Tensor | None) -> Tensor:
    """``[..., features] -> [tokens, features]``, at least float32."""
    rows = hidden.flatten(0, -2)
    rows = rows if rows.dtype == torch.float64 else rows.float()
    return rows if keep is None else rows[keep]


def _divergences(
    dense: nn.Module, models: Sequence[nn.Module], batches: Sequence[Batch]
) -> list[float]:
    """Mean divergence of each model from the dense one, over all samples."""
    totals = [0.0 for _ in models]
    for batch in batches:
        outputs = run(dense, batch, labels=False)
        target, logits = output_tensor(outputs), has_logits(outputs)
        for i, model in enumerate(models):
            output = output_tensor(run(model, batch, labels=False))
            keep = token_mask(batch, output)
            totals[i] += float(divergence(output, target, keep, logits=logits).double().sum())
    return [total / sum(map(batch_size, batches)) for total in totals]
