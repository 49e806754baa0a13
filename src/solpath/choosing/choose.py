"""Choose the smallest member of a path whose loss is small enough, with confidence.

Sizes are tested in an order that is fixed beforehand, the largest member first, each at the full
level, up to the first that fails. The last that passed is returned. A choice is wrong only if the
first of these sizes whose true loss is too large passed, which one bound allows with the
probability delta (fixed-sequence testing: Maurer et al. 1995; as part of Learn then Test:
Angelopoulos, Bates, Candès, Jordan & Lei 2021, arXiv 2110.01052, section 4).
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
from torch import nn

from solpath.choosing.choice import Choice, SizeTest
from solpath.choosing.losses import Metric, metric_for
from solpath.choosing.samples import rows_of, sample_digests
from solpath.config import check_number
from solpath.data.preparation import Preparation, preparing
from solpath.data.source import check_ends
from solpath.errors import BatchError, ConfigError
from solpath.model.discovery import survey
from solpath.model.extraction import extract
from solpath.model.fingerprint import check_fingerprint
from solpath.planning.path import SolutionPath
from solpath.planning.plan import Plan
from solpath.refining.compensation import compensate as refit
from solpath.running.claims import claimed
from solpath.running.forward import device_of
from solpath.running.modes import contained, inferring
from solpath.running.progress import progress_bar
from solpath.running.provenance import provenance
from solpath.wrapping import unwrapped

SIZES = tuple(i / 20 for i in range(1, 15))
"""The sparsities that are tested by default, 0.05 to 0.7."""


@contained
def choose(
    model: nn.Module,
    path: SolutionPath,
    batches: Iterable[Any],
    max_loss: float,
    *,
    metric: str | None = None,
    confidence: float = 0.95,
    clip: float = 1.0,
    sizes: Sequence[float] = SIZES,
    compensate: Iterable[Any] | None = None,
    progress: bool = True,
    **constraints: Any,
) -> Choice:
    """Return the smallest member of a path that loses little against the dense model, provably.

    With the probability `confidence`, at least, the expected loss of the returned member is at most
    `max_loss`, on data of which the samples are independent draws. The bounds hold at every number
    of samples. Sizes are tested from the largest member down, up to the first that fails.

    Args:
        model: The dense model, which is left as it was found.
        path: Its path.
        batches: Held-out batches, with labels for the accuracy. Each row is a sample. Nothing may
            have been searched, compensated, tuned or chosen on them before. They must have a
            length, and are read once for every size that is tested. A sample that repeats an
            earlier one is left out.
        max_loss: The largest expected loss: of accuracy 0.01 is one point, of divergence it is in
            the unit of the search (`solpath.objective`).
        metric: ``"accuracy"``: that of the dense model less that of the member, on the ``labels``.
            ``"divergence"``: the distance from the dense outputs. None takes the accuracy where
            the first batch has labels of classes.
        confidence: Probability with which the promise holds, in (0, 1).
        clip: For the divergence, the largest loss of a sample: what is more counts as this.
        sizes: The sparsities to test, in any order. Choose them without looking at `batches`.
        compensate: Batches to refit every member on; see `solpath.compensate`. None of their
            samples may be in `batches`.
        progress: Whether to show a progress bar.
        constraints: Constraints of `SolutionPath.plan`, such as ``multiple_of=8`` or
            ``for_="onnx"``.

    Returns:
        The choice, with every size that was tested. If the first one failed, it is the dense model.

    Raises:
        ConfigError: A setting is out of range, or a budget is among the constraints.
        BudgetError: A size is not reachable.
        BatchError: `batches` are too few to show so small a loss, share a sample with `compensate`,
            give other samples when they are read again, have no labels, or are not what the model
            takes.
        FingerprintError: The path belongs to another model.
        UnsupportedModelError: The model was extracted already, or is quantised.
        NonFiniteLossError: An output is not finite.
        ModelInUseError: The model is masked or searched, or another thread works on it.

    Example:
        >>> heldout = [{"input_ids": torch.randint(1, 100, (50, 16))} for _ in range(4)]
        >>> choice = solpath.choose(model, path, heldout, 0.05, progress=False)
        >>> choice.samples, choice.tests[-1].passed or choice.sparsity < choice.tests[-1].sparsity
        (200, True)
    """
    check_ends(batches)
    model = unwrapped(model, hooks=True)
    _check(max_loss, confidence, clip, constraints)
    plans = _plans(path, sizes, constraints)
    known = batches if isinstance(batches, Sequence) else list(batches)
    fitted = None if compensate is None else _listed(compensate)
    delta = 1 - confidence
    with (
        claimed(model, doing="chosen from", admits="anything"),
        preparing(model, device_of(model)) as prepare,
        progress_bar("choose", "", len(plans) + 1, 0, show=progress) as report,
    ):
        check_fingerprint(path.fingerprint, path.pairs, model, survey(model)[0])
        samples = _Samples(known, prepare)
        if fitted is not None:
            samples.check_apart(fitted, model)
        with inferring(model):
            judge = metric_for(metric, model, samples.first(), clip)
            if not max_loss < judge.highest:
                raise ConfigError(f"max_loss must be below {judge.highest:g}, got {max_loss!r}.")
            samples.start = judge.skip
            for i, batch in samples:
                judge.see_dense(i, batch, partial(samples.place, i))
        _check_count(judge, samples.count, max_loss, delta)
        judge.check()
        report()
        best: tuple[Plan | None, nn.Module] = (None, model)
        tests: list[SizeTest] = []
        for sparsity, plan in plans:
            small = extract(model, plan, check=not tests)
            if fitted is not None:
                small = refit(small, model, fitted, progress=False)
            with inferring(model, small):
                found = [judge.losses(small, i, b, partial(samples.place, i)) for i, b in samples]
            losses = np.concatenate(found)
            bound = judge.upper(losses, delta)
            passed = bound <= max_loss
            params = plan.achieved.params
            tests.append(SizeTest(sparsity, params, float(losses.mean()), bound, passed))
            report()
            if not passed:
                break
            best = (plan, small)
    return Choice(
        *best,
        max_loss=max_loss,
        confidence=confidence,
        metric=judge.name,
        samples=samples.count,
        tests=tuple(tests),
        assumptions=_assumptions(judge, samples.repeated, compensated=fitted is not None),
        provenance=provenance(device_of(model)),
        compensated=fitted is not None,
    )


class _Samples:
    """The distinct samples of batches, which can be read again and must be the same then.

    Attributes:
        start: Number of the first batch that is judged.
        count: Number of distinct samples of the judged batches.
        repeated: Number of samples that were left out because they repeat others.
    """

    def __init__(self, batches: Sequence[Any], prepare: Preparation) -> None:
        self._batches, self._prepare = batches, prepare
        self._kept: dict[int, list[int]] = {}
        self._digests: dict[int, list[bytes]] = {}
        self._known: dict[bytes, tuple[int, int]] = {}
        self.start = self.repeated = 0
        for i in range(len(batches)):
            self._digests[i] = sample_digests(prepare(i, batches[i]))
            self._kept[i] = [
                row
                for row, digest in enumerate(self._digests[i])
                if self._known.setdefault(digest, (i, row)) == (i, row)
            ]
            self.repeated += len(self._digests[i]) - len(self._kept[i])
        if not self._known:
            raise BatchError("batches is empty; give at least one held-out batch.")

    @property
    def count(self) -> int:
        return sum(len(rows) for i, rows in self._kept.items() if i >= self.start)

    def place(self, index: int, row: int | None = None) -> str:
        """Return the words for a row of a batch that was yielded, see `Preparation.place`."""
        return self._prepare.place(index, None if row is None else self._kept[index][row])

    def first(self) -> Any:
        """The first batch, whole."""
        return self._prepare(0, self._batches[0])

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        """Yield number and samples of every judged batch that has any."""
        for i, kept in self._kept.items():
            if i < self.start or not kept:
                continue
            batch = self._prepare(i, self._batches[i])
            if sample_digests(batch) != self._digests[i]:
                raise BatchError(
                    f"batch {i} has other samples than when it was read first, so members cannot "
                    "be compared; give list(batches)."
                )
            yield i, rows_of(batch, kept)

    def check_apart(self, batches: Sequence[Any], model: nn.Module) -> None:
        """Raise `BatchError` if one of the samples is in other batches, too."""
        prepare = Preparation(model, name="compensation batch")
        for i, batch in enumerate(batches):
            for row, digest in enumerate(sample_digests(prepare(i, batch))):
                if digest in self._known:
                    index, own = self._known[digest]
                    raise BatchError(
                        f"{prepare.place(i, row)} is also {self._prepare.place(index, own)}; what "
                        "members were fitted on cannot judge them, so give batches apart."
                    )


def _check(max_loss: float, confidence: float, clip: float, constraints: dict[str, Any]) -> None:
    highest = {"max_loss": math.inf, "confidence": 1, "clip": math.inf}
    for name, value in {"max_loss": max_loss, "confidence": confidence, "clip": clip}.items():
        check_number(name, value, 0, highest[name])
        if value in (0, highest[name]):
            raise ConfigError(f"{name} must lie between 0 and {highest[name]:g}, got {value!r}.")
    budgets = {"budget", "sparsity", "params", "bytes", "macs", "cache", "latency_ms", "latency"}
    if named := budgets & set(constraints):
        raise ConfigError(f"choose finds the size itself: give sizes=, not {min(named)}=.")


def _plans(
    path: SolutionPath, sizes: Sequence[float], constraints: dict[str, Any]
) -> list[tuple[float, Plan]]:
    """Return every sparsity with its plan, the largest first; of equal plans, the first alone."""
    given: Any = sizes
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise ConfigError(f"sizes must be a list of sparsities, got {given!r}.")
    found = list(given)
    if not found:
        raise ConfigError("sizes is empty; give sparsities such as [0.1, 0.2, 0.3].")
    for size in found:
        check_number("a size", size, 0, 1)
    plans: list[tuple[float, Plan]] = []
    for sparsity in sorted(set(found)):
        plan = path.plan(sparsity=sparsity, **constraints)
        if not plans or plan.achieved.params != plans[-1][1].achieved.params:
            plans.append((sparsity, plan))
    return plans


def _listed(batches: Iterable[Any]) -> list[Any]:
    check_ends(batches, "compensate")
    return list(batches)


def _check_count(judge: Metric, count: int, max_loss: float, delta: float) -> None:
    """Raise `BatchError` unless a member that loses nothing would pass."""
    if not count:
        raise BatchError(
            "the first batch sets the scale of a regression and is not judged, and no sample is "
            "left to judge by; give more batches."
        )
    least = judge.upper(np.zeros(count), delta)
    if least <= max_loss:
        return
    raise BatchError(
        f"{count:,} samples cannot show a loss of at most {max_loss:g}: without any loss the bound "
        f"would be {least:.3g}; give {int(count * least / max_loss) + 1:,} or more, and some times "
        "as many for members that lose something."
    )


def _assumptions(judge: Metric, repeated: int, *, compensated: bool) -> tuple[str, ...]:
    found = [
        "The samples are independent draws of the data that the promise is about. Rows of one "
        "document, video or patient are not: give one row of each.",
        "Nothing was trained, searched, tuned or chosen on these samples. Whether the search saw "
        "them is not recorded in a path, so this was not checked.",
        "Sizes, metric and max_loss were fixed before these samples were looked at, and choose was "
        "not run on them again with others.",
        *judge.terms,
    ]
    if compensated:
        found.append("The member that was tested is compensated; the plan alone is not.")
    if repeated:
        found.append(
            f"{repeated:,} samples that repeat others were left out: the promise is about distinct "
            "samples."
        )
    return tuple(found)
