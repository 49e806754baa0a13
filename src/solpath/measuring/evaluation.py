"""Measure how close a smaller model stays to the dense model on held-out batches."""

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from solpath.data.preparation import Preparation, preparing
from solpath.data.source import batch_size, check_device, check_ends
from solpath.errors import BatchError, NonFiniteLossError
from solpath.measuring.metrics import compare, relative_to_spread
from solpath.objective import Loss, kind_of
from solpath.planning.cost import Achieved
from solpath.planning.plan import plan_of
from solpath.pretrained import unwrapped
from solpath.running.claims import claimed
from solpath.running.forward import (
    attended,
    device_of,
    forward,
    output_mask,
    output_tensor,
    row_not_finite,
    run,
)
from solpath.running.modes import contained, inferring
from solpath.running.provenance import provenance


@dataclass(frozen=True)
class Result:
    """What an evaluation found.

    Attributes:
        metrics: Name of a metric to its value, see `evaluate`.
        samples: Number of samples.
        cost: Size of the model if it was extracted, otherwise None.
        provenance: Where the figures come from, see `solpath.running.provenance.provenance`.
    """

    metrics: Mapping[str, float]
    samples: int
    cost: Achieved | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        return {**asdict(self), "cost": None if self.cost is None else self.cost.to_dict()}

    def __repr__(self) -> str:
        metrics = ", ".join(f"{name}={value:.4f}" for name, value in self.metrics.items())
        size = f", {self.cost.params:,} parameters" if self.cost else ""
        return f"Result({metrics}, {self.samples:,} samples{size})"


@contained
def evaluate(
    model: nn.Module,
    reference: nn.Module | Sequence[Tensor],
    batches: Iterable[Any],
    *,
    task: Callable[[nn.Module], float] | None = None,
    loss: Loss | None = None,
) -> Result:
    """Compare the outputs of `model` with those of the dense `reference`.

    What is compared follows from what `model` predicts (`solpath.objective`). With y an output and
    t that of the reference, ``relative_error`` is ``|y - t|² / |t|²`` and ``kl`` is KL(t || y) in
    nats; padding does not count.

    - Classes: the means over positions of ``kl``, ``agreement`` (equal argmax), ``cosine`` and
      ``relative_error``.
    - Labels, and spans of question answering: the means over samples of ``kl``, ``agreement``
      (equal decisions, or equal start and end) and ``relative_error``.
    - A regression: ``relative_error``, here relative to the spread of all targets, that is 1 - R².
    - Hidden states: the means over samples of ``relative_error`` and of ``cosine``, which compares
      the averages over tokens.

    Both models run in eval mode without gradients. They are left as they were found, and so is the
    state of torch's random number generators.

    Args:
        model: The smaller model, or the dense model inside ``with masked(model, plan):``.
        reference: The dense model, or its outputs on these batches from `reference_outputs`. Inside
            ``with masked(...)`` the outputs are needed, because there the dense model is masked.
        batches: The held-out batches. Each is run once, so they must have a length: of a generator,
            which may never end, give a list. Rows of padding alone are skipped, with one warning;
            labels become the inputs of a decoder that is given none.
        task: A function that is called with `model`. Its value is reported as ``metrics["task"]``.
        loss: ``loss(outputs, batch)``, a mean over samples, that gets the labels. Its means over
            all samples are reported as ``"loss"`` and, for a dense model as reference,
            ``"reference_loss"``. With it, outputs need not be comparable.

    Returns:
        The metrics, with the size of the model and where the figures come from.

    Raises:
        BatchError: There are no batches, a batch is on another device than `model` or than the
            dense `reference`, or an output is not finite or does not fit the reference. The message
            names the batch, and the row.
        NonFiniteLossError: `loss` is NaN or infinite on a batch.
        ModelInUseError: A model is searched, `reference` is masked, or another thread works on one
            of them.

    Example:
        >>> result = solpath.evaluate(small, model, batches)
        >>> sorted(result.metrics), result.samples
        (['agreement', 'cosine', 'kl', 'relative_error'], 96)
        >>> solpath.evaluate(model, model, batches).metrics["relative_error"]
        0.0
    """
    check_ends(batches)
    model = unwrapped(model, adapters=True)
    if not isinstance(reference, Sequence):
        reference = unwrapped(reference, adapters=True)
    device = device_of(model)
    totals: dict[str, float] = defaultdict(float)
    own: dict[str, float] = defaultdict(float)
    samples = 0
    values: list[tuple[Tensor, Tensor]] = []  # of a regression, whose spread is that of all
    dense = reference if isinstance(reference, nn.Module) else None
    with (
        claimed(*filter(None, [dense]), doing="compared with", admits="anything"),
        claimed(model, doing="evaluated", admits="anything", runs=True),
        inferring(*filter(None, (model, dense))),
        preparing(model, device) as prepare,
    ):
        for i, (batch, target) in enumerate(_with_targets(reference, prepare, batches, loss)):
            samples += batch_size(batch)
            if loss is not None:
                for name, judged in (("loss", model), ("reference_loss", dense)):
                    if judged is not None:
                        value = float(loss(run(judged, batch, labels=True), batch))
                        if not math.isfinite(value):
                            raise NonFiniteLossError(f"the {name} of batch {i} is {value}.")
                        own[name] += value * batch_size(batch)
            if target is None:
                continue
            outputs = run(model, batch, labels=False)
            output, kind = output_tensor(outputs), kind_of(model, outputs)
            target = target.to(output.device)
            _check(prepare, i, output, target)
            if kind == "regression":
                values.append((output, target))
                continue
            mask = attended(batch, output) if kind == "spans" else output_mask(batch, output)
            for name, total in compare(output, target, mask, kind=kind).items():
                totals[name] += total
        if not samples:
            raise BatchError("batches is empty; give at least one held-out batch.")
        count = totals.pop("count", 1)
        metrics = {name: total / count for name, total in totals.items()}
        if values:
            metrics["relative_error"] = relative_to_spread(values)
        metrics |= {name: total / samples for name, total in own.items()}
        if task is not None:
            metrics["task"] = float(task(model))
    plan = plan_of(model)
    return Result(
        metrics=metrics,
        samples=samples,
        cost=None if plan is None else plan.achieved,
        provenance=provenance(device),
    )


@contained
def reference_outputs(model: nn.Module, batches: Iterable[Any]) -> list[Tensor]:
    """Return the outputs of the dense model, one tensor on the CPU per batch, for `evaluate`.

    Args:
        model: The dense model, which is left as it was found.
        batches: The batches, on the device of the model. Each is run once, so they must have a
            length. They are skipped and completed as in `evaluate`.

    Returns:
        What `forward` gives for every batch, in the order of the batches.

    Raises:
        BatchError: There are no batches, a single one in place of several, or one that is on
            another device.
        ModelInUseError: The model is searched, or another thread works on it.

    Example:
        >>> targets = reference_outputs(model, batches)
        >>> with solpath.masked(model, path.plan(sparsity=0.5)):
        ...     solpath.evaluate(model, targets, batches).samples
        96
    """
    check_ends(batches)
    model = unwrapped(model, adapters=True)
    with (
        claimed(model, doing="run", admits="anything", runs=True),
        inferring(model),
        preparing(model, device_of(model)) as prepare,
    ):
        outputs = [forward(model, prepare(i, batch)).cpu() for i, batch in enumerate(batches)]
    if not outputs:
        raise BatchError("batches is empty; give at least one held-out batch.")
    return outputs


def _with_targets(
    reference: nn.Module | Sequence[Tensor],
    prepare: Preparation,
    batches: Iterable[Any],
    loss: Loss | None,
) -> Iterator[tuple[Any, Tensor | None]]:
    """Yield every batch with the output of the reference for it.

    With a loss it is None where outputs cannot be compared. Raise `BatchError` if there are more
    batches than outputs, or the other way round.
    """
    if isinstance(reference, nn.Module):
        for i, given in enumerate(batches):
            batch = prepare(i, given)
            check_device(batch, device_of(reference))
            outputs = run(reference, batch, labels=False)
            try:
                compared: Tensor | None = output_tensor(outputs)
            except BatchError:
                if loss is None:
                    raise
                compared = None
            yield batch, compared
        return
    end = object()
    for i, (batch, target) in enumerate(itertools.zip_longest(batches, reference, fillvalue=end)):
        if batch is end or not isinstance(target, Tensor):
            state = f"reference output {i} has no batch"
            if batch is not end:
                state = f"batch {i} has no reference output"
            raise BatchError(f"{state}; take reference_outputs(dense, batches) of these batches.")
        yield prepare(i, batch), target


def _check(prepare: Preparation, index: int, output: Tensor, target: Tensor) -> None:
    if output.shape != target.shape:
        raise BatchError(
            f"batch {index}: the model gives {list(output.shape)} and the reference "
            f"{list(target.shape)}; both must be run on the same batches."
        )
    for name, value in (("model", output), ("reference", target)):
        if not torch.isfinite(value).all():
            where = prepare.place(index, row_not_finite(value))
            raise BatchError(f"{where}: the output of the {name} has NaN or infinite values.")
