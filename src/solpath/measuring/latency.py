"""Latency as a budget: measure a table of latencies, and verify plans by a stopwatch."""

import math
import re
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain, product
from typing import Any

import torch
from torch import nn

from solpath.config import check_count
from solpath.data.preparation import preparing
from solpath.data.source import shapes_of, slice_samples
from solpath.errors import BudgetError, ConfigError
from solpath.measuring.timing import latencies
from solpath.model.counting import count_costs
from solpath.model.discovery import survey
from solpath.model.extraction import extract
from solpath.model.fingerprint import check_fingerprint
from solpath.pair import Fingerprint, Pair
from solpath.planning.latency_table import BlockLatency, LatencyTable, pair_shapes
from solpath.planning.making import check_timed
from solpath.planning.path import SolutionPath, check_path
from solpath.planning.plan import Plan
from solpath.running.claims import claimed
from solpath.running.forward import device_of, run
from solpath.running.modes import contained, inferring
from solpath.running.placement import check_whole
from solpath.running.provenance import provenance
from solpath.wrapping import unwrapped

ATTEMPTS = 6
"""How many plans `plan_for_latency` times before it gives up."""
_CHECKS = 40  # timed passes that verify a plan
_AT_ONCE = 4  # narrow models that are in memory beside the dense model
_ATTENTION_PARTS, _MLP_PARTS = 4, 8  # parts of a dense width; every multiple is measured
_SAME = ("device", "threads", "dtype", "attention", "batch")

Block = tuple[Pair, ...]
"""The pairs whose widths act together on time: those of one attention, or that of one MLP."""


@contained
def measure_latency(model: nn.Module, batch: Any, *, repeats: int = 7) -> LatencyTable:
    """Measure how long blocks of every shape take, for `SolutionPath.plan(latency_ms=...)`.

    Narrow models are timed in turns with the dense model. In each of them all blocks of one shape
    have the same width, and the time that it saves is divided equally among these blocks. Query-key
    and value-output widths are measured at 0, 1 and every quarter of the dense width, in all
    combinations; MLP widths at 0, 1 and every eighth. A model with one shape of attention and one
    shape of MLP thus takes up to 44 narrow models.

    Args:
        model: The dense model, on the device that counts. It is left as it was found.
        batch: One batch as the model will get it, on the model's device.
        repeats: Timed passes of every narrow model.

    Returns:
        The table, with the conditions under which it holds.

    Raises:
        ConfigError: `repeats` is below 1.
        BatchError: The batch has no samples, or is on another device than the model.
        UnsupportedModelError: The model cannot be cut; see `find_pairs`.
        ModelInUseError: The model is masked or searched, or another thread works on it.

    Example:
        >>> sample = {name: value[:1] for name, value in batch.items()}
        >>> table = solpath.measure_latency(model, sample, repeats=1)
        >>> [len(kind.blocks) for kind in table.blocks]  # two attentions and two MLPs of one shape
        [2, 2]
    """
    check_count("repeats", repeats, 1)
    model = unwrapped(model)
    batch = prepared(model, batch)
    with claimed(model, doing="timed", admits="anything"), inferring(model):
        pairs, sites = survey(model)
        attentions = [site.pairs for site in sites]
        own = {pair.name for pair in chain.from_iterable(attentions)}
        groups = _alike([*attentions, *((pair,) for pair in pairs if pair.name not in own)])
        costs = count_costs(model, pairs, slice_samples(batch, 0, 1))
        dense = Plan(
            pairs=pairs,
            kept={},
            asked={},
            achieved=costs.achieved(pairs, {pair.name: pair.width for pair in pairs}),
            fingerprint=Fingerprint(type(model).__name__, {}),
            gains={p.name: torch.ones(p.heads, p.left[0].repeat).double() for p in pairs},
        )
        grids = [_grid(group[0]) for group in groups]
        plans = [
            _uniform(dense, group, widths)
            for group, grid in zip(groups, grids, strict=True)
            for widths in list(product(*grid))[:-1]  # the last combination is the dense one
        ]
        dense_ms, ratios = _time(model, plans, batch, repeats)
    rest = iter(ratios)
    kinds = []
    for group, grid in zip(groups, grids, strict=True):
        saved = [(1 - next(rest)) * dense_ms / len(group) for _ in list(product(*grid))[:-1]]
        names = tuple(tuple(pair.name for pair in block) for block in group)
        kinds.append(BlockLatency(names, tuple(grid), (*saved, 0.0)))
    shapes, where = pair_shapes(pairs), _conditions(model, batch)
    return LatencyTable(type(model).__name__, shapes, dense_ms, tuple(kinds), where)


@contained
def plan_for_latency(
    model: nn.Module,
    path: SolutionPath,
    batch: Any,
    latency_ms: float,
    *,
    latency: LatencyTable | None = None,
    tolerance: float = 0.05,
    **constraints: Any,
) -> Plan:
    """Return a plan whose extracted model was measured to take `latency_ms`, up to `tolerance`.

    The plan that the table gives is extracted and timed in turns with the dense model. The dense
    model takes the time in the table by definition, so a machine that is busier now than it was
    then does not spoil the check. If the plan is too far off, the table is scaled by the measured
    over the predicted time, and another plan is made. Later corrections use the root of that
    factor, so that noise dies down.

    Args:
        model: The dense model, on the device that counts. It is left as it was found.
        path: A path of this model.
        batch: One batch as the model will get it, on the model's device.
        latency_ms: Milliseconds that one forward pass of the batch should take, on the machine as
            it was when the table was measured.
        latency: A table that was measured on this machine with this batch; None measures one.
        tolerance: Share of `latency_ms` by which the measured time may differ, in (0, 1).
        constraints: Those of `SolutionPath.plan`: `multiple_of`, `min_width`, `protect`, `uniform`,
            `tied_widths`, `shared_couples` and `for_`; not `whole_groups`.

    Returns:
        The plan. Its `latency_ms` holds the predicted and the measured time, in milliseconds.

    Raises:
        BudgetError: `latency_ms` is not reachable, or was not met in six attempts; the message says
            what was measured.
        ConfigError: `tolerance` is out of range, the model cannot respect the constraints, or the
            table was measured under other conditions.
        FingerprintError: The path or the table belongs to another model.
        BatchError: The batch has no samples, or is on another device than the model.
        UnsupportedModelError: The model cannot be cut; see `find_pairs`.
        ModelInUseError: The model is masked or searched, or another thread works on it.

    Example:
        Any machine, however busy, meets the time of the dense model with a large tolerance.

        >>> sample = {name: value[:1] for name, value in batch.items()}
        >>> table = solpath.measure_latency(model, sample, repeats=1)
        >>> options = {"latency": table, "tolerance": 0.9}
        >>> plan = solpath.plan_for_latency(model, path, sample, table.dense_ms, **options)
        >>> sorted(plan.latency_ms)
        ['measured', 'predicted']
    """
    if not 0 < tolerance < 1:
        raise ConfigError(f"tolerance must be in (0, 1), got {tolerance!r}.")
    model = unwrapped(model)
    batch = prepared(model, batch)
    if latency is not None:
        _check_conditions(latency, _conditions(model, batch))
    check_request(model, path, batch, latency_ms, **constraints)
    table = measure_latency(model, batch) if latency is None else latency
    dense_ms = table.dense_ms
    found: list[str] = []
    for _ in range(ATTEMPTS):
        # A budget that the first table reaches stays reachable, by the dense model if by no other.
        target = min(latency_ms, table.dense_ms) if found else latency_ms
        plan = path.plan(latency_ms=target, latency=table, **constraints)
        with claimed(model, doing="timed", admits="anything"), inferring(model):
            models = {"dense": model, "small": extract(model, plan, check=False)}
            _, [ratio] = _beside(models, batch, _CHECKS)
        measured = ratio * dense_ms
        predicted = plan.latency_ms["predicted"]
        plan = replace(
            plan,
            asked={**plan.asked, "latency_ms": latency_ms},
            latency_ms={"predicted": predicted, "measured": measured},
        )
        if abs(measured / latency_ms - 1) <= tolerance:
            return plan
        found.append(f"{measured:.2f}")
        error = measured / max(predicted, 0.01 * measured)  # a prediction may be almost 0
        table = table.scaled(error if len(found) == 1 else math.sqrt(error))
    raise BudgetError(
        f"latency_ms {latency_ms} was not met to {tolerance:.1%} in {ATTEMPTS} attempts, which "
        f"took {', '.join(found)} ms; measure on a quieter machine, or raise tolerance."
    )


def check_request(
    model: nn.Module,
    path: SolutionPath,
    batch: Any,
    latency_ms: float,
    **constraints: Any,
) -> None:
    """Raise the errors of `plan_for_latency` that can be known before anything is measured.

    Args:
        model: The dense model. It is only looked at.
        path: A path of this model.
        batch: The batch that will be timed.
        latency_ms: Milliseconds that one forward pass of the batch should take.
        constraints: See `plan_for_latency`.

    Raises:
        BudgetError: `latency_ms` is not a positive number.
        ConfigError: The model cannot respect the constraints.
        FingerprintError: The path belongs to another model.
        BatchError: The batch is on another device than the model.
        UnsupportedModelError: The model cannot be cut; see `find_pairs`.
    """
    check_path(path)
    if not isinstance(latency_ms, int | float) or not 0 < latency_ms < math.inf:
        raise BudgetError(f"latency_ms must be a positive number, got {latency_ms!r}.")
    check_timed(constraints.get("whole_groups", False))
    path.plan(sparsity=0, **constraints)
    check_fingerprint(path.fingerprint, path.pairs, model, survey(model)[0])
    prepared(model, batch)


def prepared(model: nn.Module, batch: Any) -> Any:
    """Return a batch checked and completed for a model; see `Preparation`."""
    check_whole(model, "timed")
    with preparing(model, device_of(model)) as prepare:
        return prepare(0, batch)


def _alike(blocks: Sequence[Block]) -> list[list[Block]]:
    """Group the blocks that have one shape and whose names differ in indices alone.

    Only the blocks of such a group have inputs of one shape.
    """
    groups: dict[Any, list[Block]] = defaultdict(list)
    for block in blocks:
        place = re.sub(r"\.\d+(?=\.)", "", block[0].name)
        groups[place, tuple(pair_shapes(block).values())].append(block)
    return list(groups.values())


def _grid(block: Block) -> list[tuple[int, ...]]:
    """Return the widths to measure, ascending, for every pair of a block."""
    parts = _MLP_PARTS if len(block) == 1 else _ATTENTION_PARTS
    return [
        tuple(sorted({0, 1, *(pair.width * i // parts for i in range(1, parts + 1))}))
        for pair in block
    ]


def _uniform(dense: Plan, group: Sequence[Block], widths: Sequence[int]) -> Plan:
    """Return a plan in which all blocks of `group` have these widths and all others stay whole."""
    cut = {p.name: width for block in group for p, width in zip(block, widths, strict=True)}
    kept = {p.name: torch.arange(cut.get(p.name, p.width)).repeat(p.heads, 1) for p in dense.pairs}
    return replace(dense, kept=kept)


def _time(
    model: nn.Module, plans: Sequence[Plan], batch: Any, repeats: int
) -> tuple[float, list[float]]:
    """Return the milliseconds of the dense model, and the time of each plan as a share of it."""
    dense: list[float] = []
    ratios = []
    for start in range(0, len(plans), _AT_ONCE):
        models = {"dense": model}
        for i, plan in enumerate(plans[start : start + _AT_ONCE]):
            models[f"narrow {i}"] = extract(model, plan, check=False)
        seconds, found = _beside(models, batch, repeats)
        dense += seconds
        ratios += found
    return 1e3 * statistics.median(dense), ratios


def _beside(
    models: Mapping[str, nn.Module], batch: Any, repeats: int
) -> tuple[list[float], list[float]]:
    """Time models in turns.

    Returns:
        The seconds of every pass of the first model, and for each other model the median ratio of
        its time to that of the first.
    """
    passes = {name: partial(run, model, batch, labels=False) for name, model in models.items()}
    first, *others = latencies(passes, repeats=repeats).values()
    ratios = [[a / b for a, b in zip(own, first, strict=True)] for own in others]
    return first, [statistics.median(own) for own in ratios]


def _conditions(model: nn.Module, batch: Any) -> dict[str, Any]:
    """Return what a latency depends on besides the model, and where the figures come from."""
    parameter = next(model.parameters())
    config = getattr(model, "config", None)
    return provenance(parameter.device) | {
        "dtype": str(parameter.dtype).removeprefix("torch."),
        "attention": getattr(config, "_attn_implementation", None),
        "batch": {name: list(shape) for name, shape in shapes_of(batch).items()},
    }


def _check_conditions(table: LatencyTable, here: Mapping[str, Any]) -> None:
    for name in _SAME:
        there = table.conditions.get(name)
        if there != here[name]:
            raise ConfigError(
                f"the latency table was measured with {name} {there!r}, here it is "
                f"{here[name]!r}; measure again with solpath.measure_latency."
            )
