"""Experts of mixtures: masked and cut alike however they run, and never cut unseen."""

import copy
import pickle

import pytest
import torch
from torch import nn

import solpath
from conftest import batches, build, inputs
from plans import plan_of, random_plan
from solpath import baselines
from solpath.errors import BatchError, UnsupportedModelError
from solpath.model.counting import count_costs, count_macs
from solpath.model.discovery import find_pairs
from solpath.model.masks import mask_hooks, run_hooks
from solpath.running.forward import forward

LABELS = ["gpt_oss", "mixtral", "qwen2_moe", "qwen3_moe"]
WAYS = ["eager", "batched_mm", "grouped_mm"]


@pytest.fixture(params=LABELS)
def mixture(request):
    return build(request.param)


def experts_of(model):
    return [pair for pair in find_pairs(model) if pair.kind == "experts"]


def modules_of(model):
    return [m for name, m in model.named_modules() if name.endswith("mlp.experts")]


def near(one, other, bound=1e-5):
    return bool((one - other).abs().max() <= bound * other.abs().max())


@pytest.mark.parametrize("way", WAYS)
def test_masked_equals_extracted_however_experts_run(mixture, way):
    """Kernels that group products take rows of 16 bytes only: widths of 8 and 4, and no others."""
    mixture.set_experts_implementation(way)
    pairs = find_pairs(mixture)
    for width in (0, 1, 4, 5, 7, 8):
        widths = [width if pair.kind == "experts" else pair.width for pair in pairs]
        plan = plan_of(mixture, widths, seed=width)
        small = solpath.extract(mixture, plan)
        for module in modules_of(small):
            held = {vars(module).get(n, width) for n in ("intermediate_dim", "intermediate_size")}
            assert held == {width}
            assert module.down_proj.shape[1 if module.is_transposed else 2] == width
        with torch.no_grad():
            cut = forward(small, inputs(mixture))
            with solpath.masked(mixture, plan):
                masked = forward(mixture, inputs(mixture))
            assert near(cut, masked)
            small.set_experts_implementation("eager")
            assert near(forward(small, inputs(mixture)), cut)


def test_every_expert_keeps_units_of_its_own(mixture):
    """By hand: the weights of one expert are those rows and columns of the dense one."""
    plan = random_plan(mixture, (0.5,))
    small = solpath.extract(mixture, plan)
    for pair, dense, cut in zip(
        experts_of(mixture), modules_of(mixture), modules_of(small), strict=True
    ):
        kept = plan.kept[pair.name]
        assert len({tuple(row) for row in kept.tolist()}) > 1
        for expert, units in enumerate(kept.tolist()):
            up, down = dense.gate_up_proj[expert], dense.down_proj[expert]
            if dense.is_transposed:
                up = up.view(len(up), pair.width, 2)[:, units].flatten(1)
                down = down[units]
                bias = dense.gate_up_proj_bias[expert].view(pair.width, 2)[units].flatten()
                assert torch.equal(cut.gate_up_proj_bias[expert], bias)
                assert torch.equal(cut.down_proj_bias[expert], dense.down_proj_bias[expert])
            else:
                up = up.view(2, pair.width, -1)[:, units].flatten(0, 1)
                down = down[:, units]
            assert torch.equal(cut.gate_up_proj[expert], up)
            assert torch.equal(cut.down_proj[expert], down)


def test_a_mask_of_one_sample_acts_on_its_tokens_alone(mixture):
    mixture = mixture.double()
    batch, pairs = inputs(mixture), experts_of(mixture)
    generator = torch.Generator().manual_seed(0)
    rows = {p.name: torch.rand(4, p.units, generator=generator).double() for p in pairs}
    with torch.no_grad(), mask_hooks(mixture, pairs) as masks:
        whole = forward(mixture, batch)
        masks.units.update(rows)
        together = forward(mixture, batch)
        assert not near(together, whole, 1e-3)
        for i in range(4):
            masks.units.update({name: row[i] for name, row in rows.items()})
            torch.testing.assert_close(forward(mixture, batch)[i], together[i])
        masks.units.update({name: row[:3] for name, row in rows.items()})
        with pytest.raises(BatchError, match=r"experts: .* 32 rows for 3 samples"):
            forward(mixture, {name: value[:, :8] for name, value in batch.items()})
    assert not any(type(module).__name__.startswith("Slim") for module in modules_of(mixture))
    torch.testing.assert_close(forward(mixture, batch), whole)


@pytest.mark.parametrize("way", WAYS)
def test_what_members_cost_is_what_is_counted(mixture, way):
    """Also where a kernel cannot be counted, and on a model without data."""
    mixture.set_experts_implementation(way)
    sample = inputs(mixture, samples=1)
    pairs = find_pairs(mixture)
    costs = count_costs(mixture, pairs, sample)
    for width in (5, 0):  # attention would pad unequal widths, which is not counted
        plan = plan_of(mixture, [width if p.kind == "experts" else p.width for p in pairs])
        small = solpath.extract(mixture, plan)
        assert plan.achieved.macs == count_macs(small, sample)
        assert plan.achieved.params == sum(p.numel() for p in small.parameters())
    empty = copy.deepcopy(mixture).to("meta")
    there = {name: value.to("meta") for name, value in sample.items()}
    assert count_costs(empty, pairs, there) == costs
    [first, *_] = experts_of(mixture)
    tokens, k, experts = sample["input_ids"].numel(), 2, first.heads
    assert costs.unit["macs"][first.name] == tokens * k * 3 * mixture.config.hidden_size // experts


def test_costs_that_experts_cannot_share_evenly_are_rounded_down():
    model = build("mixtral", num_local_experts=5)
    sample, pairs = inputs(model, samples=1), find_pairs(model)
    plan = plan_of(model, [3 if p.kind == "experts" else p.width for p in pairs])
    removed = sum(p.heads * (p.width - plan.widths[p.name]) for p in pairs)
    over = plan.achieved.macs - count_macs(solpath.extract(model, plan), sample)
    assert 0 < over < removed


@pytest.mark.parametrize("label", ["gpt_oss", "mixtral"])
def test_neurons_that_say_nothing_leave_first_in_every_expert(label):
    model = build(label)
    model.get_input_embeddings().weight.data.mul_(20)  # so that tokens go to different experts
    generator = torch.Generator().manual_seed(0)
    silent = {p.name: torch.rand(p.heads, p.width, generator=generator) for p in experts_of(model)}
    silent = {name: value.argsort(1)[:, :20] for name, value in silent.items()}
    for pair, module in zip(experts_of(model), modules_of(model), strict=True):
        for expert, units in enumerate(silent[pair.name].tolist()):
            down = module.down_proj.data[expert]
            (down if module.is_transposed else down.T)[units] = 0
    config = solpath.SearchConfig(steps=20)
    path = solpath.search(model, batches(model, 4, 8), config, progress=False)
    for pair in experts_of(model):
        last = path.score[pair.name].argsort(1)[:, :20].sort(1).values
        assert torch.equal(last, silent[pair.name].sort(1).values)


@pytest.mark.parametrize(
    "search",
    [
        lambda *a: solpath.search(*a, solpath.SearchConfig(steps=3), progress=False),
        lambda *a: solpath.search(*a, solpath.InclusionConfig(steps=3), progress=False),
        baselines.magnitude,
        lambda *a: baselines.taylor(*a, scale_batches=2),
    ],
    ids=["spp", "inclusion", "magnitude", "taylor"],
)
def test_experts_stay_whole_if_one_of_them_gets_no_token(search, tmp_path):
    model = build("mixtral", num_local_experts=5)
    with torch.no_grad():  # two of the other logits are positive, whatever a token is
        gate = model.model.layers[0].mlp.gate.weight
        gate.copy_(torch.tensor([[1.0], [2.0], [-1.0], [-2.0], [0.0]]) * gate[0])
    data = batches(model)
    first, second = experts_of(model)
    for batch in data:
        with torch.no_grad(), run_hooks(model, [first, second], batch) as runs:
            forward(model, batch)
        assert runs[first.name].tolist()[-1] == 0
        assert runs[first.name].sum() == 2 * batch["input_ids"].numel()
        assert (runs[second.name] > 0).all()
    path = search(model, data)
    assert path.unreached == (first.name,)
    assert second in path.pairs
    plan = path.plan(sparsity=0.7)
    small = solpath.extract(model, plan)
    dense, cut = modules_of(model)[0], modules_of(small)[0]
    assert type(cut) is type(dense)
    assert torch.equal(cut.down_proj, dense.down_proj)
    solpath.save(small, tmp_path / "small")
    assert torch.equal(
        forward(solpath.load(tmp_path / "small"), inputs(model)), forward(small, inputs(model))
    )


def test_copies_pickles_and_files_of_cut_experts_run(mixture, tmp_path):
    mixture.set_experts_implementation("grouped_mm")
    small = solpath.extract(mixture, random_plan(mixture, (0.4,)))
    expected = forward(small, inputs(mixture))
    solpath.save(small, tmp_path)
    unpickled = pickle.loads(pickle.dumps(small))  # noqa: S301
    for other in (copy.deepcopy(small), unpickled, solpath.load(tmp_path)):
        assert torch.equal(forward(other, inputs(mixture)), expected)
        assert isinstance(modules_of(other)[0], type(modules_of(mixture)[0]))


class OtherExperts(nn.Module):
    """Experts of another class, as those that are quantised are."""


def test_experts_that_run_otherwise_are_refused():
    model = build("mixtral")
    model.model.layers[1].mlp.experts = OtherExperts()
    with pytest.raises(UnsupportedModelError, match=r"is a OtherExperts, not a MixtralExperts; pr"):
        find_pairs(model)

    model = build("mixtral")
    model.model.layers[0].mlp.experts._is_expert_parallel = True
    with pytest.raises(UnsupportedModelError, match="_is_expert_parallel = True"):
        find_pairs(model)

    model = build("gpt_oss")
    model.model.layers[0].mlp.forward = lambda hidden: (hidden, None)  # as kernels of the Hub do
    with pytest.raises(UnsupportedModelError, match=r"layers\.0\.mlp has a forward of its own"):
        find_pairs(model)

    model = build("mixtral")
    handle = model.model.layers[0].mlp.experts.act_fn.register_forward_hook(lambda *args: None)
    with pytest.raises(UnsupportedModelError, match=r"experts\.act_fn has a hook"):
        find_pairs(model)
    handle.remove()
    nn.utils.parametrize.register_parametrization(
        model.model.layers[0].mlp.experts, "down_proj", nn.Identity()
    )
    with pytest.raises(UnsupportedModelError, match=r"remove_parametrizations\(layer, 'down_proj"):
        find_pairs(model)
