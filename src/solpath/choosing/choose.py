"""Choose the smallest member of a path whose loss is small enough, with confidence.

Sizes are tested in an order that is fixed beforehand, the largest member first, each at the full
level, up to the first that fails. The last that passed is returned. A choice is wrong only if the
first of these sizes whose true loss is too large passed, which one bound allows with the
probability delta (fixed-sequence testing: Maurer et al. 1995; as part of Learn then Test:
Angelopoulos, Bates, Candès, Jordan & Lei 2021, arXiv 2110.01052, section 4).
"""

import difflib
import inspect
import math
from collections.abc import Hashable, Iterable, Sequence
from functools import partial
from typing import Any

import numpy as np
from torch import nn

from solpath.choosing.choice import Choice, SizeTest
from solpath.choosing.losses import Metric, metric_for
from solpath.choosing.samples import Samples
from solpath.config import check_number
from solpath.data.preparation import preparing
from solpath.data.source import check_ends
from solpath.errors import BatchError, ConfigError
from solpath.model.discovery import survey
from solpath.model.extraction import extract
from solpath.model.fingerprint import check_fingerprint
from solpath.planning.path import SolutionPath, check_path
from solpath.planning.plan import Plan
from solpath.refining.compensation import compensate as refit
from solpath.refining.fitting import check_enough
from solpath.running.claims import claimed
from solpath.running.forward import device_of
from solpath.running.modes import contained, inferring, keeping_random_state
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
    groups: Sequence[Hashable] | None = None,
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
            have been searched, compensated, tuned or chosen on them before; what the search ran on
            is refused, if the path knows it (`SolutionPath.seen`). They must have a length, and are
            read once for every size that is tested. A sample that repeats an earlier one is left
            out.
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
        groups: What each row of `batches` is from, in their order, if rows are not independent: a
            document, a video, a patient. Then groups are the independent draws, and the loss of one
            is the mean over its rows. None takes every row as a draw of its own.
        progress: Whether to show a progress bar.
        constraints: Constraints of `SolutionPath.plan`, such as ``multiple_of=8`` or
            ``for_="onnx"``.

    Returns:
        The choice, with every size that was tested. If the first one failed, it is the dense model.

    Raises:
        TypeError: A keyword is no constraint.
        ConfigError: A setting is out of range, `path` is no path, or a budget is among the
            constraints.
        BudgetError: A size is not reachable.
        BatchError: `batches` are too few to show so small a loss, share a sample with the search or
            with `compensate`, give other samples when they are read again, have no labels, are not
            what the model takes, or `groups` has another length.
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
    check_path(path)
    check_ends(batches)
    if compensate is not None:
        check_ends(compensate, "compensate")
    model = unwrapped(model, hooks=True)
    _check(max_loss, confidence, clip, constraints)
    plans = _plans(path, sizes, constraints)
    delta = 1 - confidence
    with (
        keeping_random_state(),
        claimed(model, doing="chosen from", admits="anything"),
        preparing(model, device_of(model)) as prepare,
        progress_bar("choose", "", len(plans) + 1, 0, show=progress) as report,
    ):
        check_fingerprint(path.fingerprint, path.pairs, model, survey(model)[0])
        known = batches if isinstance(batches, Sequence) else list(batches)
        fitted = None if compensate is None else list(compensate)
        samples = Samples(known, prepare, groups, set(path.seen.tolist()))
        if fitted is not None:
            check_enough(fitted)
            samples.check_apart(fitted, model)
        with inferring(model):
            judge = metric_for(metric, model, samples.first(), clip, grouped=groups is not None)
            if not max_loss < judge.highest:
                raise ConfigError(f"max_loss must be below {judge.highest:g}, got {max_loss!r}.")
            samples.judge_from(judge.skip)
            for i, batch in samples:
                judge.see_dense(i, batch, partial(samples.place, i))
        _check_count(judge, samples, max_loss, delta)
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
            losses = samples.drawn(np.concatenate(found))
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
        groups=None if groups is None else samples.draws,
        tests=tuple(tests),
        assumptions=_assumptions(
            judge, samples, compensated=fitted is not None, checked=len(path.seen) > 0
        ),
        provenance=provenance(device_of(model)),
        compensated=fitted is not None,
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
    known = [*inspect.signature(SolutionPath.plan).parameters][1:]
    for name in constraints:
        if name not in known:
            close = difflib.get_close_matches(name, {*known} - budgets) or ["multiple_of", "for_"]
            raise TypeError(
                f"choose() got an unexpected keyword argument {name!r}; constraints are those of "
                f"SolutionPath.plan, such as {', '.join(close)}."
            )


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


def _check_count(judge: Metric, samples: Samples, max_loss: float, delta: float) -> None:
    """Raise `BatchError` unless a member that loses nothing would pass."""
    if not samples.count:
        raise BatchError(
            "the first batch sets the scale of a regression and is not judged, and no sample is "
            "left to judge by; give more batches."
        )
    count = samples.draws
    least = judge.upper(np.zeros(count), delta)
    if least <= max_loss:
        return
    raise BatchError(
        f"{count:,} {samples.unit}s cannot show a loss of at most {max_loss:g}: without any loss "
        f"the bound would be {least:.3g}; give {int(count * least / max_loss) + 1:,} or more, and "
        "some times as many for members that lose something."
    )


def _assumptions(
    judge: Metric, samples: Samples, *, compensated: bool, checked: bool
) -> tuple[str, ...]:
    if samples.grouped:
        draws = (
            "The groups are independent draws of the data that the promise is about. The loss of a "
            "group is the mean over its samples, so large and small groups count alike."
        )
    else:
        draws = (
            "The samples are independent draws of the data that the promise is about. Rows of one "
            "document, video or patient are not: say with groups= which belong together."
        )
    if checked:
        fresh = (
            "Nothing was trained, searched, tuned or chosen on these samples. None of them is an "
            "input that the search ran on, which was checked; the same text cut or packed "
            "otherwise is another input."
        )
    else:
        fresh = (
            "Nothing was trained, searched, tuned or chosen on these samples. What the search ran "
            "on is not recorded in this path, so this was not checked."
        )
    found = [
        draws,
        fresh,
        "Sizes, metric and max_loss were fixed before these samples were looked at, and choose was "
        "not run on them again with others.",
        *judge.terms,
    ]
    if compensated:
        found.append("The member that was tested is compensated; the plan alone is not.")
    if compensated and samples.grouped:
        found.append("No sample that members were fitted on is from one of these groups.")
    if samples.repeated:
        found.append(
            f"{samples.repeated:,} samples that repeat others were left out: the promise is about "
            "distinct samples."
        )
    return tuple(found)
