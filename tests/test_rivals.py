"""The rivals of the benchmarks against what their mathematics promises."""

import copy
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn

import rival_quality
from conftest import batches, build
from rivals import METHODS, flap
from rivals.allocation import by_influence, kept_share, pooled, uniform
from rivals.corp import affine_fit, bilinear_fit
from rivals.moments import Calibration, Moments, calibrate
from rivals.osscar import eliminate
from rivals.weights import inner_bias, inner_weight, remaining, set_inner_, set_inner_bias_
from solpath.measuring.evaluation import evaluate
from solpath.running.forward import forward
from workloads import Workload

OWN = [name for name in METHODS if not name.startswith("torch_pruning")]
UNIFORM = ["corp", "modegpt_uniform", "uniql_uniform", "wpac", "osscar"]
ROTARY = ["flap", "flap_channels", "modegpt", "modegpt_uniform", "uniql", "uniql_uniform"]


def dense(label: str) -> tuple[nn.Module, Calibration]:
    model = build(label)
    return model, calibrate(model, batches(model))


def error(model: nn.Module, pruned: nn.Module) -> float:
    return evaluate(pruned, model, batches(model)).metrics["relative_error"]


@pytest.fixture(scope="module", params=["bert", "vit"])
def case(request: pytest.FixtureRequest) -> tuple[nn.Module, Calibration]:
    return dense(request.param)


@pytest.fixture(scope="module")
def llama() -> tuple[nn.Module, Calibration]:
    return dense("llama")


@pytest.mark.parametrize("name", OWN)
def test_keeping_everything_is_the_dense_model(case, name):
    model, calibration = case
    before = copy.deepcopy(model.state_dict())
    pruned = METHODS[name](model, calibration, 1.0)
    assert remaining(model, pruned, calibration.pairs) == 1
    for batch in calibration.batches:
        torch.testing.assert_close(forward(pruned, batch), forward(model, batch))
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("keep", [0.7, 0.3])
@pytest.mark.parametrize("name", OWN)
def test_kept_units_meet_the_budget(case, name, keep):
    model, calibration = case
    pruned = METHODS[name](model, calibration, keep)
    total = sum(pair.cost * pair.units for pair in calibration.pairs)
    step = max(pair.cost * pair.heads for pair in calibration.pairs) / total
    if name == "flap":
        step = max(2 * p.cost * p.width for p in calibration.pairs if p.kind != "mlp") / total
    assert remaining(model, pruned, calibration.pairs) == pytest.approx(keep, abs=step / 2 + 1e-9)
    for pair in calibration.pairs:
        widths = [
            (inner_weight(pruned, pair, side).abs().amax((1, 3)) > 0).sum(1) for side in pair.sides
        ]
        assert all(torch.equal(width, widths[0]) for width in widths)
        assert name == "flap" or len(widths[0].unique()) == 1


@pytest.mark.parametrize("name", ROTARY)
def test_rotary_couples_and_grouped_queries(llama, name):
    model, calibration = llama
    whole = METHODS[name](model, calibration, 1.0)
    for batch in calibration.batches:
        torch.testing.assert_close(forward(whole, batch), forward(model, batch))
    pruned = METHODS[name](model, calibration, 0.5)
    assert remaining(model, pruned, calibration.pairs) == pytest.approx(0.5, abs=0.05)
    for pair in calibration.pairs:
        for side in pair.sides:
            alive = inner_weight(pruned, pair, side).abs().amax(3) > 0
            couples = alive.unflatten(2, (pair.channels, pair.width))
            assert torch.equal(couples, couples[:, :1, :1].expand_as(couples))


def random_units(model: nn.Module, calibration: Calibration, keep: float) -> float:
    """The error when the same share of every layer is drawn; the mean of a few draws."""
    from rivals.allocation import best
    from rivals.weights import keep_units_

    generator = torch.Generator().manual_seed(0)
    errors = []
    for _ in range(3):
        pairs = calibration.pairs
        score = {p.name: torch.rand(p.heads, p.width, generator=generator) for p in pairs}
        pruned = copy.deepcopy(model)
        keep_units_(pruned, pairs, best(pairs, score, uniform(pairs, keep)))
        errors.append(error(model, pruned))
    return sum(errors) / len(errors)


@pytest.fixture(scope="module")
def planted() -> tuple[nn.Module, Calibration]:
    """Every other unit gives nothing: no value, no part in the logits, an activation of 0."""
    model = build("bert")
    calibration = calibrate(model, batches(model))
    for pair in calibration.pairs:
        for side in pair.sides:
            if side.axis == 0:
                weight, bias = inner_weight(model, pair, side), inner_bias(model, pair, side)
                weight[:, :, ::2] = 0
                bias[:, :, ::2] = -20 if pair.kind == "mlp" else 0
                set_inner_(model, pair, side, weight)
                set_inner_bias_(model, pair, side, bias)
    return model, calibrate(model, batches(model))


@pytest.mark.parametrize("name", OWN)
def test_dead_units_leave_first(planted, name):
    model, calibration = planted
    found = error(model, METHODS[name](model, calibration, 0.5))
    assert found < random_units(model, calibration, 0.5) / 2
    if name in UNIFORM:
        assert found < (1e-4 if name == "osscar" else 1e-6)  # its ridge is a cost of dead units


def test_directions_without_energy_leave_first():
    """Heads of half the rank, in no channel's direction, are cut to half without loss by WPAC."""
    model = build("bert")
    pairs = calibrate(model, batches(model)).pairs
    generator = torch.Generator().manual_seed(1)
    for pair in pairs:
        axes = torch.randn(pair.heads, 1, pair.width, pair.width, generator=generator).double()
        flat = torch.linalg.qr(axes).Q
        flat = flat[..., : pair.width // 2] @ flat[..., : pair.width // 2].mT
        for side in pair.sides:
            if side.axis == 0 and pair.kind != "mlp":
                bias = inner_bias(model, pair, side).unsqueeze(-1)
                set_inner_(model, pair, side, flat @ inner_weight(model, pair, side))
                set_inner_bias_(model, pair, side, (flat @ bias).squeeze(-1))
    calibration = calibrate(model, batches(model))
    attention = replace(calibration, pairs=[p for p in pairs if p.kind != "mlp"])
    assert error(model, METHODS["wpac"](model, attention, 0.5)) < 1e-9
    values = replace(calibration, pairs=[p for p in pairs if p.kind == "vo"])
    assert error(model, METHODS["uniql_uniform"](model, values, 0.5)) < 1e-6
    assert error(model, METHODS["corp"](model, values, 0.5)) < 1e-3


def test_flap_puts_constant_neurons_into_the_bias():
    model = build("bert")
    pairs = calibrate(model, batches(model)).pairs
    gone = 0
    for pair in pairs:
        if pair.kind == "mlp":
            weight = inner_weight(model, pair, pair.left[0])
            weight[:, :, :10] = 0
            set_inner_(model, pair, pair.left[0], weight)
            gone += 10 * pair.cost
    keep = 1 - gone / sum(pair.cost * pair.units for pair in pairs)
    pruned = flap.prune(model, calibrate(model, batches(model)), keep)
    assert remaining(model, pruned, pairs) == pytest.approx(keep)
    assert error(model, pruned) < 1e-5


def moments(rows: torch.Tensor) -> Moments:
    return Moments(len(rows), rows.sum(0), rows.mT @ rows)


def sample(rows: int, size: int, seed: int = 0) -> torch.Tensor:
    """Correlated rows with means."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(size, size, generator=generator).double()
    return torch.randn(rows, size, generator=generator).double() @ mix + torch.arange(size) / 3


def refit_error(x: torch.Tensor, weight: torch.Tensor, stay: list[int]) -> float:
    """The squared error of ``x weight`` that is left after least squares from some columns."""
    target = x @ weight
    fit = torch.linalg.lstsq(x[:, stay], target).solution
    return float((x[:, stay] @ fit - target).square().sum() / len(x))


def test_osscar_downdates_are_least_squares():
    x, generator = sample(200, 7), torch.Generator().manual_seed(2)
    weight = torch.randn(7, 3, generator=generator).double()
    added, order = eliminate(moments(x).gram, weight)
    stay, total = list(range(7)), 0.0
    for step in range(1, 7):
        options = {j: refit_error(x, weight, [i for i in stay if i != j]) for j in stay}
        j = int((order == step).nonzero())
        assert options[j] == pytest.approx(min(options.values()))
        total += float(added[j])
        assert options[j] == pytest.approx(total)
        stay.remove(j)
    assert float(added.sum()) == pytest.approx(float((x @ weight).square().sum()) / len(x))


def test_osscar_takes_one_channel_of_every_head_in_turn():
    x = sample(300, 12)
    _, order = eliminate(moments(x).gram, torch.eye(12).double(), heads=3, stop=3)
    for step in (3, 6, 9):
        assert (order.view(3, 4) <= step).sum(1).tolist() == [step // 3] * 3
    assert (order == 13).view(3, 4).sum(1).tolist() == [1, 1, 1]


def test_corp_affine_fit_is_the_regression_with_intercept():
    x = sample(5000, 6)
    stay = torch.tensor([True, False, True, True, False, True])
    fit, constant = affine_fit(moments(x), stay)
    design = torch.cat([x[:, stay], torch.ones(5000, 1).double()], 1)
    wanted = torch.linalg.lstsq(design, x[:, ~stay]).solution
    residual = (x[:, stay] @ fit.mT + constant - x[:, ~stay]).square().sum()
    assert float(residual) < 1.001 * float((design @ wanted - x[:, ~stay]).square().sum())


def test_corp_logits_are_the_best_bilinear_form():
    queries, keys = sample(60, 5, 1), sample(50, 5, 2)
    stay = torch.tensor([True, True, False, True, False])
    left, right = bilinear_fit(moments(queries).gram, moments(keys).gram, stay, ridge=1e-12)
    logits = queries @ keys.mT
    fitted = (queries[:, stay] @ left.mT) @ (keys[:, stay] @ right.mT).mT
    features = torch.einsum("ni,mj->nmij", queries[:, stay], keys[:, stay]).flatten(2).flatten(0, 1)
    form = torch.linalg.lstsq(features, logits.flatten()).solution
    best = features @ form - logits.flatten()
    assert float((fitted - logits).square().sum()) == pytest.approx(float(best.square().sum()))


@pytest.mark.parametrize("keep", [0.8, 0.4, 0.2])
def test_allocations_meet_the_budget_and_follow_the_scores(case, keep):
    pairs, influence = case[1].pairs, {}
    first, second = case[1].influence
    influence = {first: 0.9, second: 0.1}
    generator = torch.Generator().manual_seed(3)
    score = {p.name: torch.rand(p.heads, p.width, generator=generator) for p in pairs}
    total = sum(pair.cost * pair.units for pair in pairs)
    step = max(pair.cost * pair.heads for pair in pairs) / total
    for widths in (
        uniform(pairs, keep),
        pooled(pairs, score, keep),
        by_influence(pairs, influence, keep, 0.5),
    ):
        assert kept_share(pairs, widths) == pytest.approx(keep, abs=step / 2 + 1e-9)
    kept = dict.fromkeys(influence, 0)
    for pair in pairs:
        kept[next(b for b in influence if pair.name.startswith(b))] += widths[pair.name]
        assert widths[pair.name] >= int(min(0.15, keep / 2) * pair.width)
    assert kept[first] > kept[second]


def test_a_run_has_the_form_of_the_other_benchmarks(case):
    model, calibration = case
    heldout = batches(model)
    work = Workload(
        name="tiny",
        model=model,
        keeps=(0.7, 0.4),
        batches=lambda seed, count, size: heldout,
        batch_size=4,
        calibration=4,
        tuning=lambda seed, count: (heldout, heldout),
        heldout=heldout,
        task=lambda model: float(sum(p.abs().sum() for p in model.parameters())),
        headline="task",
        higher_is_better=True,
        data={},
    )
    judge, dense = work.judge()
    run = rival_quality.run_rival(work, "corp", 3, calibration, judge)
    assert (run["method"], run["seed"], len(run["sizes"])) == ("corp", 3, 2)
    for size in run["sizes"]:
        assert size["sparsity"] == pytest.approx(1 - size["keep"], abs=0.05)
        assert size["metrics"].keys() == dense.keys()
        assert size["metrics"]["task"] != dense["task"]


def test_torch_pruning_says_how_to_install_it(case, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    with pytest.raises(SystemExit, match="pip install torch-pruning"):
        METHODS["torch_pruning_magnitude"](*case, 0.5)


@pytest.mark.parametrize("name", sorted(set(METHODS) - set(OWN)))
def test_torch_pruning_cuts_to_the_budget(case, name):
    pytest.importorskip("torch_pruning")
    model, calibration = case
    pruned = METHODS[name](model, calibration, 0.5)
    assert remaining(model, pruned, calibration.pairs) == pytest.approx(0.5, abs=0.1)
    assert error(model, pruned) < 2
