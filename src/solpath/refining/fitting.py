"""Fit one layer: the moments of its tokens over batches and processes, and the new weights."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from solpath.data.preparation import Preparation
from solpath.errors import BatchError, NonFiniteLossError
from solpath.model.linear import LinearMap, linear_map
from solpath.refining.layerwise import Group, LayerCall, Stream
from solpath.refining.least_squares import Moments
from solpath.running.forward import Batch, activation_mask, at_least_float, row_not_finite
from solpath.running.processes import process, sum_over_processes

CHECKED = 4
"""One batch in so many is held out: it decides whether a refit stays."""

_AT_ONCE = 8  # batches whose tokens go into one product

_Rows = tuple[Tensor, Tensor, Tensor | None]  # inputs, what they are fitted to, token weights


@dataclass(frozen=True)
class Share:
    """The batches that this process runs, of those that every process was given.

    Attributes:
        batches: The batches.
        numbers: The number of each among all batches.
    """

    batches: Sequence[Batch]
    numbers: Sequence[int]

    @property
    def held(self) -> list[bool]:
        """Whether each batch is held out."""
        return [number % CHECKED == CHECKED - 1 for number in self.numbers]


def check_enough(batches: Sequence[Batch]) -> None:
    """Raise `BatchError` if there are too few batches to fit on some and check on others."""
    if len(batches) < CHECKED:
        raise BatchError(f"compensate needs at least {CHECKED} batches, got {len(batches)}.")


def share_of(batches: Sequence[Batch]) -> Share:
    """Return the share of this process: each batch to fit, and each held-out one, has one process.

    Args:
        batches: All batches, the same in every process.

    Raises:
        BatchError: There are fewer batches than processes.
    """
    rank, world = process()
    if len(batches) < world:
        raise BatchError(
            f"{world} processes need at least as many batches, got {len(batches)}; make "
            "them smaller."
        )
    held = range(CHECKED - 1, len(batches), CHECKED)
    fitted = [i for i in range(len(batches)) if i % CHECKED != CHECKED - 1]
    numbers = sorted([*fitted[rank::world], *held[world - 1 - rank :: world]])
    return Share([batches[i] for i in numbers], numbers)


def refit_(
    model: nn.Module,
    group: Group,
    calls: Iterable[LayerCall],
    targets: Iterable[LayerCall],
    share: Share,
    prepare: Preparation,
    stream: Stream | None,
    *,
    last: bool,
    ridge: float,
) -> None:
    """Refit the layers of one group of a cut model, in place, each where that helps.

    Args:
        model: The cut model.
        group: The layers, which get the same input.
        calls: Their calls in the cut model, of every batch of `share`. They may be read twice.
        targets: Their calls in the dense model: inputs, or the output of a layer that is `last`.
        share: The batches that this process runs. The moments are summed over all processes.
        prepare: Names batches in errors.
        stream: The stream that the layer adds to.
        last: Whether the layer, alone in its group, comes after an inner dimension. It is fitted
            to the dense output; others to what they give on the dense input.
        ridge: See `compensate`.

    Raises:
        NonFiniteLossError: A layer gets or gives what is not finite.
    """
    first = linear_map(model, group[0])
    rows = partial(_output_rows, stream, group[0]) if last else partial(_input_rows, group[0])
    features = first.out_features if last else first.in_features
    zeros = partial(Moments.zeros, features, first.in_features + 1, first.weight.device)
    sums = _moments(rows, share, targets, calls, zeros)
    _check_finite(sums, targets, calls, share, prepare, group[0])
    for name in group:
        linear = linear_map(model, name)
        present = _affine(linear)
        if last:
            fit, check = (moments.lacking(present) for moments in sums)
        else:
            fit, check = (moments.mapped(present[:, :-1]) for moments in sums)
        change = fit.solve(ridge, linear.bias is not None)
        if check.gain(change) > 0:
            _add_(linear.weight, change[:, :-1] if linear.outputs == 0 else change[:, :-1].T)
            if linear.bias is not None:
                _add_(linear.bias, change[:, -1])


def _add_(parameter: Tensor, change: Tensor) -> None:
    """Add a change to a parameter, which is rounded once, after the sum."""
    wide = at_least_float(parameter)
    parameter.copy_(wide + change.to(wide))


def _input_rows(name: str, batch: Batch, target: LayerCall, call: LayerCall) -> _Rows:
    """Return what a layer before an inner dimension is fitted on, ``[tokens, ...]``.

    That is its inputs, and what these lack of the dense inputs. All tokens weigh the same.
    """
    keep = activation_mask(batch, call.value, name)
    hidden = _tokens(call.value, keep)
    return hidden, _tokens(target.value, keep) - hidden, None


def _output_rows(
    stream: Stream | None, name: str, batch: Batch, target: LayerCall, call: LayerCall
) -> _Rows:
    """Return what a layer after an inner dimension is fitted on, ``[tokens, ...]``.

    That is its inputs, what its outputs should be, and the weights of the tokens.
    """
    keep = activation_mask(batch, call.value, name)
    hidden, wanted = _tokens(call.value, keep), _tokens(target.value, keep)
    if stream is None or target.stream is None or call.stream is None:
        return hidden, wanted, None
    there, here = _tokens(target.stream, keep), _tokens(call.stream, keep)
    variance = (there + stream.gain * wanted).var(-1, keepdim=True)
    wanted = wanted + torch.where(stream.gain != 0, (there - here) / stream.gain, 0)
    return hidden, wanted, 1 / variance.clamp(min=1e-12)


def _moments(
    rows: Callable[[Batch, LayerCall, LayerCall], _Rows],
    share: Share,
    targets: Iterable[LayerCall],
    calls: Iterable[LayerCall],
    zeros: Callable[[], Moments],
) -> tuple[Moments, Moments]:
    """Return the moments of the batches to fit, and those of the batches to check.

    They are those of all processes. Every call is read once, and a few are kept at a time.
    """
    sums: dict[bool, Moments] = {False: zeros(), True: zeros()}
    found: dict[bool, list[_Rows]] = {False: [], True: []}
    for batch, held, target, call in zip(share.batches, share.held, targets, calls, strict=True):
        found[held].append(rows(batch, target, call))
        if len(found[held]) == _AT_ONCE:
            sums[held].plus_(*_products(found[held]))
            found[held].clear()
    for held, few in found.items():
        if few:
            sums[held].plus_(*_products(few))
    fit, check = (
        Moments(*(sum_over_processes(part).to(part.device) for part in sums[held]))
        for held in (False, True)
    )
    return fit, check


def _products(rows: Sequence[_Rows]) -> tuple[Tensor, Tensor]:
    """Sum over the tokens of a few batches in their own precision; the sums are float64."""
    hidden, target, weights = zip(*rows, strict=True)
    row = functional.pad(torch.cat(hidden), (0, 1), value=1.0)
    known = [weight for weight in weights if weight is not None]
    weighted = row * torch.cat(known).to(row.dtype) if known else row
    cross = (torch.cat(target).to(weighted.dtype).T @ weighted).double()
    return (weighted.T @ row).double(), cross


def _check_finite(
    moments: Iterable[Moments],
    targets: Iterable[LayerCall],
    calls: Iterable[LayerCall],
    share: Share,
    prepare: Preparation,
    name: str,
) -> None:
    """Raise `NonFiniteLossError` with batch and row if a layer gets or gives what is not finite."""
    if all(sums.square.isfinite().all() and sums.cross.isfinite().all() for sums in moments):
        return
    where = "some batch, maybe of another process,"
    for number, pair in zip(share.numbers, zip(targets, calls, strict=True), strict=True):
        row = next((r for call in pair if (r := row_not_finite(call.value)) is not None), None)
        if row is not None:
            where = prepare.place(number, row)
            break
    raise NonFiniteLossError(f"{where} gives NaN or infinite values at {name}; leave it out.")


def _affine(linear: LinearMap) -> Tensor:
    """Return the weight and the bias of a layer side by side, float64 ``[out, in + 1]``."""
    weight = linear.weight if linear.outputs == 0 else linear.weight.T
    bias = weight.new_zeros(len(weight)) if linear.bias is None else linear.bias
    return torch.cat([weight, bias.unsqueeze(1)], 1).double()


def _tokens(hidden: Tensor, keep: Tensor | None) -> Tensor:
    """Drop padding: ``[..., features] -> [tokens, features]``, in float32 or float64."""
    rows = at_least_float(hidden.flatten(0, -2))
    return rows if keep is None else rows[keep.flatten()]
