"""Plans: budgets are met, nested, dense in shape, and refused when they make no sense."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import solpath
from conftest import batches, build
from solpath.errors import BudgetError, ConfigError, FileError, FingerprintError
from solpath.pair import Fingerprint, Pair, Side, flatten
from solpath.planning.cost import CostTable
from solpath.planning.path import SolutionPath
from solpath.planning.plan import Plan
from solpath.reading import sealed

# 12 heads x 32 and an MLP of 1536, six times: the shape of a small BERT, no weights needed.
PAIRS = tuple(
    pair
    for i in range(6)
    for pair in (
        Pair(f"layer.{i}.qk", "qk", 12, 32, (Side("q", 0),), Side("k", 0), 770),
        Pair(f"layer.{i}.vo", "vo", 12, 32, (Side("v", 0),), Side("o", 1), 769),
        Pair(f"layer.{i}.mlp", "mlp", 1, 1536, (Side("a", 0),), Side("b", 1), 769),
    )
)
COSTS = CostTable(
    dense={
        "params": 22_713_216,
        "bytes": 4 * 22_713_216 + 100,
        "macs": 5 * 10**8,
        "cache": 0,
    },
    unit={
        "params": {p.name: p.cost for p in PAIRS},
        "bytes": {p.name: 4 * p.cost for p in PAIRS},
        "macs": {p.name: p.cost * 32 + (p.kind != "mlp") * 1024 for p in PAIRS},
        "cache": {p.name: 0 for p in PAIRS},
    },
    sample={"input_ids": (1, 32)},
)


def made_path(seed: int = 0) -> SolutionPath:
    generator = torch.Generator().manual_seed(seed)
    spread = torch.rand(len(PAIRS), generator=generator)
    score = {
        p.name: (torch.rand(p.heads, p.width, generator=generator) * spread[i]).double()
        for i, p in enumerate(PAIRS)
    }
    entry = {name: 1 - value for name, value in score.items()}
    return SolutionPath(PAIRS, score, entry, COSTS, "made", {}, Fingerprint("Made", {}))


def subset(small: Plan, large: Plan) -> bool:
    return all(
        set(row) <= set(wide)
        for name in small.kept
        for row, wide in zip(small.kept[name].tolist(), large.kept[name].tolist(), strict=True)
    )


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 20),
    sizes=st.lists(st.floats(0, 0.99), min_size=2, max_size=4),
    multiple=st.sampled_from([1, 2, 4, 8, 5]),
)
def test_plans_hit_their_budget_and_are_nested(seed, sizes, multiple):
    path = made_path(seed)
    plans = [path.plan(sparsity=s, multiple_of=multiple) for s in sorted(sizes)]
    for sparsity, plan in zip(sorted(sizes), plans, strict=True):
        bound = 0.005 if multiple == 1 else 0.015
        assert abs(plan.achieved.sparsity - sparsity) <= bound
        for pair in PAIRS:
            width = plan.widths[pair.name]
            assert width % multiple == 0 or width == pair.width
            assert plan.kept[pair.name].shape == (pair.heads, width)
    for large, small in zip(plans, plans[1:], strict=False):
        assert subset(small, large)


@pytest.mark.parametrize("budget", ["params", "bytes", "macs"])
def test_counts_and_shares_are_the_same_budget(budget):
    path = made_path()
    dense = COSTS.dense[budget]
    by_share = path.plan(**{budget: 0.7})
    by_count = path.plan(**{budget: int(0.7 * dense)})
    achieved = getattr(by_share.achieved, budget) / dense
    assert abs(achieved - 0.7) < 0.005
    assert subset(by_share, by_count)
    assert subset(by_count, by_share)


@pytest.mark.parametrize("budget", ["params", "bytes", "macs"])
def test_a_count_is_met_by_the_nearest_unit(budget):
    """A rank of the widest layer, of all heads together, is the largest step there is."""
    path, largest = made_path(), max(p.heads * COSTS.unit[budget][p.name] for p in PAIRS)
    for count in range(COSTS.dense[budget], int(0.7 * COSTS.dense[budget]), -987_654):
        plan = path.plan(**{budget: count})
        assert abs(getattr(plan.achieved, budget) - count) <= largest / 2
        same = path.plan(**{budget: getattr(plan.achieved, budget)})
        assert subset(same, plan)
        assert subset(plan, same)


def test_kept_units_are_the_best_of_their_head():
    path = made_path(3)
    plan = path.plan(sparsity=0.6)
    for pair in PAIRS:
        score, kept = path.score[pair.name], plan.kept[pair.name]
        for head in range(pair.heads):
            rest = [u for u in range(pair.width) if u not in kept[head].tolist()]
            if rest and kept.shape[1]:
                assert score[head, kept[head]].min() >= score[head, rest].max()


def test_protect_and_min_width():
    path = made_path()
    plan = path.plan(sparsity=0.5, protect=["layer.0.*", "*.vo"], min_width=3)
    for pair in PAIRS:
        if pair.name.startswith("layer.0.") or pair.kind == "vo":
            assert plan.widths[pair.name] == pair.width
        assert plan.widths[pair.name] >= 3
    assert abs(plan.achieved.sparsity - 0.5) < 0.005


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "exactly one"),
        ({"sparsity": 0.5, "params": 0.5}, "exactly one"),
        ({"sparsity": 1.0}, r"\[0, 1\)"),
        ({"sparsity": -0.1}, r"\[0, 1\)"),
        ({"sparsity": float("nan")}, "finite"),
        ({"sparsity": "0.5"}, "finite number"),
        ({"params": 0}, "share in"),
        ({"params": -5}, "share in"),
        ({"macs": 10**12}, "share in"),
        ({"params": 0.1}, "not reachable"),
        ({"bytes": 0.1}, r"not reachable: [\d,]+ to 90,852,964 are"),
        ({"bytes": 10**9}, "up to 90,852,964"),
        ({"sparsity": 0.9, "min_width": 16}, "not reachable: 0 to 0."),
    ],
)
def test_bad_budgets(options, words):
    with pytest.raises(BudgetError, match=words):
        made_path().plan(**options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"protect": ["nothing*"]}, "matches no pair"),
        ({"multiple_of": 0}, "multiple_of"),
        ({"multiple_of": 8.0}, "multiple_of"),
        ({"multiple_of": "8"}, "multiple_of"),
        ({"min_width": -1}, "min_width"),
        ({"min_width": 2.5}, "min_width"),
    ],
)
def test_bad_options(options, words):
    with pytest.raises(ConfigError, match=words):
        made_path().plan(sparsity=0.5, **options)


def test_plans_survive_json():
    plan = made_path().plan(sparsity=0.4)
    again = Plan.from_dict(plan.to_dict())
    assert again.to_dict() == plan.to_dict()
    assert all(torch.equal(again.kept[n], plan.kept[n]) for n in plan.kept)


@pytest.mark.parametrize(
    "units", [[0, 0], [1, 0], [0, 1536], [-1, 2], [0, 1.0], [0, None], [0, True]]
)
def test_bad_indices_are_refused(units):
    value = made_path().plan(sparsity=0.4).to_dict()
    value["kept"]["layer.0.mlp"] = [units]
    with pytest.raises(ValueError, match=r"layer\.0\.mlp"):
        Plan.from_dict(value)


def test_the_order_is_total_and_decides_every_plan(bert):
    path = solpath.search(bert, batches(bert), solpath.SearchConfig(steps=5), progress=False)
    order = path.order()
    assert sorted(order.tolist()) == list(range(sum(p.units for p in path.pairs)))
    score = flatten(path.pairs, path.score)[order]
    assert (score[:-1] >= score[1:]).all()


def test_path_round_trip(bert, tmp_path):
    path = solpath.search(bert, batches(bert), solpath.SearchConfig(steps=5), progress=False)
    path.save(tmp_path / "path")
    again = SolutionPath.load(tmp_path / "path")
    for field in ("pairs", "costs", "method", "config", "fingerprint"):
        assert getattr(again, field) == getattr(path, field)
    assert torch.equal(again.order(), path.order())
    assert torch.equal(again.history, path.history)
    assert len(path.seen) == 12
    assert torch.equal(again.seen, path.seen)
    assert again.plan(sparsity=0.5).to_dict() == path.plan(sparsity=0.5).to_dict()
    assert sum(f.stat().st_size for f in (tmp_path / "path").iterdir()) < 20_000
    header = json.loads((tmp_path / "path" / "path.json").read_text())
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "path.json").write_text(json.dumps(header | {"version": 1}))
    with pytest.raises(FileError, match="version 1; a path of another version has to be searched"):
        SolutionPath.load(tmp_path / "old")
    for part in ("unit_bytes", "unit_macs", "unit_cache", "unit_params"):
        damaged = json.loads((tmp_path / "path" / "path.json").read_text())
        damaged["costs"][part].popitem()
        (tmp_path / "old" / "path.json").write_text(json.dumps(sealed(damaged)))
        with pytest.raises(FileError, match=rf"path\.json: ValueError in field costs\.{part}"):
            SolutionPath.load(tmp_path / "old")
    with pytest.raises(FileError, match="not empty"):
        path.save(tmp_path / "path")
    path.save(tmp_path / "path", overwrite=True)


def test_a_path_of_another_model_is_refused(bert):
    path = solpath.search(bert, batches(bert), solpath.SearchConfig(steps=2), progress=False)
    with pytest.raises(FingerprintError, match="weights differ in 6 of 6 pairs"):
        solpath.extract(build("bert", seed=1), path.plan(sparsity=0.5))
    with pytest.raises(FingerprintError, match="RobertaForMaskedLM, not BertModel"):
        solpath.extract(build("roberta"), path.plan(sparsity=0.5))
    with pytest.raises(FingerprintError, match="pairs differ"):
        solpath.extract(build("bert", num_hidden_layers=3), path.plan(sparsity=0.5))
    changed = build("bert")
    with torch.no_grad():
        changed.encoder.layer[1].output.dense.weight[0, 0] += 1
    with pytest.raises(FingerprintError, match=r"1 of 6 pairs, first encoder\.layer\.1\.mlp"):
        solpath.extract(changed, path.plan(sparsity=0.5))


def test_curve_plot_and_repr(bert):
    path = solpath.search(bert, batches(bert), solpath.SearchConfig(steps=20), progress=False)
    points = path.curve(10)
    sparsity = [point.size.sparsity for point in points]
    assert sparsity == sorted(sparsity)
    assert points[0].size.sparsity == 0
    assert points[-1].loss > points[0].loss >= 0
    assert len(path.plot().axes) == 2
    assert "spp: 224 units in 6 pairs of BertModel" in repr(path)
    assert "'sparsity': 0.5" in repr(path.plan(sparsity=0.5))


def test_ties_are_broken_by_position():
    path = made_path()
    flat = {name: torch.zeros_like(value) for name, value in path.score.items()}
    tied = SolutionPath(PAIRS, flat, flat, COSTS, "tied", {}, path.fingerprint)
    assert tied.order().tolist() == list(range(sum(p.units for p in PAIRS)))
    small, large = tied.plan(sparsity=0.7), tied.plan(sparsity=0.2)
    assert subset(small, large)
