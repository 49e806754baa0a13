"""Refit what is left of a cut model to the dense one, layer by layer, in closed form."""

import copy
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack, closing
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from solpath.data import batch_size, check_device, share
from solpath.discover import EXTRACTED
from solpath.errors import BatchError, ConfigError, UnsupportedModelError
from solpath.lockstep import Stream, Visit, lockstep, residual_streams, visited
from solpath.measurement import evaluating
from solpath.objective import Batch, divergence_from, run, target_of
from solpath.plan import Plan
from solpath.progress import progress_bar
from solpath.slicing import LinearMap, linear_map

Model = TypeVar("Model", bound=nn.Module)

_CHECKED = 4  # every so many batches, one decides whether a refit is kept
_SAMPLES = 8  # of one batch, from which the residual streams are found


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
    common = set(visited(dense, layers, sample))  # a fused attention runs without its layers
    layers = [name for name in visited(model, layers, sample) if name in common]
    streams = residual_streams(dense, last, sample)
    with ExitStack() as stack:
        report = stack.enter_context(progress_bar("compensate", "", len(layers), 0, show=progress))
        wanted, given = (
            stack.enter_context(closing(lockstep(one, batches, layers, streams)))
            for one in (dense, model)
        )
        goals: dict[str, list[Visit]] = {}  # the two may run neighbours in another order
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
            stream, known = streams.get(name), goals.pop(name)
            _refit_layer_(linear, teacher, stream, batches, known, visits, ridge)


def _refit_layer_(
    linear: LinearMap,
    teacher: LinearMap,
    stream: Stream | None,
    batches: Sequence[Batch],
    goals: Sequence[Visit],
    visits: Sequence[Visit],
    ridge: float,
) -> None:
    """Change `linear` by what fits it to `teacher` on some batches, if it helps on the others."""
    fit, check = _Moments(linear), _Moments(linear)
    for i, (batch, goal, visit) in enumerate(zip(batches, goals, visits, strict=True)):
        moments = check if i % _CHECKED == _CHECKED - 1 else fit
        moments.add(batch, linear, teacher, goal, visit, stream)
    change = fit.solve(ridge, linear.bias is not None)
    if check.gain(change) > 0:
        weight = change[:, :-1] if linear.outputs == 0 else change[:, :-1].T
        linear.weight.add_(weight.to(linear.weight))
        if linear.bias is not None:
            linear.bias.add_(change[:, -1].to(linear.bias))


class _Moments:
    """What a least-squares fit of a layer's change needs of the tokens; float64 sums.

    With x the input followed by 1, r what the output lacks and w the weight of a token: Σ w x xᵀ
    and Σ w r xᵀ.
    """

    def __init__(self, linear: LinearMap) -> None:
        size = linear.in_features + 1
        self._square = linear.weight.new_zeros(size, size, dtype=torch.float64)
        self._cross = linear.weight.new_zeros(linear.out_features, size, dtype=torch.float64)

    def add(
        self,
        batch: Batch,
        linear: LinearMap,
        teacher: LinearMap,
        goal: Visit,
        visit: Visit,
        stream: Stream | None,
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
        row = functional.pad(hidden, (0, 1), value=1.0)
        weighted = row * weight
        self._square += (weighted.T @ row).double()
        self._cross += (lack.T @ weighted).double()

    def solve(self, ridge: float, bias: bool) -> Tensor:
        """Change of weight and bias, ``[out, in + 1]``; without a bias its change is 0."""
        square, cross = self._square[:-1, :-1], self._cross[:, :-1]
        mean_input = self._square[-1, :-1] / self._square[-1, -1]
        mean_lack = self._cross[:, -1] / self._square[-1, -1]
        if bias:
            square = square - self._square[-1, -1] * torch.outer(mean_input, mean_input)
            cross = cross - self._square[-1, -1] * torch.outer(mean_lack, mean_input)
        energy = square.diagonal().clamp(min=0)
        pull = ridge * energy + 1e-6 * energy.sum() / max(len(energy), 1) + 1e-30
        weight = torch.linalg.solve(square + pull.diag(), cross.T).T
        shift = mean_lack - weight @ mean_input if bias else torch.zeros_like(mean_lack)
        return torch.cat([weight, shift.unsqueeze(1)], 1)

    def gain(self, change: Tensor) -> float:
        """By how much a change lowers the sum of the weighted squared errors."""
        return float((change * (2 * self._cross - change @ self._square)).sum())


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
        target = target_of(dense, batch)
        for i, model in enumerate(models):
            outputs = run(model, batch, labels=False)
            totals[i] += float(divergence_from(target, outputs, batch).double().sum())
    return [total / sum(map(batch_size, batches)) for total in totals]
