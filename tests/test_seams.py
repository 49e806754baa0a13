"""The two seams: an engine that has no model, and a measure that comes from outside."""

from contextlib import nullcontext

import pytest
import torch
import typer

import solpath
from conftest import batches, build, inputs
from solpath.cli import arguments, prune
from solpath.errors import BudgetError, ConfigError
from solpath.model.counting import MEASURES, Seen, count_costs
from solpath.model.discovery import find_pairs
from solpath.pair import Pair, Side
from solpath.planning.budget import Budget
from solpath.planning.cost import Achieved, CostTable
from solpath.searching import search as searching


class Quadratic:
    """An engine without a model: the loss is ``½ Σ h_i (1 - b_i)²`` for every sample."""

    def __init__(self, seed: int) -> None:
        self.pairs = (
            Pair("one", "mlp", 1, 40, (Side("a", 0),), Side("b", 1), 2),
            Pair("two", "mlp", 1, 30, (Side("c", 0),), Side("d", 1), 5),
        )
        self.units = 70
        self.cost = torch.tensor([2.0] * 40 + [5.0] * 30).double()
        self.pair = torch.tensor([0] * 40 + [1] * 30)
        self.energy = {}
        self._seed = seed
        self.h = torch.rand(70, generator=torch.Generator().manual_seed(seed)).double() + 0.01

    def generator(self, *stream):
        return torch.Generator().manual_seed(hash((self._seed, stream)) % 2**31)

    def batch_size(self, step):
        return 4

    def work(self, step):
        return 4, "samples"

    def new_samples(self):
        return torch.zeros(0, dtype=torch.int64)

    def gradients(self, step, mask, *, binary):
        rows = mask.expand(4, -1)
        if binary:
            rows = torch.bernoulli(rows, generator=self.generator(step)).double()
        missing = 1 - rows
        return float((0.5 * self.h * missing**2).sum(1).mean()), rows, -self.h * missing

    def mean(self, rows, size):
        return rows.mean(0), rows.var(0) / size

    def curvature(self, batches, mask=None, *, start=0, absolute=False):
        missing = 0 if mask is None else 1 - mask
        return self.h.clone(), -self.h * missing

    def measure_basis(self, batches):
        return {}

    def measure_inputs(self, batches):
        return {}

    def rotated(self, basis):
        return nullcontext()

    def unexplained_variance(self, inputs, mask):
        return torch.ones(70).double()

    def weight_norms(self, pair, side):
        return torch.ones(pair.units).double()

    def count_costs(self):
        unit = {"one": 2, "two": 5}
        dense = {"params": 400, "bytes": 1600, "macs": 400, "cache": 0}
        return CostTable(dense, dict.fromkeys(dense, unit), {})


@pytest.mark.parametrize(
    "config",
    [
        solpath.SearchConfig(steps=60),
        solpath.SearchConfig(steps=60, basis="principal", compensated=True),
        solpath.SearchConfig(steps=60, binary=False),
    ],
    ids=["binary", "best", "continuous"],
)
def test_a_search_asks_an_engine_and_nothing_else(bert, monkeypatch, config):
    """On a separable quadratic loss every unit is worth h/2, whatever is masked beside it."""
    engine = Quadratic(seed=3)
    monkeypatch.setattr(searching, "open_engine", lambda *args, **options: nullcontext(engine))
    path = solpath.search(bert, [], config, progress=False)
    worth = (engine.h / engine.cost).argsort(descending=True)
    removable = int(0.9 * engine.units)  # the last ones are never told apart
    assert torch.equal(path.order()[-removable:], worth[-removable:])
    assert path.history.shape == (2, 60)


def test_baselines_ask_the_same_engine(bert, monkeypatch):
    engine = Quadratic(seed=4)
    monkeypatch.setattr(solpath.baselines, "open_engine", lambda *a, **o: nullcontext(engine))
    worth = (engine.h / engine.cost).argsort(descending=True)
    for method in ("gauss_newton", "iterative", "iterative_curvature"):
        path = solpath.baselines.METHODS[method](bert, [])
        assert torch.equal(path.order(), worth), method


def units(seen: Seen):
    """A measure from outside: one for every unit, and a hundred for the rest."""
    return 100 + sum(pair.units for pair in seen.pairs), {pair.name: 1 for pair in seen.pairs}


@pytest.fixture
def counted_path(monkeypatch):
    """A path whose costs know the measure ``units``, and its model."""
    monkeypatch.setitem(MEASURES, "units", units)
    model = build("qwen3")
    return model, solpath.baselines.random(model, batches(model))


def test_a_measure_from_outside_is_a_budget(counted_path, tmp_path):
    model, path = counted_path
    total = sum(pair.units for pair in path.pairs)
    sizes = []
    for value in (0.9, 0.6, 100 + total // 3):
        plan = path.plan(Budget("units", value))
        kept = sum(p.heads * plan.widths[p.name] for p in path.pairs)
        wanted = value if value > 1 else value * (100 + total)
        assert abs(100 + kept - wanted) <= 0.5 * max(pair.heads for pair in path.pairs)
        assert plan.achieved.others == {"units": 100 + kept}
        assert plan.achieved.size("units") == 100 + kept
        assert plan.asked["units"] == value
        sizes.append({name: {*map(tuple, k.tolist())} for name, k in plan.kept.items()})
    path.save(tmp_path / "path")
    again = solpath.SolutionPath.load(tmp_path / "path")
    assert again.costs == path.costs
    small = solpath.extract(model, again.plan(Budget("units", 0.6)))
    solpath.save(small, tmp_path / "small")
    plan = solpath.load(tmp_path / "small").solpath_plan
    assert plan.achieved == path.plan(Budget("units", 0.6)).achieved
    with pytest.raises(BudgetError, match=r"units 0\.01 is not reachable: 100 to"):
        path.plan(Budget("units", 0.01))


def test_a_measure_from_outside_is_one_option(counted_path, tmp_path, monkeypatch, capsys):
    _, path = counted_path
    path.save(tmp_path / "path")
    monkeypatch.setitem(arguments.BUDGETS, "units", "Units to keep.")
    app = typer.Typer()
    app.command()(arguments.takes_budget(prune.plan.__wrapped__))
    app([str(tmp_path / "path"), "--units", "0.6"], standalone_mode=False)
    assert f"params={path.plan(Budget('units', 0.6)).achieved.params:,}" in capsys.readouterr().out


def test_what_is_no_measure(counted_path, monkeypatch, bert):
    _, path = counted_path
    with pytest.raises(BudgetError, match="does not count 'joules'; it knows sparsity, params"):
        path.plan(Budget("joules", 0.5))
    with pytest.raises(BudgetError, match="not both"):
        path.plan(Budget("units", 0.5), sparsity=0.5)
    monkeypatch.setitem(MEASURES, "halves", lambda seen: (10, {p.name: 0.5 for p in seen.pairs}))
    with pytest.raises(ConfigError, match="measure 'halves' must count one whole number"):
        count_costs(bert, find_pairs(bert), inputs(bert, samples=1))


def test_every_budget_of_the_command_line_is_known():
    known = {"sparsity", *MEASURES, "latency_ms"}
    assert set(arguments.BUDGETS) == known


def test_sizes_under_no_other_measure_look_as_before():
    size = Achieved(0.5, 10, 0.5, 40, 7, 0.5, 0)
    assert list(size.to_dict()) == [
        "sparsity", "params", "params_share", "bytes", "macs", "macs_share", "cache"
    ]  # fmt: skip
    assert Achieved.from_dict(size.to_dict()) == size
