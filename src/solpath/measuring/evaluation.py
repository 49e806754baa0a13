"""Measure how close a smaller model stays to the dense model on held-out batches."""

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, overload

import torch
from torch import nn

from solpath.data.preparation import Preparation, preparing
from solpath.data.source import batch_size, check_device, check_ends
from solpath.errors import BatchError, ConfigError, NonFiniteLossError
from solpath.measuring.comparison import Tally, Target, compare_batch, dense_output
from solpath.measuring.intervals import mean_interval
from solpath.measuring.metrics import figure
from solpath.model.head import LazyLogits
from solpath.objective import Loss, mean_loss
from solpath.planning.cost import Achieved
from solpath.planning.plan import plan_of
from solpath.reading import whole
from solpath.running.claims import claimed
from solpath.running.forward import device_of, run
from solpath.running.modes import contained, inferring
from solpath.running.provenance import provenance
from solpath.wrapping import unwrapped

_ONE = "the model"  # what messages call it, where there is one


@dataclass(frozen=True)
class Result:
    """What an evaluation found.

    Attributes:
        metrics: Name of a metric to its value, see `evaluate`.
        intervals: Name of a metric to the ends of its 95 % confidence interval, over which samples
            might have been drawn. A metric of fewer than two samples, and ``"task"``, has none.
        samples: Number of samples.
        cost: Size of the model if it was extracted, otherwise None.
        provenance: Where the figures come from, see `solpath.running.provenance.provenance`.
    """

    metrics: Mapping[str, float]
    samples: int
    cost: Achieved | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)
    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        return {**asdict(self), "cost": None if self.cost is None else self.cost.to_dict()}

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> "Result":
        """Return the result that `to_dict` described.

        Args:
            value: What `to_dict` returned, also after a round trip through JSON.

        Raises:
            ValueError: A field is missing or is not what it should be. The message names it.
        """
        if missing := sorted(cls.__dataclass_fields__.keys() - value.keys()):
            raise ValueError(f"{missing[0]} is missing")
        for name in ("metrics", "intervals", "provenance"):
            if not isinstance(value[name], Mapping):
                raise ValueError(f"{name} is no object")
        metrics, cost = numbers_of("metrics", value["metrics"]), value["cost"]
        if not isinstance(cost, Mapping | None):
            raise ValueError("cost is no object")
        for name, ends in value["intervals"].items():
            if name not in metrics or not isinstance(ends, Sequence) or len(ends) != 2:
                raise ValueError(f"intervals.{name} is not the two ends of a metric")
            numbers_of(f"intervals.{name}", dict(enumerate(ends)))
        return cls(
            metrics=metrics,
            samples=whole(value["samples"], least=1),
            cost=None if cost is None else Achieved.from_dict(cost),
            provenance=dict(value["provenance"]),
            intervals={name: (low, high) for name, (low, high) in value["intervals"].items()},
        )

    def __repr__(self) -> str:
        metrics = ", ".join(f"{name}={figure(value)}" for name, value in self.metrics.items())
        size = f", {self.cost.params:,} parameters" if self.cost else ""
        return f"Result({metrics}, {self.samples:,} samples{size})"


def numbers_of(name: str, value: Mapping[Any, Any]) -> dict[Any, float]:
    """Return an object of numbers that was read from a file. Raise `ValueError` for another.

    Args:
        name: What the message calls it.
        value: What was read.
    """
    for key, number in value.items():
        if type(number) not in (int, float):
            raise ValueError(f"{name}.{key} is not a number")
    return dict(value)


@overload
def evaluate(
    model: nn.Module,
    reference: nn.Module | Sequence[Target],
    batches: Iterable[Any],
    *,
    task: Callable[[nn.Module], float] | None = None,
    loss: Loss | None = None,
) -> Result: ...
@overload
def evaluate(
    model: Mapping[str, nn.Module],
    reference: nn.Module | Sequence[Target],
    batches: Iterable[Any],
    *,
    task: Callable[[nn.Module], float] | None = None,
    loss: Loss | None = None,
) -> dict[str, Result]: ...
@contained
def evaluate(
    model: nn.Module | Mapping[str, nn.Module],
    reference: nn.Module | Sequence[Target],
    batches: Iterable[Any],
    *,
    task: Callable[[nn.Module], float] | None = None,
    loss: Loss | None = None,
) -> Result | dict[str, Result]:
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

    Every mean has a 95 % confidence interval over the samples, whose tokens are taken together;
    that of a loss is over the batches. `solpath.measuring.intervals` says how, and when it holds.

    Of large vocabularies (256 MiB of logits a batch and more) the logits are computed and compared
    some tokens at a time, from the hidden states ahead of the head.

    All models run in eval mode without gradients. They are left as they were found, and so is the
    state of torch's random number generators.

    Args:
        model: The smaller model, or the dense model inside ``with masked(model, plan):``. Or name
            to model, for several that are compared with one pass of the reference.
        reference: The dense model, or its outputs on these batches from `reference_outputs`. Inside
            ``with masked(...)`` the outputs are needed, because there the dense model is masked.
        batches: The held-out batches. Each is run once, so they must have a length: of a generator,
            which may never end, give a list. Rows of padding alone are skipped, with one warning;
            labels become the inputs of a decoder that is given none.
        task: A function that is called with every model. Its value is reported as
            ``metrics["task"]``.
        loss: ``loss(outputs, batch)``, a mean over samples, that gets the labels. Its means over
            all samples are reported as ``"loss"`` and, for a dense model as reference,
            ``"reference_loss"``. With it, outputs need not be comparable.

    Returns:
        The metrics, with the size of the model and where the figures come from. Of several models,
        name to these.

    Raises:
        ConfigError: `model` is a mapping without models, or `loss` returns anything but one number.
        BatchError: There are no batches, a batch is on another device than `model` or than the
            dense `reference`, or an output is not finite or does not fit the reference. The message
            names the batch, and the row. Or the head of a dense model has changed since
            `reference_outputs`.
        NonFiniteLossError: `loss` is NaN or infinite on a batch.
        ModelInUseError: A model is searched, `reference` is masked, or another thread works on one
            of them.

    Example:
        >>> result = solpath.evaluate(small, model, batches)
        >>> sorted(result.metrics), result.samples
        (['agreement', 'cosine', 'kl', 'relative_error'], 96)
        >>> low, high = result.intervals["kl"]
        >>> low < result.metrics["kl"] < high
        True
        >>> found = solpath.evaluate({"small": small, "dense": model}, model, batches)
        >>> found["small"].metrics == result.metrics, found["dense"].metrics["relative_error"]
        (True, 0.0)
    """
    check_ends(batches)
    models = dict(model) if isinstance(model, Mapping) else {_ONE: model}
    if not models:
        raise ConfigError("model is empty; give at least one, for example {'small': small}.")
    models = {name: unwrapped(one, adapters=True) for name, one in models.items()}
    if not isinstance(reference, Sequence):
        reference = unwrapped(reference, adapters=True)
    first, *_ = models.values()
    dense = reference if isinstance(reference, nn.Module) else None
    tallies = {name: Tally() for name in models}
    own: dict[str, dict[str, list[float]]] = {name: defaultdict(list) for name in models}
    sizes: list[int] = []
    with (
        claimed(*filter(None, [dense]), doing="compared with", admits="anything"),
        claimed(*models.values(), doing="evaluated", admits="anything", runs=True),
        inferring(*filter(None, (*models.values(), dense))),
        preparing(first, *map(device_of, models.values())) as prepare,
    ):
        for i, (batch, target) in enumerate(_with_targets(reference, prepare, batches, loss)):
            sizes.append(batch_size(batch))
            if loss is not None:
                for name, judged in models.items():
                    value = _loss(loss, judged, batch, f"loss of batch {i}")
                    own[name]["loss"].append(value)
                if dense is not None:
                    value = _loss(loss, dense, batch, f"reference_loss of batch {i}")
                    for losses in own.values():
                        losses["reference_loss"].append(value)
            if target is not None:
                compare_batch(models, tallies, target, batch, partial(prepare.place, i))
        if not sizes:
            raise BatchError("batches is empty; give at least one held-out batch.")
        results = {}
        for name, one in models.items():
            metrics, intervals = tallies[name].summary()
            for key, sums in own[name].items():
                metrics[key] = sum(sums) / sum(sizes)
                ends = mean_interval(torch.tensor(sums, dtype=torch.float64), torch.tensor(sizes))
                intervals |= {} if ends is None else {key: ends}
            if task is not None:
                metrics["task"] = float(task(one))
            plan = plan_of(one)
            results[name] = Result(
                metrics=metrics,
                samples=sum(sizes),
                cost=None if plan is None else plan.achieved,
                provenance=provenance(device_of(one)),
                intervals=intervals,
            )
    return results if isinstance(model, Mapping) else results[_ONE]


def _loss(loss: Loss, model: nn.Module, batch: Any, name: str) -> float:
    """Return a loss summed over the samples of a batch."""
    value = float(mean_loss(loss, run(model, batch, labels=True), batch))
    if not math.isfinite(value):
        raise NonFiniteLossError(f"the {name} is {value}.")
    return value * batch_size(batch)


@contained
def reference_outputs(model: nn.Module, batches: Iterable[Any]) -> list[Target]:
    """Return the outputs of the dense model, on the CPU, one per batch, for `evaluate`.

    Each is a tensor. Of a large vocabulary (256 MiB of logits a batch and more) only the hidden
    states ahead of the head are kept, and `evaluate` runs the head of `model` on some tokens at a
    time. It refuses to if the head has changed by then.

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
        found = (dense_output(model, prepare(i, batch)) for i, batch in enumerate(batches))
        outputs = [output.cpu() for output in found if output is not None]
    if not outputs:
        raise BatchError("batches is empty; give at least one held-out batch.")
    return outputs


def _with_targets(
    reference: nn.Module | Sequence[Target],
    prepare: Preparation,
    batches: Iterable[Any],
    loss: Loss | None,
) -> Iterator[tuple[Any, Target | None]]:
    """Yield every batch with the output of the reference for it.

    With a loss it is None where outputs cannot be compared. Raise `BatchError` if there are more
    batches than outputs, or the other way round.
    """
    if isinstance(reference, nn.Module):
        for i, given in enumerate(batches):
            batch = prepare(i, given)
            check_device(batch, device_of(reference))
            yield batch, dense_output(reference, batch, optional=loss is not None)
        return
    end = object()
    for i, (batch, target) in enumerate(itertools.zip_longest(batches, reference, fillvalue=end)):
        if batch is end or not isinstance(target, Target):
            state = f"reference output {i} has no batch"
            if batch is not end:
                state = f"batch {i} has no reference output"
            raise BatchError(f"{state}; take reference_outputs(dense, batches) of these batches.")
        if isinstance(target, LazyLogits):
            target.check(f"reference output {i}")
        yield prepare(i, batch), target
