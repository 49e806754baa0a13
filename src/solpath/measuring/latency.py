"""Latency as a budget: measure a table of shapes, and verify plans by a stopwatch."""

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
from solpath.data.source import batch_size, check_device, shapes_of, slice_samples
from solpath.errors import BudgetError, ConfigError
from solpath.measuring.measurement import latencies
from solpath.model.counting import count_costs
from solpath.model.discovery import survey
from solpath.model.extraction import extract
from solpath.model.fingerprint import check_fingerprint
from solpath.pair import Fingerprint, Pair
from solpath.planning.latency_table import BlockLatency, LatencyTable, pair_shapes
from solpath.planning.path import SolutionPath
from solpath.planning.plan import Plan
from solpath.running.forward import device_of, forward
from solpath.running.modes import inferring
from solpath.running.provenance import provenance

ATTEMPTS = 6
_CHECKS = 40  # timed passes that verify a plan
_AT_ONCE = 4  # narrow models in memory beside the dense one
_ATTENTION_PARTS, _MLP_PARTS = 4, 8
_SAME = ("device", "threads", "dtype", "attention", "batch")

Block = tuple[Pair, ...]


def measure_latency(model: nn.Module, batch: Any, *, repeats: int = 7) -> LatencyTable:
    """Measure what blocks of every shape take, for `SolutionPath.plan(latency_ms=...)`.

    Whole models are timed in which all blocks of one shape have one width, beside the dense model
    and in turns with it; what they save is shared out among these blocks. Query-key and
    value-output widths are measured at 0, 1 and every quarter, in all combinations; MLPs at 0, 1
    and every eighth.

    Args:
        model: the dense model, on the device that counts. It is left as found.
        batch: one batch as the model will get them, on the model's device.
        repeats: timed passes of each of the (about 45) models.

    Raises:
        ConfigError: `repeats` below 1.
        BatchError: the batch has no samples, or lies on another device than the model.
        UnsupportedModelError: the model cannot be cut.

    Example:
        >>> table = solpath.measure_latency(model, batch)  # doctest: +SKIP
        >>> path.plan(latency_ms=0.6 * table.dense_ms, latency=table)  # doctest: +SKIP
    """
    check_count("repeats", repeats, 1)
    batch_size(batch)
    check_device(batch, device_of(model))
    pairs, sites = survey(model)
    attentions = [(site.qk, site.vo) for site in sites]
    own = {pair.name for pair in chain.from_iterable(attentions)}
    groups = _alike([*attentions, *((pair,) for pair in pairs if pair.name not in own)])
    with inferring(model):
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
            for widths in list(product(*grid))[:-1]  # the last is dense
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


def plan_for_latency(
    model: nn.Module,
    path: SolutionPath,
    batch: Any,
    latency_ms: float,
    *,
    latency: LatencyTable | None = None,
    tolerance: float = 0.05,
    multiple_of: int = 1,
    min_width: int = 0,
    protect: Sequence[str] = (),
) -> Plan:
    """A plan whose extracted model was measured to take `latency_ms`, up to `tolerance`.

    The plan that the table gives is extracted and timed beside the dense model, which takes
    `dense_ms` of the table by definition: so a machine that is busier now than it was then does
    not spoil the check. If the plan is too far off, the table is scaled by measured over predicted
    (later by the root of it, so that noise dies down), and another plan is made.

    Args:
        model: the dense model, on the device that counts. It is left as found.
        path: of this model.
        batch: one batch as the model will get them, on the model's device.
        latency_ms: milliseconds of one forward pass of the batch, on the machine as it was when
            the table was measured.
        latency: a table measured before with this machine and batch; None measures one.
        tolerance: share of `latency_ms` by which the measured time may differ.
        multiple_of, min_width, protect: see `SolutionPath.plan`.

    Returns:
        The plan; its `latency_ms` has what was predicted and what was measured.

    Raises:
        BudgetError: not reachable, or not met in some attempts, with what was measured.
        ConfigError: a bad `tolerance` or option, or a table that was measured under other
            conditions.
        FingerprintError: path or table belong to another model.
        BatchError: a batch on another device.
        UnsupportedModelError: see `find_pairs`.

    Example:
        >>> plan = solpath.plan_for_latency(model, path, batch, 3.5)  # doctest: +SKIP
    """
    if not 0 < tolerance < 1:
        raise ConfigError(f"tolerance must be in (0, 1), got {tolerance!r}.")
    if latency is not None:
        _check_conditions(latency, _conditions(model, batch))
    options: dict[str, Any] = {"multiple_of": multiple_of, "min_width": min_width}
    options["protect"] = protect
    check_request(model, path, batch, latency_ms, **options)
    table = measure_latency(model, batch) if latency is None else latency
    dense_ms = table.dense_ms
    found: list[str] = []
    for _ in range(ATTEMPTS):
        # What the first table can reach, a corrected one can: the dense model at most.
        target = min(latency_ms, table.dense_ms) if found else latency_ms
        plan = path.plan(latency_ms=target, latency=table, **options)
        with inferring(model):
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
        error = measured / max(predicted, 0.01 * measured)  # a table may predict almost nothing
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
    *,
    multiple_of: int,
    min_width: int,
    protect: Sequence[str],
) -> None:
    """Raise what `plan_for_latency` would, as far as it is known before anything is measured."""
    if not isinstance(latency_ms, int | float) or not 0 < latency_ms < math.inf:
        raise BudgetError(f"latency_ms must be a positive number, got {latency_ms!r}.")
    path.plan(sparsity=0, multiple_of=multiple_of, min_width=min_width, protect=protect)
    check_fingerprint(path.fingerprint, model, survey(model)[0])
    check_device(batch, device_of(model))


def _alike(blocks: Sequence[Block]) -> list[list[Block]]:
    """Blocks of one shape and, up to indices, one place: only these have inputs of one shape."""
    groups: dict[Any, list[Block]] = defaultdict(list)
    for block in blocks:
        place = re.sub(r"\.\d+(?=\.)", "", block[0].name)
        groups[place, tuple(pair_shapes(block).values())].append(block)
    return list(groups.values())


def _grid(block: Block) -> list[tuple[int, ...]]:
    """The widths to measure, for every pair of a block."""
    parts = _MLP_PARTS if len(block) == 1 else _ATTENTION_PARTS
    return [
        tuple(sorted({0, 1, *(pair.width * i // parts for i in range(1, parts + 1))}))
        for pair in block
    ]


def _uniform(dense: Plan, group: Sequence[Block], widths: Sequence[int]) -> Plan:
    """Every block of `group` with the same widths, everything else whole."""
    cut = {p.name: width for block in group for p, width in zip(block, widths, strict=True)}
    kept = {p.name: torch.arange(cut.get(p.name, p.width)).repeat(p.heads, 1) for p in dense.pairs}
    return replace(dense, kept=kept)


def _time(
    model: nn.Module, plans: Sequence[Plan], batch: Any, repeats: int
) -> tuple[float, list[float]]:
    """Milliseconds of the dense model, and the time of each plan as a share of it."""
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
    """Seconds of the first model's passes, and for every other the median ratio to it, in turns."""
    passes = {name: partial(forward, model, batch) for name, model in models.items()}
    first, *others = latencies(passes, repeats=repeats).values()
    ratios = [[a / b for a, b in zip(own, first, strict=True)] for own in others]
    return first, [statistics.median(own) for own in ratios]


def _conditions(model: nn.Module, batch: Any) -> dict[str, Any]:
    """What a latency depends on beside the model, and where the figures are from."""
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
