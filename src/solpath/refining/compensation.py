"""Refit what is left of a cut model to the dense model, layer by layer, in closed form."""

import math
import operator
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from functools import partial, reduce
from itertools import zip_longest
from typing import Any, TypeVar, cast, overload

import torch
from torch import Tensor, nn
from torch.nn import functional

from solpath.data.preparation import Preparation, preparing
from solpath.data.source import batch_size, check_ends, slice_samples
from solpath.errors import BatchError, ConfigError, NonFiniteLossError, UnsupportedModelError
from solpath.model.extraction import copy_extracted
from solpath.model.linear import LinearMap, linear_map
from solpath.objective import Loss, Objective
from solpath.pair import Pair
from solpath.planning.plan import plan_of
from solpath.pretrained import unwrapped
from solpath.refining.layerwise import LayerCall, Stream, layers_run, lockstep, residual_streams
from solpath.refining.least_squares import Moments
from solpath.running.claims import claimed
from solpath.running.forward import Batch, activation_mask, device_of, row_not_finite, run
from solpath.running.modes import contained, inferring, undoing
from solpath.running.progress import progress_bar

Model = TypeVar("Model", bound=nn.Module)

_Calls = tuple[Batch, LayerCall, LayerCall]  # a batch, and its calls in the dense and cut model
_Rows = tuple[Tensor, Tensor, Tensor]  # inputs, what they are fitted to, weights of the tokens
_CHECKED = 4  # one batch in so many is held out: it decides whether a refit stays
_AT_ONCE = 8  # batches whose tokens go into one product
_SAMPLES = 8  # samples of the first batch in which the residual streams are looked for


@overload
def compensate(
    small: Model,
    dense: nn.Module,
    batches: Iterable[Any],
    *,
    ridge: float = ...,
    loss: Loss | None = ...,
    progress: bool = ...,
) -> Model: ...


@overload
def compensate(
    small: Sequence[Model],
    dense: nn.Module,
    batches: Iterable[Any],
    *,
    ridge: float = ...,
    loss: Loss | None = ...,
    progress: bool = ...,
) -> list[Model]: ...


@contained
def compensate(
    small: Model | Sequence[Model],
    dense: nn.Module,
    batches: Iterable[Any],
    *,
    ridge: float = 0.1,
    loss: Loss | None = None,
    progress: bool = True,
) -> Model | list[Model]:
    """Return a copy of `small` whose cut layers make up for what was cut, without training.

    The layers of all pairs are refitted in the order they run. Each is fitted by least squares to
    what it gives in the dense model on the same tokens, given what the refitted layers before it
    give. A layer that adds to a residual stream is fitted to the dense stream, so that it also
    takes back the errors of the layers before. Tokens are weighted by the inverse variance of that
    stream, by which the norm that follows divides. See docs/method.md, "Compensation".

    Every fourth batch is held out. A refit stays only if it lowers the error on these batches, and
    the whole copy stays only if its outputs are nearer to those of `dense` on them; otherwise a
    plain copy of `small` is returned. All models are left as they were found. The same inputs give
    the same bits on one machine.

    Args:
        small: A model from `extract` or `load`, or a sequence of them. Several are refitted side by
            side, each as it would be alone, while the dense model runs once for all of them.
        dense: The dense model that they were cut from, on the same device.
        batches: An iterable of what the models take, without labels. All batches stay in memory,
            with the activations of all of them at one layer of every model, so they must have a
            length: of a generator, which may never end, give a list. Tens of thousands of tokens
            are well spent: the more there are, the better the fit. Rows of padding alone are
            skipped, with one warning; labels become the inputs of a decoder that is given none.
        ridge: Pull towards the present weights, as a share of each input's own energy.
        loss: ``loss(outputs, batch)``, a mean over samples, that decides whether a refitted model
            is nearer, in place of the divergence from `dense`.
        progress: Whether to show a progress bar.

    Returns:
        A model with other weights and the class, plan, names and shapes of `small`; a list of such
        models if a sequence was given.

    Raises:
        UnsupportedModelError: `small` was not extracted.
        ConfigError: `ridge` is not positive.
        BatchError: There are fewer than four batches, a batch is on another device, or two batches
            run layers in different orders.
        NonFiniteLossError: A model gives NaN or infinite values on a batch, or `loss` does.
        ModelInUseError: A model is masked or searched, or another thread works on it.

    Example:
        >>> refitted = solpath.compensate(small, model, batches, progress=False)
        >>> refitted.solpath_plan is small.solpath_plan
        True
    """
    models = list(small) if isinstance(small, Sequence) else [small]
    models = [cast("Model", unwrapped(model, hooks=True)) for model in models]
    if not models:
        return []
    pairs = [_pairs_of(model) for model in models]
    dense = unwrapped(dense, hooks=True)
    if not ridge > 0:
        raise ConfigError(f"ridge must be positive, got {ridge!r}.")
    check_ends(batches)
    with claimed(dense, *models, doing="compensated"):
        results = _compensate(models, dense, pairs[0], batches, ridge, loss, progress)
    return results if isinstance(small, Sequence) else results[0]


def _compensate(
    models: Sequence[Model],
    dense: nn.Module,
    pairs: Sequence[Pair],
    batches: Iterable[Batch],
    ridge: float,
    loss: Loss | None,
    progress: bool,
) -> list[Model]:
    """Return what `compensate` does, for several models that were checked."""
    refitted = [copy_extracted(model) for model in models]
    everyone: list[nn.Module] = [dense, *models, *refitted]
    with (
        preparing(dense, *{device_of(model) for model in everyone}) as prepare,
        inferring(*everyone),
    ):
        known = [prepare(i, batch) for i, batch in enumerate(batches)]
        if len(known) < _CHECKED:
            raise BatchError(f"compensate needs at least {_CHECKED} batches, got {len(known)}.")
        _refit_(refitted, dense, pairs, known, prepare, ridge, progress)
        errors = _losses(dense, models, refitted, known, prepare, loss)
    return [
        after if better < worse else copy_extracted(before)
        for before, after, worse, better in zip(
            models, refitted, errors[: len(models)], errors[len(models) :], strict=True
        )
    ]


def _pairs_of(model: nn.Module) -> Sequence[Pair]:
    plan = plan_of(model)
    if plan is None:
        raise UnsupportedModelError(
            f"this {type(model).__name__} was not extracted; call solpath.extract(model, plan)."
        )
    return [pair for pair in plan.pairs if pair.kind != "experts"]


def _refit_(
    models: Sequence[nn.Module],
    dense: nn.Module,
    pairs: Sequence[Pair],
    batches: Sequence[Batch],
    prepare: Preparation,
    ridge: float,
    progress: bool,
) -> None:
    """Refit every layer of `models` that belongs to a pair, in the order they run, in place."""
    last = {pair.right.module for pair in pairs if pair.kind != "qk"}
    sample = slice_samples(batches[0], 0, min(_SAMPLES, batch_size(batches[0])))
    sides = [side.module for pair in pairs for side in pair.sides]
    runs = [layers_run(model, sides, sample) for model in (dense, *models)]
    common = set.intersection(*map(set, runs))  # a fused attention does not call its layers
    layers = [name for name in runs[-1] if name in common]
    streams = residual_streams(dense, sorted(last), sample)
    wanted = lockstep(dense, batches, layers, streams, after=last)
    given = [lockstep(model, batches, layers, streams) for model in models]

    def close() -> None:
        for calls in (wanted, *given):
            calls.close()

    with undoing(close), progress_bar("compensate", "", len(layers), 0, show=progress) as report:
        targets = _DenseTargets(wanted, len(models))
        refits = [
            _refit_layers_(model, calls, targets, batches, prepare, streams, last, ridge)
            for model, calls in zip(models, given, strict=True)
        ]
        for _ in zip_longest(*refits):
            report()


class _DenseTargets:
    """The layer calls of the dense model, each kept until every cut model has used it."""

    def __init__(self, wanted: Iterator[tuple[str, list[LayerCall]]], models: int) -> None:
        self._wanted, self._models = wanted, models
        self._kept: dict[str, list[LayerCall]] = {}
        self._uses: Counter[str] = Counter()

    def use(self, name: str) -> list[LayerCall]:
        """Return the calls of the layer `name`. Models may run neighbours in different orders."""
        while name not in self._kept:
            other, calls = next(self._wanted)
            if other not in self._uses:  # if a layer runs twice, the first run counts
                self._kept.setdefault(other, calls)
        self._uses[name] += 1
        return self._kept.pop(name) if self._uses[name] == self._models else self._kept[name]


def _refit_layers_(
    model: nn.Module,
    given: Iterable[tuple[str, list[LayerCall]]],
    targets: _DenseTargets,
    batches: Sequence[Batch],
    prepare: Preparation,
    streams: Mapping[str, Stream],
    last: Container[str],
    ridge: float,
) -> Iterator[None]:
    """Refit one layer of `model` after another where that helps, and pause after each."""
    done: set[str] = set()
    seen: list[Tensor] = []
    moments: tuple[Moments, Moments] | None = None
    for name, calls in given:
        if name in done:  # it was fitted to its first inputs
            continue
        done.add(name)
        known = targets.use(name)
        linear = linear_map(model, name)
        present = _affine(linear)
        if name in last:
            rows = partial(_output_rows, streams.get(name))
            sums = _moments(rows, batches, known, calls)
            _check_finite(sums, known, calls, prepare, name)
            fit, check = (m.lacking(present) for m in sums)
        else:
            inputs = [call.hidden for call in calls]
            if moments is None or not all(map(operator.is_, inputs, seen)):
                moments, seen = _moments(_input_rows, batches, known, calls), inputs
                _check_finite(moments, known, calls, prepare, name)
            fit, check = (m.mapped(present[:, :-1]) for m in moments)
        change = fit.solve(ridge, linear.bias is not None)
        if check.gain(change) > 0:
            weight = change[:, :-1] if linear.outputs == 0 else change[:, :-1].T
            linear.weight.add_(weight.to(linear.weight))
            if linear.bias is not None:
                linear.bias.add_(change[:, -1].to(linear.bias))
        yield


def _input_rows(batch: Batch, target: LayerCall, call: LayerCall) -> _Rows:
    """Return what a layer before an inner dimension is fitted on, ``[tokens, ...]``.

    That is its inputs, what these lack of the dense inputs, and weights of 1.
    """
    keep = activation_mask(batch, call.hidden)
    hidden = _tokens(call.hidden, keep)
    return hidden, _tokens(target.hidden, keep) - hidden, hidden.new_ones(len(hidden), 1)


def _output_rows(stream: Stream | None, batch: Batch, target: LayerCall, call: LayerCall) -> _Rows:
    """Return what a layer after an inner dimension is fitted on, ``[tokens, ...]``.

    That is its inputs, what its outputs should be, and the weights of the tokens.
    """
    assert target.output is not None
    keep = activation_mask(batch, call.hidden)
    hidden, wanted = _tokens(call.hidden, keep), _tokens(target.output, keep)
    if stream is None or target.stream is None or call.stream is None:
        return hidden, wanted, hidden.new_ones(len(hidden), 1)
    there, here = _tokens(target.stream, keep), _tokens(call.stream, keep)
    variance = (there + stream.gain * wanted).var(-1, keepdim=True)
    wanted = wanted + torch.where(stream.gain != 0, (there - here) / stream.gain, 0)
    return hidden, wanted, 1 / variance.clamp(min=1e-12)


def _moments(
    rows: Callable[[Batch, LayerCall, LayerCall], _Rows],
    batches: Sequence[Batch],
    targets: Sequence[LayerCall],
    calls: Sequence[LayerCall],
) -> tuple[Moments, Moments]:
    """Return the moments of the batches to fit, and those of the batches to check."""
    triples = list(zip(batches, targets, calls, strict=True))
    check = triples[_CHECKED - 1 :: _CHECKED]
    del triples[_CHECKED - 1 :: _CHECKED]
    return _add_up(rows, triples), _add_up(rows, check)


def _add_up(
    rows: Callable[[Batch, LayerCall, LayerCall], _Rows],
    triples: Sequence[_Calls],
) -> Moments:
    """Sum over tokens: a few batches at a time in their own precision, the sums in float64."""

    def sums(few: Sequence[_Calls]) -> Moments:
        columns = zip(*(rows(*triple) for triple in few), strict=True)
        hidden, target, weight = map(torch.cat, columns)
        row = functional.pad(hidden, (0, 1), value=1.0)
        weighted = row * weight
        return Moments((weighted.T @ row).double(), (target.T @ weighted).double())

    starts = range(0, len(triples), _AT_ONCE)
    return reduce(Moments.plus, (sums(triples[start : start + _AT_ONCE]) for start in starts))


def _check_finite(
    moments: Iterable[Moments],
    targets: Sequence[LayerCall],
    calls: Sequence[LayerCall],
    prepare: Preparation,
    name: str,
) -> None:
    """Raise `NonFiniteLossError` with batch and row if a layer gets or gives what is not finite."""
    if all(sums.square.isfinite().all() and sums.cross.isfinite().all() for sums in moments):
        return
    for i, pair in enumerate(zip(targets, calls, strict=True)):
        for value in (v for call in pair for v in (call.hidden, call.output) if v is not None):
            row = row_not_finite(value)
            if row is not None:
                raise NonFiniteLossError(
                    f"{prepare.place(i, row)} gives NaN or infinite values at {name}; leave it out."
                )


def _affine(linear: LinearMap) -> Tensor:
    """Return the weight and the bias of a layer side by side, float64 ``[out, in + 1]``."""
    weight = linear.weight if linear.outputs == 0 else linear.weight.T
    bias = weight.new_zeros(len(weight)) if linear.bias is None else linear.bias
    return torch.cat([weight, bias.unsqueeze(1)], 1).double()


def _tokens(hidden: Tensor, keep: Tensor | None) -> Tensor:
    """Drop padding: ``[..., features] -> [tokens, features]``, in float32 or float64."""
    rows = hidden.flatten(0, -2)
    rows = rows if rows.dtype == torch.float64 else rows.float()
    return rows if keep is None else rows[keep.flatten()]


def _losses(
    dense: nn.Module,
    models: Sequence[nn.Module],
    refitted: Sequence[nn.Module],
    batches: Sequence[Batch],
    prepare: Preparation,
    loss: Loss | None,
) -> list[float]:
    """Return the mean loss of each model, or divergence from the dense one, on held-out batches.

    Raise `NonFiniteLossError` if that of one of `models`, which are not refitted, is not finite.
    """
    held = range(_CHECKED - 1, len(batches), _CHECKED)
    compared = Objective(dense, lambda: batches[held[0]], smaller=(*models, *refitted))
    totals = [0.0 for _ in (*models, *refitted)]
    for index in held:
        batch = batches[index]
        target = compared.target(batch) if loss is None else None
        for i, model in enumerate((*models, *refitted)):
            if target is None:
                assert loss is not None
                errors = loss(run(model, batch, labels=True), batch)
                value = float(errors) * batch_size(batch)
            else:
                errors = compared.divergence(target, compared.run(model, batch), batch)
                value = float(errors.double().sum())
            if i < len(models) and not math.isfinite(value):
                where = prepare.place(index, row_not_finite(errors) if loss is None else None)
                raise NonFiniteLossError(f"the loss of {where} is {value} before any refit.")
            totals[i] += value
    return [total / sum(batch_size(batches[index]) for index in held) for total in totals]
