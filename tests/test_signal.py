"""Pairs that no batch reaches stay whole, and say so."""

import pytest
import torch

import solpath
from conftest import batches, build, inputs, size_of_output
from solpath import InclusionConfig, SearchConfig, baselines
from solpath.errors import BatchError
from solpath.model.discovery import find_pairs
from solpath.running.forward import forward
from solpath.searching import search as searching

CONFIGS = [
    SearchConfig(steps=4, scale_batches=2),
    SearchConfig(steps=4, scale_batches=2, basis="principal", compensated=True),
    InclusionConfig(steps=4, scale_batches=2),
]


def text_only(model):
    """Batches of an image-text model without images."""
    return [
        {name: b[name][:, 4:] for name in ("input_ids", "attention_mask")}
        for b in batches(model, 4)
    ]


def names(model, part):
    return {pair.name for pair in find_pairs(model) if part in pair.name}


def check_whole(model, path, part, tmp_path):
    """The pairs of `part` are whole in every plan, masked, cut, saved and loaded."""
    whole = names(model, part)
    assert set(path.unreached) == whole
    assert whole.isdisjoint(pair.name for pair in path.pairs)
    assert f"{len(whole)} unreached pairs whole" in repr(path)
    prunable = sum(pair.units * pair.cost for pair in path.pairs)
    assert path.costs.prunable(path.pairs) == prunable
    path.save(tmp_path / "path")
    path = solpath.SolutionPath.load(tmp_path / "path")
    plan = path.plan(sparsity=0.6)
    assert plan.achieved.sparsity == pytest.approx(0.6, abs=0.05)
    assert f"{len(whole)} unreached pairs whole" in repr(plan)
    small = solpath.extract(model, plan)
    assert sum(p.numel() for p in small.parameters()) == plan.achieved.params
    batch = inputs(model)
    with torch.no_grad():
        with solpath.masked(model, plan):
            masked = forward(model, batch)
        cut = forward(small, batch)
    assert (masked - cut).abs().max() <= 1e-5 * masked.abs().max()
    dense, kept = model.state_dict(), small.state_dict()
    for name in kept:
        if part in name:
            assert torch.equal(dense[name], kept[name])
    solpath.save(small, tmp_path / "small")
    loaded = solpath.load(tmp_path / "small")
    assert torch.equal(forward(loaded, batch), cut)
    assert loaded.solpath_plan.unreached == plan.unreached


@pytest.mark.parametrize("config", CONFIGS, ids=["default", "best", "inclusion"])
def test_a_vision_tower_that_gets_no_image_stays_whole(config, tmp_path):
    model = build("gemma3")
    path = solpath.search(model, text_only(model), config, progress=False)
    check_whole(model, path, "vision_tower", tmp_path)


@pytest.mark.parametrize("name", sorted(baselines.METHODS))
def test_a_baseline_knows_too(name, tmp_path):
    model = build("gemma3")
    released = {"steps": 3, "loss": size_of_output}
    options = {"released": released, "iterative": {"stages": 2}}.get(name, {})
    path = baselines.METHODS[name](model, text_only(model), **options)
    check_whole(model, path, "vision_tower", tmp_path)


@pytest.mark.parametrize("label", ["bert", "gpt2", "qwen3", "llama"])
def test_an_attention_over_one_token_says_nothing(label, tmp_path):
    """Its softmax is 1 whatever queries and keys are, so these stay whole."""
    model = build(label)
    one = [{"input_ids": b["input_ids"][:, :1]} for b in batches(model, 4)]
    path = solpath.search(model, one, CONFIGS[0], progress=False)
    assert set(path.unreached) == names(model, ".qk")
    small = solpath.extract(model, path.plan(sparsity=0.6))
    with torch.no_grad(), solpath.masked(model, path.plan(sparsity=0.6)):
        masked = forward(model, inputs(model))
    assert (masked - forward(small, inputs(model))).abs().max() <= 1e-5 * masked.abs().max()


def test_a_search_goes_on_with_what_was_reached(tmp_path, monkeypatch):
    model = build("gemma3")
    data = text_only(model)
    expected = solpath.search(model, data, CONFIGS[1], progress=False)
    options = {"checkpoint": tmp_path, "progress": False}
    with monkeypatch.context() as patch:
        record, calls = searching._record, []

        def interrupted(*args):
            calls.append(args)
            if len(calls) == 3:
                raise KeyboardInterrupt
            return record(*args)

        patch.setattr(searching, "_record", interrupted)
        with pytest.raises(KeyboardInterrupt):
            solpath.search(model, data, CONFIGS[1], **options)
    path = solpath.search(model, data, CONFIGS[1], **options)
    assert path.unreached == expected.unreached
    assert torch.equal(path.order(), expected.order())


def test_a_table_of_latencies_fits_a_path_with_whole_pairs():
    model = build("gemma3")
    table = solpath.measure_latency(model, inputs(model), repeats=1)
    path = solpath.search(model, text_only(model), CONFIGS[0], progress=False)
    assert path.plan(latency_ms=1.0 * table.dense_ms, latency=table).latency_ms["predicted"] > 0


@pytest.mark.parametrize("name", ["search", "gauss_newton", "taylor", "iterative"])
def test_nothing_reached_is_an_error(bert, name):
    """A loss that does not depend on the model gives no order."""

    def loss(outputs, batch):
        return outputs.last_hidden_state.sum() * 0 + 1

    run = {"search": solpath.search, **baselines.METHODS}[name]
    options = {"progress": False} if name == "search" else {}
    with pytest.raises(BatchError, match="they give no order; pass inputs that reach the layers"):
        run(bert, batches(bert), loss=loss, **options)
