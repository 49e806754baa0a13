"""Refit what is left of a cut model to the dense model, layer by layer, in closed form."""

import copy
import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import zip_longest
from typing import Any, TypeVar, cast, overload

import torch
from torch import nn

from solpath.config import check_number
from solpath.data.preparation import Preparation, preparing
from solpath.data.source import batch_size, check_ends, slice_samples, work_of
from solpath.errors import FingerprintError, NonFiniteLossError, UnsupportedModelError
from solpath.model.extraction import copy_extracted
from solpath.model.fingerprint import check_cut_from
from solpath.model.linear import linear_map
from solpath.model.plain import check_floats
from solpath.objective import Loss, Objective, mean_loss
from solpath.pair import Pair
from solpath.planning.plan import Plan, plan_of
from solpath.refining.fitting import CHECKED, Share, check_enough, refit_, share_of
from solpath.refining.passes import Calls, DenseCalls, held_bytes, waits_of
from solpath.running.claims import claimed
from solpath.running.forward import Batch, device_of, row_not_finite, run
from solpath.running.memory import fits
from solpath.running.modes import contained, inferring
from solpath.running.placement import check_one_device, is_placed
from solpath.running.processes import sum_over_processes
from solpath.running.progress import progress_bar
from solpath.wrapping import unwrapped

Model = TypeVar("Model", bound=nn.Module)

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
    plain copy of `small` is returned. All models are left as they were found, and the result shares
    no memory with them. The same inputs give the same bits on one machine.

    Under ``accelerate launch`` or ``torchrun``, every process is given the same models and batches,
    runs its share of the batches, and returns the same result.

    Args:
        small: A model from `extract` or `load`, or a sequence of them. Several are refitted side by
            side, each as it would be alone, while the dense model runs once for all of them.
        dense: The dense model that they were cut from, on the same device.
        batches: An iterable of what the models take, without labels. All batches stay in memory,
            with what their forward passes hold at one layer of every model, so they must have a
            length: of a generator, which may never end, give a list. If that would take more than
            four fifths of the free memory, they hold what goes into one block of layers, and run
            the block again for every layer: slower, with the same result. Tens of thousands of
            tokens are well spent: the more there are, the better the fit. Rows of padding alone are
            skipped, with one warning; labels become the inputs of a decoder that is given none.
        ridge: Pull towards the present weights, as a share of each input's own energy.
        loss: ``loss(outputs, batch)``, a mean over samples, that decides whether a refitted model
            is nearer, in place of the divergence from `dense`.
        progress: Whether to show a progress bar.

    Returns:
        A model with other weights and the class, plan, names and shapes of `small`; a list of such
        models if a sequence was given.

    Raises:
        UnsupportedModelError: `small` was not extracted or was quantised, or accelerate runs
            `dense` on several devices.
        FingerprintError: `small` was cut from a model of another class or shape than `dense`, or
            several are of paths with unlike pairs. Other weights of the same shapes give a warning.
        ConfigError: `ridge` is no number from 1e-12 to 1e12, or `loss` returns anything but one
            number.
        BatchError: There are fewer than four batches, or fewer than processes; a batch is on
            another device; or two batches run layers in different orders or on other inputs.
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
    plans = [_plan_of(model) for model in models]
    for model in models:
        check_floats(model, "compensate before quantising")
    dense = unwrapped(dense, hooks=True)
    check_number("ridge", ridge, 1e-12, 1e12)
    check_ends(batches)
    check_one_device(dense, "compared")
    with claimed(dense, *models, doing="compensated"):
        pairs = _common_pairs(plans, dense)
        models = [copy_extracted(model) if is_placed(model) else model for model in models]
        results = _compensate(models, dense, pairs, batches, ridge, loss, progress)
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
    layers = [side.module for pair in pairs for side in pair.sides]
    refitted = [_copy(model, shared=_others(model, layers)) for model in models]
    everyone: list[nn.Module] = [dense, *models, *refitted]
    with (
        preparing(dense, *{device_of(model) for model in everyone}) as prepare,
        inferring(*everyone),
    ):
        known = [prepare(i, batch) for i, batch in enumerate(batches)]
        check_enough(known)
        share = share_of(known)
        if loss is not None:  # what is wrong with it is said before the work
            mean_loss(loss, run(models[0], known[0], labels=True), known[0])
        sample = slice_samples(known[0], 0, min(_SAMPLES, batch_size(known[0])))
        works = [work_of(batch) for batch in known]
        work = sum(amount for amount, _ in works), works[0][1]
        _refit_(refitted, dense, pairs, share, sample, prepare, ridge, work, progress)
        errors = _losses(dense, models, refitted, known, share, prepare, loss)
    everyone.clear()
    results: list[Model] = []
    for before, worse, better in zip(
        models, errors[: len(models)], errors[len(models) :], strict=True
    ):
        after = refitted.pop(0)
        if better < worse:  # the weights of the layers are its own, and all others are copied now
            results.append(_copy(after, shared=_weights(after, layers)))
        else:
            results.append(copy_extracted(before))
    return results


def _copy(model: Model, *, shared: Iterable[nn.Parameter]) -> Model:
    """Return a copy of a model and its plan in which some parameters are those of the model."""
    plan = plan_of(model)
    return copy.deepcopy(model, {id(plan): plan} | {id(value): value for value in shared})


def _weights(model: nn.Module, layers: Iterable[str]) -> list[nn.Parameter]:
    """Return the weights and biases of layers."""
    return [value for name in layers for value in linear_map(model, name).parameters().values()]


def _others(model: nn.Module, layers: Iterable[str]) -> list[nn.Parameter]:
    """Return all parameters but the weights and biases of layers."""
    own = {id(value) for value in _weights(model, layers)}
    return [value for value in model.parameters() if id(value) not in own]


def _common_pairs(plans: Sequence[Plan], dense: nn.Module) -> list[Pair]:
    """Return the pairs that are refitted, which are those of all plans.

    Raise `FingerprintError` unless all plans are of the dense model, and of the same pairs.
    """
    pairs = set(plans[0].pairs)
    for i, plan in enumerate(plans):
        name = f"small[{i}]" if len(plans) > 1 else "small"
        check_cut_from(dense, plan, name)
        if other := sorted(pair.name for pair in pairs.symmetric_difference(plan.pairs)):
            raise FingerprintError(
                f"small[0] and {name} are of paths with unlike pairs, {other[0]} in one of them "
                "alone; compensate each in a call of its own."
            )
    return [pair for pair in plans[0].pairs if pair.kind != "experts"]


def _plan_of(model: nn.Module) -> Plan:
    plan = plan_of(model)
    if plan is None:
        raise UnsupportedModelError(
            f"this {type(model).__name__} was not extracted; call solpath.extract(model, plan)."
        )
    return plan


def _refit_(
    models: Sequence[nn.Module],
    dense: nn.Module,
    pairs: Sequence[Pair],
    share: Share,
    sample: Batch,
    prepare: Preparation,
    ridge: float,
    work: tuple[int, str],
    progress: bool,
) -> None:
    """Refit every layer of `models` that belongs to a pair, in the order they run, in place."""
    waits = waits_of(dense, models, pairs, sample)
    in_parts = bool(waits.blocks) and _is_short(
        held_bytes(waits, dense, models, sample, share.batches), dense
    )

    def refits(model: nn.Module, calls: Calls) -> Iterator[None]:
        for group, own in calls:
            name = group[0]
            known, stream = targets.use(group), waits.streams.get(name)
            refit_(
                model,
                group,
                own,
                known,
                share,
                prepare,
                stream,
                last=name in waits.last,
                ridge=ridge,
            )
            del own, known  # the passes go on without them
            yield

    steps, said = len(waits.groups), "blocks again, to save memory" if in_parts else ""
    with (
        waits.running(dense, models, share.batches, in_parts=in_parts) as (wanted, *given),
        progress_bar("compensate", said, steps, 0, show=progress) as report,
    ):
        targets = DenseCalls(wanted, len(models))
        amount, unit = work  # goes through all groups once, and a step is one of them
        for _ in zip_longest(*map(refits, models, given)):
            report(work=(amount / steps, unit))


def _is_short(size: int, dense: nn.Module) -> bool:
    """Return whether so many bytes are more than some process can take on its device."""
    short = not fits(size, device_of(dense))
    return bool(sum_over_processes(torch.tensor([float(short)])))


def _losses(
    dense: nn.Module,
    models: Sequence[nn.Module],
    refitted: Sequence[nn.Module],
    batches: Sequence[Batch],
    share: Share,
    prepare: Preparation,
    loss: Loss | None,
) -> list[float]:
    """Return the mean loss of each model, or divergence from the dense one, on held-out batches.

    Raise `NonFiniteLossError` if that of one of `models`, which are not refitted, is not finite.
    """
    held = range(CHECKED - 1, len(batches), CHECKED)
    compared = Objective(dense, lambda: batches[held[0]], smaller=(*models, *refitted))
    totals = torch.zeros(len(models) + len(refitted), dtype=torch.float64)
    where = "some batch, maybe of another process,"
    for number in (n for n, own in zip(share.numbers, share.held, strict=True) if own):
        batch = batches[number]
        target = compared.target(batch) if loss is None else None
        for i, model in enumerate((*models, *refitted)):
            if target is None:
                assert loss is not None
                errors = mean_loss(loss, run(model, batch, labels=True), batch)
                value = float(errors) * batch_size(batch)
            else:
                errors = compared.divergence(target, compared.run(model, batch), batch)
                value = float(errors.double().sum())
            if i < len(models) and not math.isfinite(value):
                where = prepare.place(number, row_not_finite(errors) if loss is None else None)
            totals[i] += value
    totals = sum_over_processes(totals)
    for value in totals[: len(models)].tolist():
        if not math.isfinite(value):
            raise NonFiniteLossError(f"the loss of {where} is {value} before any refit.")
    return (totals / sum(batch_size(batches[number]) for number in held)).tolist()
