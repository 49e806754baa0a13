"""Latency as a budget: tables are read right, plans are the largest that fit, and verified."""

import json
from collections import defaultdict
from dataclasses import replace
from itertools import product

import pytest
import torch

import solpath
from conftest import build, inputs
from solpath.errors import BudgetError, ConfigError, FileError, FingerprintError
from solpath.measuring import latency as timing
from solpath.model.discovery import find_pairs
from solpath.pair import Fingerprint
from solpath.planning.cost import CostTable
from solpath.planning.latency_table import BlockLatency, LatencyTable, pair_shapes
from solpath.planning.path import SolutionPath
from solpath.reading import sealed
from test_plan import COSTS, PAIRS, made_path, subset

QK, VO, MLP = (0, 1, 8, 16, 32), (0, 8, 32), (0, 1, 500, 1536)


def attention_ms(qk: int, vo: int) -> float:
    """Made up: not additive, and slow at some widths, so that narrower may take longer."""
    return 0.02 * (qk + vo) + 0.001 * qk * vo + 0.4 * (qk % 16 == 8) + 1.0


def mlp_ms(width: int) -> float:
    return 0.002 * width + (0.3 if width else 0.0)


def table(architecture="Made", pairs=PAIRS, grids=((QK, VO), (MLP,))) -> LatencyTable:
    costs, kinds = (attention_ms, mlp_ms), (("qk", "vo"), ("mlp",))
    blocks = (
        BlockLatency(
            tuple(tuple(f"layer.{i}.{part}" for part in kind) for i in range(len(pairs) // 3)),
            grid,
            tuple(cost(*grid_dense(grid)) - cost(*widths) for widths in product(*grid)),
        )
        for kind, grid, cost in zip(kinds, grids, costs, strict=True)
    )
    conditions = {"threads": 1}
    return LatencyTable(architecture, pair_shapes(pairs), 100.0, tuple(blocks), conditions)


def grid_dense(grid):
    return [points[-1] for points in grid]


def one(widths: dict[str, int]) -> float:
    return table().predict({name: torch.tensor([w]) for name, w in widths.items()}).item()


def test_measured_widths_are_read_back_and_others_lie_between():
    widths = {pair.name: pair.width for pair in PAIRS}
    assert one(widths) == 100
    for qk, vo, mlp in product(QK, VO, MLP):
        cut = widths | {"layer.2.qk": qk, "layer.2.vo": vo, "layer.5.mlp": mlp}
        expected = 100 - attention_ms(32, 32) + attention_ms(qk, vo) - mlp_ms(1536) + mlp_ms(mlp)
        assert one(cut) == pytest.approx(expected)
    for qk, vo in product((4, 12, 24), (4, 20)):  # each halfway between two measured ones
        below, above = (max(w for w in QK if w < qk), min(w for w in QK if w > qk))
        left, right = (max(w for w in VO if w < vo), min(w for w in VO if w > vo))
        if below + above == 2 * qk and left + right == 2 * vo:
            corners = [attention_ms(*corner) for corner in product((below, above), (left, right))]
            expected = 100 - attention_ms(32, 32) + sum(corners) / 4
            assert one(widths | {"layer.0.qk": qk, "layer.0.vo": vo}) == pytest.approx(expected)


@pytest.mark.parametrize(
    "options", [{}, {"multiple_of": 4}, {"min_width": 3, "protect": ["layer.0.*"]}]
)
@pytest.mark.parametrize("seed", range(4))
def test_a_plan_is_the_largest_that_is_fast_enough(options, seed):
    """Against every size of a small family, each planned by its number of parameters."""
    pairs = tuple(
        replace(pair, heads=1, width=16 if pair.kind != "mlp" else 40, cost=10)
        for pair in PAIRS[:6]
    )
    small = table(pairs=pairs, grids=((tuple(range(17)), (0, 5, 16)), ((0, 7, 40),)))
    generator = torch.Generator().manual_seed(seed)
    score = {p.name: torch.rand(1, p.width, generator=generator).double() for p in pairs}
    same = {p.name: 10 for p in pairs}
    dense = {"params": 2000, "bytes": 2000, "macs": 2000, "cache": 0}
    unit = {"params": same, "bytes": same, "macs": same, "cache": dict.fromkeys(same, 0)}
    costs = CostTable(dense, unit, {})
    path = SolutionPath(pairs, score, score, costs, "made", {}, Fingerprint("Made", {}))
    protected = 72 * bool(options.get("protect"))
    removable = 144 - protected - 3 * options.get("min_width", 0) * (1 + (not protected))
    step = options.get("multiple_of", 1)
    family = [path.plan(params=2000 - 10 * k, **options) for k in range(0, removable + 1, step)]
    assert len({plan.achieved.params for plan in family}) == len(family)
    times = [
        small.predict({n: torch.tensor([w]) for n, w in plan.widths.items()}).item()
        for plan in family
    ]
    assert any(narrow > wide for wide, narrow in zip(times, times[1:], strict=False))
    for asked in torch.linspace(min(times), 100, 40).tolist():
        asked = max(asked, min(times))
        plan = path.plan(latency_ms=asked, latency=small, **options)
        first = next(i for i, ms in enumerate(times) if ms <= asked)
        assert plan.widths == family[first].widths
        assert plan.latency_ms == {"predicted": pytest.approx(times[first])}
        assert plan.asked["latency_ms"] == asked


def test_plans_for_latency_are_nested_among_each_other_and_with_other_budgets():
    path = made_path(2)
    plans = [path.plan(latency_ms=ms, latency=table()) for ms in (97.0, 93.0, 90.0)]
    for large, small in zip(plans, plans[1:], strict=False):
        assert subset(small, large)
        assert small.achieved.params < large.achieved.params
    for plan in plans:
        again = path.plan(params=plan.achieved.params)
        assert subset(plan, again)
        assert subset(again, plan)


@pytest.mark.parametrize("asked", [100.5, 1.0, -3])
def test_what_cannot_be_reached_says_what_can(asked):
    lowest = one(dict.fromkeys(pair_shapes(PAIRS), 0))
    with pytest.raises(BudgetError, match=rf"{lowest:.2f} to 100\.00 ms"):
        made_path().plan(latency_ms=asked, latency=table())


def test_a_latency_needs_a_table_and_a_table_a_latency():
    with pytest.raises(BudgetError, match=r"needs latency=.*measure_latency"):
        made_path().plan(latency_ms=50)
    with pytest.raises(BudgetError, match="not for sparsity="):
        made_path().plan(sparsity=0.5, latency=table())
    with pytest.raises(BudgetError, match="exactly one"):
        made_path().plan(sparsity=0.5, latency_ms=50, latency=table())
    with pytest.raises(BudgetError, match="finite"):
        made_path().plan(latency_ms=float("nan"), latency=table())


def test_a_table_of_another_model_is_refused():
    with pytest.raises(FingerprintError, match="class is Made, not Other"):
        made_path().plan(latency_ms=50, latency=table("Other"))
    path = made_path()
    fewer = SolutionPath(
        PAIRS[:-1], path.score, path.entry_time, COSTS, "made", {}, Fingerprint("Made", {})
    )
    with pytest.raises(FingerprintError, match=r"differ, for example layer\.5\.mlp"):
        fewer.plan(latency_ms=50, latency=table())


def test_a_table_survives_its_file(tmp_path):
    file = tmp_path / "table.json"
    table().save(file)
    assert LatencyTable.load(file) == table()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda t: t.update(version=1), "version 1"),
        (lambda t: t.update(format="solpath.path"), "solpath.path"),
        (lambda t: t.pop("dense_ms"), "dense_ms"),
        (lambda t: t["shapes"].pop("layer.0.qk"), "every pair"),
        (lambda t: t["shapes"].update({"layer.0.qk": [12, 31, 770]}), r"layer\.0\.qk"),
        (lambda t: t["shapes"].update({"layer.0.qk": [12, 32]}), "unpack"),
        (lambda t: t["shapes"].update({"layer.0.qk": [12, 32.0, 770]}), "three positive"),
        (lambda t: t["blocks"][1]["blocks"].append(["layer.0.mlp"]), "once"),
        (lambda t: t["blocks"][1]["widths"][0].reverse(), "ascending"),
        (lambda t: t["blocks"][0]["blocks"].append(["layer.0.mlp"]), "one pair"),
        (lambda t: t["blocks"][0]["saved_ms"].pop(), "every combination"),
        (lambda t: t["blocks"][0].update(saved_ms=["x"]), "'x'"),
    ],
)
def test_a_damaged_table_is_refused(damage, words, tmp_path):
    file = tmp_path / "table.json"
    table().save(file)
    value = json.loads(file.read_text())
    damage(value)
    file.write_text(json.dumps(sealed(value)))
    with pytest.raises(FileError, match=words):
        LatencyTable.load(file)


def test_measuring_leaves_the_model_as_found():
    model = build("qwen3", num_hidden_layers=1).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = solpath.measure_latency(model, inputs(model), repeats=1)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())
    assert found.conditions["dtype"] == "float32"
    assert found.dense_ms > 0


def clock(monkeypatch, cost):
    """A stopwatch that says what the widths of a model cost; returns how often it was looked at."""
    looks = defaultdict(int)

    def latencies(functions, *, repeats):
        times = {}
        for name, function in functions.items():
            model = function.args[0]
            plan = getattr(model, "solpath_plan", None)
            widths = plan.widths if plan else {p.name: p.width for p in find_pairs(model)}
            looks[len(functions)] += 1
            times[name] = [1e-3 * cost(widths)] * repeats
        return times

    monkeypatch.setattr(timing, "latencies", latencies)
    return looks


def additive(widths):
    """Blocks add up, linear between the widths that a table has."""
    return 5.0 + sum(0.02 * w if name.endswith("mlp") else 0.1 * w for name, w in widths.items())


@pytest.mark.parametrize(("label", "kinds"), [("bert", 2), ("swin", 4), ("t5 gated", 5)])
def test_blocks_share_a_measurement_if_their_inputs_have_one_shape(label, kinds, monkeypatch):
    """Encoder and decoder, self and cross attention, and stages get inputs of their own."""
    model = build(label)
    clock(monkeypatch, additive)
    found = solpath.measure_latency(model, inputs(model), repeats=1)
    assert len(found.blocks) == kinds
    named = [name for kind in found.blocks for names in kind.blocks for name in names]
    assert sorted(named) == sorted(pair.name for pair in find_pairs(model))


def test_a_table_predicts_blocks_that_add_up(bert, monkeypatch):
    clock(monkeypatch, additive)
    found = solpath.measure_latency(bert, inputs(bert), repeats=2)
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        widths = {
            p.name: torch.randint(0, p.width + 1, (1,), generator=generator)
            for p in find_pairs(bert)
        }
        expected = additive({name: width.item() for name, width in widths.items()})
        assert found.predict(widths).item() == pytest.approx(expected)


def test_a_plan_is_corrected_until_the_stopwatch_agrees(bert, monkeypatch):
    path = solpath.baselines.magnitude(bert, [inputs(bert)])
    clock(monkeypatch, additive)
    found = solpath.measure_latency(bert, inputs(bert))
    asked = 0.7 * found.dense_ms
    plan = solpath.plan_for_latency(bert, path, inputs(bert), asked, latency=found)
    assert plan.latency_ms["predicted"] == pytest.approx(plan.latency_ms["measured"])

    # A machine twice as slow by now, whose blocks do not add up.
    def cost(widths):
        return 2 * additive(widths) ** 1.5

    looks = clock(monkeypatch, cost)
    plan = solpath.plan_for_latency(bert, path, inputs(bert), asked, latency=found, tolerance=0.02)
    whole = cost({pair.name: pair.width for pair in plan.pairs})
    expected = found.dense_ms * cost(plan.widths) / whole
    assert plan.latency_ms["measured"] == pytest.approx(expected)
    assert abs(plan.latency_ms["measured"] / asked - 1) <= 0.02
    assert looks[2] > 2  # of both models, more than once
    again = type(plan).from_dict(plan.to_dict())
    assert again.latency_ms == plan.latency_ms
    monkeypatch.undo()
    small = solpath.extract(bert, plan)
    assert sum(p.numel() for p in small.parameters()) == plan.achieved.params


def test_a_latency_near_the_dense_one_is_met(bert, monkeypatch):
    """The first plan is faster than predicted; the corrected table has a faster dense model."""
    path = solpath.baselines.magnitude(bert, [inputs(bert)])
    clock(monkeypatch, additive)
    found = solpath.measure_latency(bert, inputs(bert))
    asked = 0.99 * found.dense_ms
    whole = {pair.name: pair.width for pair in path.pairs}
    clock(monkeypatch, lambda widths: additive(widths) * (1.0 if widths == whole else 0.9))
    plan = solpath.plan_for_latency(bert, path, inputs(bert), asked, latency=found)
    assert plan.widths == whole
    assert plan.asked["latency_ms"] == asked
    assert plan.latency_ms["measured"] == pytest.approx(found.dense_ms)


def test_what_cannot_be_planned_is_refused_before_anything_is_measured(bert, monkeypatch):
    path = solpath.baselines.magnitude(bert, [inputs(bert)])
    monkeypatch.setattr(timing, "latencies", None)
    for options, words in (
        ({"latency_ms": 0}, "latency_ms must be a positive number"),
        ({"latency_ms": 5, "multiple_of": 0}, "multiple_of must be"),
        ({"latency_ms": 5, "protect": ["zzz"]}, "matches no pair"),
        ({"latency_ms": 5, "whole_groups": True}, "widths of heads, not their number"),
    ):
        with pytest.raises((BudgetError, ConfigError), match=words):
            solpath.plan_for_latency(bert, path, inputs(bert), **options)
    with pytest.raises(FingerprintError, match="another model"):
        solpath.plan_for_latency(build("bert", seed=1), path, inputs(bert), 5)


def test_what_no_plan_meets_is_an_error_with_what_was_measured(bert, monkeypatch):
    path = solpath.baselines.magnitude(bert, [inputs(bert)])
    clock(monkeypatch, additive)
    found = solpath.measure_latency(bert, inputs(bert))
    noise = iter([1.0, 0.7, 1.0, 0.9] * 3)  # of the dense model, of the small one
    clock(monkeypatch, lambda widths: next(noise) * found.dense_ms)
    with pytest.raises(BudgetError, match=r"not met to 5\.0% in 6 attempts"):
        solpath.plan_for_latency(bert, path, inputs(bert), 0.8 * found.dense_ms, latency=found)


def test_a_table_of_other_conditions_is_refused(bert, monkeypatch):
    path = solpath.baselines.magnitude(bert, [inputs(bert)])
    clock(monkeypatch, additive)
    found = solpath.measure_latency(bert, inputs(bert))
    with pytest.raises(ConfigError, match=r"batch .*\[4, 9\].* here it is .*\[2, 9\]"):
        solpath.plan_for_latency(bert, path, inputs(bert, samples=2), 5, latency=found)
    with pytest.raises(ConfigError, match="dtype 'float32', here it is 'float64'"):
        solpath.plan_for_latency(bert.double(), path, inputs(bert), 5, latency=found)
    with pytest.raises(ConfigError, match="tolerance must be in"):
        solpath.plan_for_latency(bert, path, inputs(bert), 5, latency=found, tolerance=0)
    with pytest.raises(ConfigError, match="repeats must be an integer"):
        solpath.measure_latency(bert, inputs(bert), repeats=0)
