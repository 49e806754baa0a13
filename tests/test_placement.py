"""Models that accelerate off-loads or spreads: every verb gives the bits of the model in memory."""

import copy
from functools import cache, partial
from types import MethodType, SimpleNamespace

import accelerate
import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_submodules
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

import solpath
from conftest import batches, build, inputs
from plans import random_plan
from solpath import SearchConfig
from solpath.errors import UnsupportedModelError
from solpath.loading import load_within, off_loaded
from solpath.model.counting import count_costs, saved_tensors
from solpath.model.masks import mask_hooks
from solpath.model.placed import distinct_parameters
from solpath.pair import flatten
from solpath.running.forward import activation_mask, device_of, forward, output_mask
from solpath.running.modes import differentiating
from solpath.searching.engine import open_engine
from solpath.searching.probe import probing

TIED = {"llama": {"tie_word_embeddings": True}, "bert": {}}
WAYS = ("transformers", "auto", "some", "cpu", "disk", "hook")


def placed(way, model, folder):
    """The model with its weights elsewhere, in the way that a user would have it."""
    if way in ("transformers", "auto"):
        model.save_pretrained(folder / "dense")
        size = sum(parameter.numel() for parameter in model.parameters()) * 4
        options = {"device_map": {"": "disk"}}
        if way == "auto":
            options = {"device_map": "auto", "max_memory": {"cpu": int(0.8 * size)}}
            options["offload_folder"] = folder / "auto"
        return type(model).from_pretrained(folder / "dense", **options).eval()
    model = copy.deepcopy(model)
    if way == "some":
        parts = model.named_modules()
        blocks = next(name for name, part in parts if isinstance(part, torch.nn.ModuleList))
        devices = {"": "cpu", f"{blocks}.1": "disk"}
        return accelerate.dispatch_model(model, devices, offload_dir=folder / "some")
    if way == "cpu":
        return accelerate.cpu_offload(model)
    if way == "disk":
        return accelerate.disk_offload(model, folder / "disk")
    return accelerate.cpu_offload_with_hook(model, "cpu")[0]


@pytest.fixture(params=["llama", "bert"], scope="module")
def dense(request):
    return build(request.param, **TIED[request.param])


@pytest.fixture(scope="module")
def expected(dense):
    """What the verbs give for the model in memory."""
    data, config = batches(dense, 4), solpath.TuneConfig(steps=2, learning_rate=1e-3)
    small = solpath.extract(dense, random_plan(dense, (0.5,)))
    return SimpleNamespace(
        path=cache(lambda config: solpath.search(dense, batches(dense), config, progress=False)),
        small=small,
        refitted=solpath.compensate(small, dense, data, progress=False),
        metrics=solpath.evaluate(small, dense, data).metrics,
        tuned=solpath.tune(small, dense, data, config, heldout=data[:1], progress=False),
        costs=count_costs(dense, solpath.find_pairs(dense), inputs(dense, samples=1)),
    )


@pytest.fixture(params=WAYS)
def away(request, dense, tmp_path):
    return placed(request.param, dense, tmp_path)


def state(model):
    """What a verb must leave as it is."""
    return (
        [
            (name, p.device, p.requires_grad, p.shape)
            for name, p in model.named_parameters(remove_duplicate=False)
        ],
        [(m.training, sorted(vars(m)), type(m)) for m in model.modules()],
        [vars(m).get("_old_forward") for m in model.modules()],
        [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        [type(getattr(getattr(m, "_hf_hook", None), "weights_map", None)) for m in model.modules()],
    )


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


def same_path(a, b):
    both = [(flatten(p.pairs, p.score), flatten(p.pairs, p.entry_time), p.history) for p in (a, b)]
    assert all(map(torch.equal, *both))
    assert a.basis.keys() == b.basis.keys()
    assert all(torch.equal(a.basis[name], b.basis[name]) for name in a.basis)
    return a.costs == b.costs and a.pairs == b.pairs


@pytest.mark.parametrize(
    ("way", "options"),
    [
        *((way, {}) for way in WAYS),
        ("transformers", {"basis": "principal"}),
        ("some", {"compensated": True}),
        ("cpu", {"basis": "principal", "compensated": True}),
    ],
)
def test_search_and_extract(dense, expected, way, options, tmp_path):
    config, away = solpath.SearchConfig(steps=3, **options), placed(way, dense, tmp_path)
    found, data = state(away), batches(dense)
    assert solpath.find_pairs(away) == solpath.find_pairs(dense)
    path = solpath.search(away, data, config, progress=False)
    known = expected.path(config)
    assert same_path(path, known)
    assert path.fingerprint == known.fingerprint
    plan = known.plan(sparsity=0.5)
    small, one = solpath.extract(away, plan), solpath.extract(dense, plan)
    assert same(small, one)
    left = ("_hf_hook", "_old_forward", "forward", "to", "cuda", "hf_device_map")
    assert not any(name in vars(part) for part in small.modules() for name in left)
    assert {parameter.device.type for parameter in small.parameters()} == {"cpu"}
    if hasattr(dense, "lm_head"):
        assert small.lm_head.weight is small.get_input_embeddings().weight
    assert torch.equal(forward(small, data[0]), forward(one, data[0]))
    small.to(torch.float64)  # not the `to` of the dense model, which would refuse
    assert next(small.parameters()).dtype == torch.float64
    if "principal" in options.values():
        with solpath.masked(away, plan), solpath.masked(dense, plan):
            assert torch.equal(forward(away, data[0]), forward(dense, data[0]))
    assert state(away) == found


def test_compensate_evaluate_and_tune(dense, away, expected):
    found, data, small = state(away), batches(dense, 4), expected.small
    assert same(solpath.compensate(small, away, data, progress=False), expected.refitted)
    assert solpath.evaluate(small, away, data).metrics == expected.metrics
    assert solpath.evaluate(away, dense, data).metrics["relative_error"] == 0
    config = solpath.TuneConfig(steps=2, learning_rate=1e-3)
    tuned = solpath.tune(small, away, data, config, heldout=data[:1], progress=False)
    assert same(tuned, expected.tuned)
    assert state(away) == found


def test_sizes(dense, away, expected):
    found = state(away)
    pairs, sample = solpath.find_pairs(dense), inputs(dense, samples=1)
    forward(away, sample)  # from now on tied weights are objects of their own
    assert count_costs(away, pairs, sample) == expected.costs
    whole = {name: p.shape for name, p in dense.named_parameters()}
    assert {name: p.shape for name, p in distinct_parameters(away)} == whole
    assert saved_tensors(away).keys() == saved_tensors(dense).keys()
    assert state(away) == found


def test_figures_of_moving_weights_are_refused(tmp_path):
    dense = build("llama")
    away, batch = placed("some", dense, tmp_path), inputs(dense)
    with pytest.raises(UnsupportedModelError, match=r"off its device.* cannot be measured"):
        solpath.measure({"dense": dense, "away": away}, batch, repeats=1)
    hooked = placed("hook", dense, tmp_path)
    figures = solpath.measure({"dense": dense, "hooked": hooked}, batch, repeats=1)
    assert figures["hooked"].params == figures["dense"].params


def test_a_small_model_may_be_off_loaded(tmp_path):
    dense = build("bert")
    small = solpath.extract(dense, random_plan(dense, (0.5,)))
    away, data = placed("disk", small, tmp_path), batches(dense, 4)
    found = state(away)
    one, two = (solpath.compensate(m, dense, data, progress=False) for m in (small, away))
    assert same(one, two)
    config = solpath.TuneConfig(steps=2, learning_rate=1e-3)
    one, two = (
        solpath.tune(m, dense, data, config, heldout=data[:1], progress=False)
        for m in (small, away)
    )
    assert same(one, two)
    assert two.solpath_plan is away.solpath_plan
    assert state(away) == found


@pytest.mark.parametrize("label", ["mixtral", "gpt_oss", "qwen3", "gpt2"])
def test_masks_of_every_kind(label, tmp_path):
    """Of experts they are set inside `forward`, of which accelerate's hooks keep one."""
    dense = build(label)
    plan, batch = random_plan(dense, (0.5, 0.75)), inputs(dense)
    with solpath.masked(dense, plan):
        expected = forward(dense, batch)
    removed = copy.deepcopy(dense)
    add_hook_to_module(removed, AlignDevicesHook("cpu"))
    for part in list(removed.modules()):
        add_hook_to_module(part, AlignDevicesHook("cpu"))
    remove_hook_from_submodules(removed)
    for model in (placed("disk", dense, tmp_path), placed("cpu", dense, tmp_path), removed):
        costs = count_costs(model, plan.pairs, inputs(dense, samples=1))
        assert costs == count_costs(dense, plan.pairs, inputs(dense, samples=1))
        with solpath.masked(model, plan):
            assert torch.equal(forward(model, batch), expected)
        assert same(solpath.extract(model, plan), solpath.extract(dense, plan))
        for part in model.modules():
            kept = vars(part).get("_old_forward", vars(part).get("forward"))
            assert not isinstance(kept, MethodType) or kept.__func__ is type(part).forward


@pytest.mark.parametrize("way", ["transformers", "cpu"])
def test_blocks_that_are_recomputed(way, tmp_path):
    """Off-loaded weights are gone after each call; gradients through them are the same."""
    dense = build("llama", **TIED["llama"])
    pairs, batch = solpath.find_pairs(dense), inputs(dense)

    def slopes(model, recomputed):
        masks = [torch.full((4, pair.units), 0.5, requires_grad=True) for pair in pairs]
        with differentiating(model), mask_hooks(model, pairs) as state:
            state.units.update({p.name: m for p, m in zip(pairs, masks, strict=True)})
            blocks = list(model.model.layers) if recomputed else []
            stock = [vars(block).get("forward") for block in blocks]
            for block in blocks:
                block.forward = partial(checkpoint, block.forward, use_reentrant=False)
            with set_checkpoint_early_stop(False):  # it would skip what empties weights again
                logits = forward(model, batch)
            found = torch.autograd.grad(logits.square().mean(), masks)
            for block, function in zip(blocks, stock, strict=True):
                del block.forward
                vars(block).update({} if function is None else {"forward": function})
        assert all(slope.any() for slope in found)
        return found

    away = placed(way, dense, tmp_path)
    expected = slopes(dense, False)
    for recomputed in (False, True):
        assert all(map(torch.equal, slopes(away, recomputed), expected))
        assert all(parameter.is_meta for parameter in away.parameters())


def test_two_devices():
    """A mask and an attention mask follow the activation to the device of its layer."""
    dense = build("llama")
    plan, batch = random_plan(dense, (0.5,)), inputs(dense)
    spread = copy.deepcopy(dense)
    add_hook_to_module(spread, AlignDevicesHook("cpu"))
    for part in (spread.model.layers[1], spread.model.norm, spread.lm_head):
        add_hook_to_module(part, AlignDevicesHook("meta", place_submodules=True))
    assert device_of(spread).type == "cpu"
    with solpath.masked(spread, plan):
        assert forward(spread, batch).device.type == "meta"
    output = forward(spread, batch)
    for mask in (output_mask(batch, output), activation_mask(batch, output, "lm_head")):
        assert mask.device.type == "meta"
    with pytest.raises(UnsupportedModelError, match="on several devices"):
        solpath.measure({"spread": spread}, batch, repeats=1)


def test_what_cannot_be_off_loaded_is_refused():
    llama = accelerate.cpu_offload(build("llama"), preload_module_classes=["LlamaMLP"])
    with pytest.raises(UnsupportedModelError, match=r"mlp in as a whole.*preload_module_classes"):
        solpath.find_pairs(llama)
    siglip = accelerate.cpu_offload(build("siglip"))
    with pytest.raises(
        UnsupportedModelError, match=r"off-loads vision_model\.head\.attention\.out"
    ):
        solpath.find_pairs(siglip)


def test_a_search_leaves_no_weights_in_memory(tmp_path):
    """Weights that are off-loaded are read for each call, for gradients and for norms alike."""
    dense = build("llama")
    away = placed("disk", dense, tmp_path)
    with probing(away, solpath.find_pairs(away), batches(dense), loss=None, seed=0) as probe:
        for pair in probe.pairs:
            for side in pair.sides:
                found = probe.weight_norms(pair, side)
                assert found.all()
        probe.curvature(1)
        assert all(parameter.is_meta for parameter in away.parameters())


def test_a_checkpoint_that_does_not_fit_stays_on_disk(tmp_path, monkeypatch):
    model = build("llama")
    model.save_pretrained(tmp_path / "dense")
    data, config = batches(model), SearchConfig(steps=3, scale_batches=2)
    expected = solpath.search(model, data, config, progress=False)
    monkeypatch.setattr("solpath.running.memory.free_memory", lambda device: 1000)
    found = solpath.search(tmp_path / "dense", data, config, progress=False)
    assert all(torch.equal(found.score[name], score) for name, score in expected.score.items())
    assert found.fingerprint == expected.fingerprint
    left = load_within(tmp_path / "dense")
    assert all(parameter.is_meta for parameter in left.parameters())


@pytest.mark.parametrize(
    "label", ["deberta-v2", "deberta-v2 apart", "siglip", "siglip2_vision_model"]
)
def test_what_reads_weights_of_a_module_without_a_call_is_searched_from_disk(label, tmp_path):
    """These few weights stay in memory."""
    model = build(label)
    for folder in ("dense", "scratch"):
        (tmp_path / folder).mkdir()
    model.save_pretrained(tmp_path / "dense")
    away = off_loaded(tmp_path / "dense", tmp_path / "scratch")
    assert any(parameter.is_meta for parameter in away.parameters())
    config = SearchConfig(steps=3, scale_batches=2)
    found, expected = (
        solpath.search(one, batches(model), config, progress=False) for one in (away, model)
    )
    assert torch.equal(found.history, expected.history)


def test_compensate_refuses_a_dense_model_on_several_devices(dense, monkeypatch):
    small = solpath.extract(dense, random_plan(dense, (0.5,)))
    first = next(iter(dense.children()))
    where = {dense: torch.device("cuda:0"), first: torch.device("cuda:1")}
    monkeypatch.setattr("solpath.running.placement.execution_device", where.get)
    with pytest.raises(UnsupportedModelError, match="on cuda:0 and cuda:1, where it cannot"):
        solpath.compensate(small, dense, batches(dense, 4), progress=False)


def test_the_estimate_does_not_count_weights_on_disk(tmp_path):
    model = build("llama", num_hidden_layers=6, intermediate_size=400)
    model.save_pretrained(tmp_path / "dense")
    away = type(model).from_pretrained(tmp_path / "dense", device_map={"": "disk"}).eval()
    said = []
    for one, recompute in ((model, True), (away, None)):
        with open_engine(one, batches(model), loss=None, seed=0, recompute=recompute) as engine:
            said.append(engine.estimate(10, 10))
    assert said[1].recompute
    assert said[1].weights < 0.1 * said[0].weights
    assert said[0].step < said[1].step < said[0].step + 0.4 * said[0].weights  # those of one block
