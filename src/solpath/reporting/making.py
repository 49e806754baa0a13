"""Make a family: cut a path at some sizes, judge and measure every member, and write a report."""

import os
import time
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from torch import nn

from solpath.config import check_number
from solpath.data.source import check_ends
from solpath.errors import ConfigError
from solpath.files import new_folder
from solpath.measuring.evaluation import Result, evaluate
from solpath.measuring.measurement import Measurement, measure
from solpath.model.extraction import extract, in_dtype_of
from solpath.objective import Loss
from solpath.planning.path import SolutionPath, check_path
from solpath.planning.plan import Plan
from solpath.refining.compensation import compensate
from solpath.reporting.family import (
    DenseModel,
    Family,
    Judged,
    Member,
    MethodRun,
    Point,
    SearchRun,
    Timing,
)
from solpath.reporting.report import check_installed, write_report
from solpath.reporting.scores import DISTANCES, Scores, Task, both, metrics_of, scores_at
from solpath.running.modes import keeping_random_state
from solpath.running.progress import progress_bar
from solpath.running.provenance import provenance
from solpath.storing.reading import load
from solpath.storing.writing import save


def make_family(
    model: nn.Module,
    path: SolutionPath,
    heldout: Iterable[Any],
    out: str | os.PathLike[str],
    *,
    sizes: Sequence[float] = (0.2, 0.4, 0.6),
    compensate_on: Iterable[Any] | None = None,
    task: Task | None = None,
    loss: Loss | None = None,
    for_: str | None = None,
    tokenizer: Any = None,
    name: str | None = None,
    repeats: int = 20,
    progress: bool = True,
) -> Family:
    """Cut a path at some sizes, judge and measure every member, and write all of it with a report.

    The folder gets the path, the members, ``family.json`` and ``report.html``, the page to choose a
    size by. It appears whole or not at all. All members are in memory while they are judged and
    timed beside the dense model.

    Args:
        model: The dense model, which is left as it was found.
        path: Its path.
        heldout: Batches that neither the search nor the compensation has seen, on the device of the
            model. Latency is that of the first one.
        out: A folder that is new or empty.
        sizes: The sparsity of every member, ascending.
        compensate_on: Batches that every member is refitted on; None leaves the weights as cut.
        task: A function that scores a model at its task, as for `solpath.evaluate`. It is called
            with every model, and its metrics come first in the report, the main one ahead. It may
            return one number, a mapping from name to number, or a `solpath.reporting.scores.Scores`
            with intervals, which also says of which metrics lower values are better.
        loss: See `solpath.evaluate`.
        for_: A target that all members are cut for, see `SolutionPath.plan`.
        tokenizer: Tokenizer or processor to save with every member.
        name: The name that the report shows; None takes that of the folder of the dense model.
        repeats: Timed passes of each model.
        progress: Whether to show a progress bar.

    Returns:
        What is written to ``family.json`` and shown in the report.

    Raises:
        ConfigError: `path` is no path; or `sizes` are not numbers that ascend between 0 and 1;
            or jinja2 or matplotlib is not installed; or the task gives some models other metrics,
            one that is not finite, or one that the distance has.
        SolpathError: See `extract`, `compensate`, `save`, `evaluate` and `measure`.

    Example:
        >>> family = solpath.make_family(
        ...     model, path, batches, "family", sizes=[0.5], repeats=1, progress=False
        ... )
        >>> [member.name for member in family.members], family.metrics[0].key
        (['dense', 's50'], 'kl')
        >>> low, high = family.members[1].intervals["kl"]
        >>> kept = lambda model: {"biases": sum(p.dim() == 1 for p in model.parameters())}
        >>> family = solpath.make_family(
        ...     model, path, batches, "kept", sizes=[0.5], task=kept, repeats=1, progress=False
        ... )
        >>> [metric.key for metric in family.metrics][:2]
        ['biases', 'kl']
    """
    check_path(path)
    named = _named(sizes)
    check_installed()
    check_ends(heldout, "heldout")
    if compensate_on is not None:
        check_ends(compensate_on, "compensate_on")
    with keeping_random_state():
        heldout = list(heldout)
    plans = {member: path.plan(sparsity=size, for_=for_) for member, size in named.items()}
    with new_folder(out) as folder:
        fitted = _cut(model, plans, folder, compensate_on, tokenizer, progress)
        path.save(folder / "path")
        models = {"dense": model, **{one: load(folder / "models" / one) for one in named}}
        found = evaluate(models, model, heldout, loss=loss)
        scores = {name: _scores(result) for name, result in found.items()}
        metrics = tuple(one for one in DISTANCES if one.key in scores["dense"].metrics)
        if task is not None:
            at_task = scores_at(task, models)
            scores = {name: both(at_task[name], scores[name]) for name in models}
            metrics = metrics_of(at_task["dense"]) + metrics
        measured = measure(models, heldout[0], repeats=repeats)
        points = [Point(named.get(name, 0.0), one.metrics) for name, one in scores.items()]
        batch = heldout[0]
        tokens = batch.get("input_ids") if isinstance(batch, Mapping) else None
        family = Family(
            model=DenseModel(
                name=name or _name(model),
                architecture=type(model).__name__,
                sha256=None,
                units=sum(pair.units for pair in path.pairs),
                prunable=path.costs.prunable(path.pairs),
            ),
            search=SearchRun(
                path.method, None, path.config.get("steps"), path.config.get("seed"), fitted, ""
            ),
            metrics=metrics,
            judged=Judged("held-out samples", found["dense"].samples),
            methods=(MethodRun(path.method, None, tuple(points)),),
            members=members(model, path, named, scores, measured, for_=for_),
            measured=Timing(
                samples=measured["dense"].samples,
                tokens=None if tokens is None else int(tokens.shape[-1]),
                repeats=repeats,
            ),
            provenance=provenance(),
            target=for_,
        )
        publish(family, folder)
    return family


def _cut(
    model: nn.Module,
    plans: Mapping[str, Plan],
    folder: Path,
    compensate_on: Iterable[Any] | None,
    tokenizer: Any,
    progress: bool,
) -> float | None:
    """Save all members; return the seconds of compensation, None if there is none."""
    seconds = 0.0
    with progress_bar("family", "{task.fields[name]}", len(plans), 0, show=progress, name="") as at:
        for member, plan in plans.items():
            cut = extract(model, plan)
            if compensate_on is not None:
                start = time.perf_counter()
                cut = compensate(cut, model, compensate_on, progress=False)
                seconds += time.perf_counter() - start
            save(cut, folder / "models" / member, tokenizer=tokenizer)
            at(name=member)
    return None if compensate_on is None else seconds


def _named(sizes: Any) -> dict[str, float]:
    """Return name to sparsity of every member.

    Raises:
        ConfigError: The sizes are no list of numbers that ascend between 0 and 1, or two of them
            have one name.
    """
    if isinstance(sizes, str) or not isinstance(sizes, Iterable):
        raise ConfigError(f"sizes must be a list of sparsities, got {sizes!r}.")
    given = list(sizes)
    for size in given:
        check_number("a size", size, 0, 1)
    if not given or any(a >= b for a, b in pairwise([0.0, *given, 1.0])):
        raise ConfigError(f"sizes must ascend between 0 and 1, got {given}.")
    named = {f"s{100 * size:g}": size for size in given}
    if len(named) < len(given):
        raise ConfigError(f"sizes must differ by more than 1e-6 of themselves, got {given}.")
    return named


def members(
    model: nn.Module,
    path: SolutionPath,
    sizes: Mapping[str, float],
    scores: Mapping[str, Scores],
    measured: Mapping[str, Measurement],
    *,
    for_: str | None = None,
) -> tuple[Member, ...]:
    """Return the dense model and every size with its cost, latency and quality.

    Args:
        model: The dense model, whose dtype the sizes are in.
        path: The path that the family was cut from.
        sizes: Name of a member to its sparsity, without the dense model.
        scores: Name of a member to how good it is, the dense model as ``"dense"``.
        measured: Name of a member to its measured cost, the dense model as ``"dense"``.
        for_: The target that the members were cut for.
    """
    dense = measured["dense"]
    rows = []
    for name, cost in measured.items():
        plan = (
            path.plan(sparsity=sizes[name], for_=for_) if name in sizes else path.plan(sparsity=0)
        )
        plan = in_dtype_of(model, plan)
        rows.append(
            Member(
                name=name,
                folder=f"models/{name}" if name in sizes else None,
                sparsity=plan.achieved.sparsity,
                params=cost.params,
                params_share=cost.params / dense.params,
                macs=cost.macs,
                macs_share=cost.macs / dense.macs,
                bytes=cost.bytes_on_disk,
                cache=plan.achieved.cache,
                latency_ms=cost.latency_ms,
                latency_iqr_ms=cost.latency_iqr_ms,
                metrics=scores[name].metrics,
                intervals=scores[name].intervals,
                widths=plan.widths,
            )
        )
    return tuple(rows)


def publish(family: Family, folder: Path) -> None:
    """Write ``family.json`` and the report of it."""
    family.write(folder)
    write_report(folder)


def _scores(result: Result) -> Scores:
    known = {one.key for one in DISTANCES}
    return Scores(
        {name: value for name, value in result.metrics.items() if name in known},
        {name: list(ends) for name, ends in result.intervals.items() if name in known},
    )


def _name(model: Any) -> str:
    found = getattr(getattr(model, "config", None), "_name_or_path", "")
    return Path(found).name if found else type(model).__name__
