"""What a smaller model loses against the dense one, sample by sample, and bounds of its mean."""

from collections.abc import Callable, Mapping
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from solpath.choosing.bounds import Array, mean_upper, paired_upper
from solpath.data.source import slice_samples
from solpath.divergence import Kind
from solpath.errors import BatchError, ConfigError, NonFiniteLossError
from solpath.model.head import logits_in_parts, parts
from solpath.objective import Objective, Targets, kind_of
from solpath.objective import Target as DenseTarget
from solpath.running.forward import Batch, output_tensor, row_not_finite, run

Place = Callable[[int | None], str]
"""Returns the words for a batch, or for a row of it, for messages."""

_IGNORED = -100


class Metric(Protocol):
    """The loss of every sample, in ``[-highest, highest]``, and an upper bound of its expectation.

    Attributes:
        name: ``"accuracy"`` or ``"divergence"``.
        highest: The largest loss of a sample.
        skip: Number of batches, the first ones, that set a scale and are not judged.
    """

    name: str
    highest: float
    skip: int

    @property
    def terms(self) -> tuple[str, ...]:
        """What the promise is about, for people; known once `see_dense` has seen all batches."""

    def see_dense(self, index: int, batch: Batch, place: Place) -> None:
        """Run the dense model on a batch, and keep what `losses` needs of it."""

    def check(self) -> None:
        """Raise `BatchError` if what the dense model gave for all batches cannot judge."""

    def losses(self, model: nn.Module, index: int, batch: Batch, place: Place) -> Array:
        """Return the loss of every sample of a batch that `see_dense` has seen, ``[batch]``."""

    def upper(self, losses: Array, delta: float) -> float:
        """Return a bound of the expected loss, too low with a probability of at most `delta`.

        Args:
            losses: The losses of independent draws: of samples, or means over groups of them.
            delta: The probability, in (0, 1).
        """


def metric_for(
    name: str | None, dense: nn.Module, first: Batch, clip: float, *, grouped: bool = False
) -> Metric:
    """Return a metric by its name, or the one that suits the first batch.

    Args:
        name: ``"accuracy"``, ``"divergence"``, or None for accuracy where there are labels of
            classes.
        dense: The dense model, in eval mode.
        first: The first batch.
        clip: The largest divergence of a sample.
        grouped: Whether what is bounded are means over groups of samples.

    Raises:
        ConfigError: The name is unknown.
        BatchError: The outputs cannot be compared, or cannot be right or wrong.
    """
    if name not in (None, "accuracy", "divergence"):
        raise ConfigError(f"metric must be 'accuracy' or 'divergence', got {name!r}.")
    sample = slice_samples(first, 0, 1)
    with torch.no_grad():
        kind = kind_of(dense, run(dense, sample, labels=False))
    labels = first.get("labels") if isinstance(first, Mapping) else None
    judged = isinstance(labels, Tensor) and kind in ("classes", "labels")
    if name == "divergence" or (name is None and not judged):
        return Divergence(dense, first, kind, clip)
    if not judged or not isinstance(labels, Tensor):
        raise BatchError(
            "metric='accuracy' needs labels in every batch and a model that predicts classes; this "
            f"{type(dense).__name__} predicts {kind}, and batch 0 has "
            f"{'labels' if labels is not None else 'no labels'}; take metric='divergence'."
        )
    return Accuracy(dense, kind, by_sample=labels.dim() == 1, grouped=grouped)


class Accuracy:
    """The share of a sample's labels that the dense model has right, less that of a smaller model.

    Args:
        dense: The dense model.
        kind: What its outputs mean.
        by_sample: Whether each sample has one label, and so is right or wrong.
        grouped: Whether what is bounded are means over groups of samples.
    """

    name, highest, skip = "accuracy", 1.0, 0

    def __init__(self, dense: nn.Module, kind: Kind, *, by_sample: bool, grouped: bool) -> None:
        self._dense, self._kind, self._by_sample = dense, kind, by_sample
        self._exact = by_sample and not grouped
        self._right: dict[int, Array] = {}

    @property
    def terms(self) -> tuple[str, ...]:
        """See `Metric`. The dense accuracy shows labels that mean something else."""
        text = f"the accuracy of the dense model, {self._accuracy():.4g} on these samples"
        text += ", less that of the member"
        if not self._by_sample:
            text += ", each the mean over samples of the share of their labels that is right"
        return (f"The loss is {text}.",)

    def _accuracy(self) -> float:
        return float(np.concatenate(list(self._right.values())).mean())

    def see_dense(self, index: int, batch: Batch, place: Place) -> None:
        """See `Metric`."""
        self._right[index] = self._judge(self._dense, batch, place)

    def check(self) -> None:
        """See `Metric`. A model that has nothing right cannot lose anything."""
        if self._right and not self._accuracy():
            raise BatchError(
                "the dense model has not one label right, so no member could lose anything; see "
                "what the numbers of the labels mean, or take metric='divergence'."
            )

    def losses(self, model: nn.Module, index: int, batch: Batch, place: Place) -> Array:
        """See `Metric`."""
        return self._right[index] - self._judge(model, batch, place)

    def upper(self, losses: Array, delta: float) -> float:
        """See `Metric`. Exact where samples are right or wrong, otherwise by betting."""
        if self._exact:
            worse, better = int((losses > 0).sum()), int((losses < 0).sum())
            return paired_upper(worse, better, len(losses), delta)
        return 2 * _bet((losses + 1) / 2, delta) - 1

    def _judge(self, model: nn.Module, batch: Batch, place: Place) -> Array:
        labels = batch.get("labels") if isinstance(batch, Mapping) else None
        if not isinstance(labels, Tensor):
            raise BatchError(f"{place(None)} has no labels, which the accuracy needs.")
        with torch.no_grad():
            guess, classes = self._guess(model, batch, place)
        if self._kind == "classes" and guess.dim() > 1 and _is_causal(model):
            guess, labels = guess[:, :-1], labels[:, 1:]
        if guess.shape != labels.shape:
            raise BatchError(
                f"{place(None)}: the labels are {list(labels.shape)} and the predictions "
                f"{list(guess.shape)}; give labels that fit, or take metric='divergence'."
            )
        labels = labels.to(guess.device)
        counted = labels != _IGNORED
        _check_labels(labels, counted, self._kind, classes, place)
        right = guess == (labels > 0.5 if self._kind == "labels" else labels)
        right, counted = right.view(len(right), -1), counted.view(len(right), -1)
        if not bool(counted.any(1).all()):
            row = int((~counted.any(1)).nonzero()[0])
            raise BatchError(f"{place(row)} has no label that counts; leave it out.")
        share: Array = ((right & counted).sum(1).double() / counted.sum(1)).cpu().numpy()
        return share

    def _guess(self, model: nn.Module, batch: Batch, place: Place) -> tuple[Tensor, int]:
        """Return the predicted classes, or for every label yes or no, and the number of classes."""
        lazy = logits_in_parts(model, batch)
        if lazy is not None:
            pieces = (lazy.part(*part) for part in parts(lazy.shape))
            guess = torch.cat([_finite(piece, place).argmax(-1) for piece in pieces], 1)
            return guess, lazy.shape[-1]
        logits = _finite(output_tensor(run(model, batch, labels=False)), place)
        return (logits > 0 if self._kind == "labels" else logits.argmax(-1)), logits.shape[-1]


class Divergence:
    """The model's own divergence from the dense outputs (`solpath.objective`), clipped.

    Of the dense outputs as much is kept as `Targets` remembers; the others are computed again.

    Args:
        dense: The dense model.
        first: The first batch. Of a regression its outputs set the scale.
        kind: What the outputs mean.
        clip: The largest divergence of a sample.
    """

    name = "divergence"

    def __init__(self, dense: nn.Module, first: Batch, kind: Kind, clip: float) -> None:
        self._objective = Objective(dense, lambda: first)
        self._targets: Targets[DenseTarget] = Targets()
        self.highest = clip
        unit = {
            "hidden": "the squared error over the squared dense output",
            "regression": "the squared error over the spread of the dense outputs of the first "
            "batch, which is not judged",
        }.get(kind, "the KL divergence from the dense output in nats, its mean over tokens")
        self._terms = (
            f"The loss of a sample is {unit}, and {clip:g} where it is more: the promise is about "
            "the mean of these clipped losses.",
        )
        self.skip = 1 if kind == "regression" else 0

    @property
    def terms(self) -> tuple[str, ...]:
        """See `Metric`."""
        return self._terms

    def see_dense(self, index: int, batch: Batch, place: Place) -> None:
        """See `Metric`."""
        self._target(index, batch)

    def check(self) -> None:
        """See `Metric`. Every output can be compared."""

    def losses(self, model: nn.Module, index: int, batch: Batch, place: Place) -> Array:
        """See `Metric`."""
        target = self._target(index, batch)
        with torch.no_grad():
            outputs = self._objective.run(model, batch)
            values = self._objective.divergence(target, outputs, batch).double()
        if bool(values.isnan().any()):
            raise NonFiniteLossError(f"the divergence of {place(row_not_finite(values))} is NaN.")
        clipped: Array = values.clamp(0, self.highest).cpu().numpy()
        return clipped

    def upper(self, losses: Array, delta: float) -> float:
        """See `Metric`."""
        return self.highest * _bet(losses / self.highest, delta)

    def _target(self, index: int, batch: Batch) -> DenseTarget:
        return self._targets.get(index, lambda: self._objective.target(batch))


def _bet(values: Array, delta: float) -> float:
    """Bound the mean in an order that has nothing to do with that of the batches."""
    return float(mean_upper(np.random.default_rng(0).permutation(values), delta))


def _check_labels(labels: Tensor, counted: Tensor, kind: Kind, classes: int, place: Place) -> None:
    """Raise `BatchError` if a label that counts is none that the model could predict."""
    if kind == "labels":
        possible, known = (labels >= 0) & (labels <= 1), "labels of this model are 0 or 1"
    else:
        possible = (labels >= 0) & (labels < classes) & (labels == labels.long())
        known = f"this model has {classes:,} classes, numbered from 0"
    wrong = (counted & ~possible).nonzero()
    if len(wrong):
        value = labels[tuple(wrong[0])].item()
        raise BatchError(
            f"{place(int(wrong[0, 0]))} has the label {value:g}, and {known}; a label of "
            f"{_IGNORED} does not count."
        )


def _finite(output: Tensor, place: Place) -> Tensor:
    if not torch.isfinite(output).all():
        raise NonFiniteLossError(f"an output of {place(row_not_finite(output))} is not finite.")
    return output


def _is_causal(model: nn.Module) -> bool:
    """Return whether a label is predicted at the token before it."""
    config, generates = getattr(model, "config", None), getattr(model, "can_generate", bool)
    return bool(generates()) and not getattr(config, "is_encoder_decoder", False)
