"""A masked model and its extracted model are the same function, for every architecture."""

import copy
from collections import defaultdict
from dataclasses import replace

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_submodules
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import solpath
from conftest import CASES, batches, build, inputs
from plans import both, plan_of, random_plan
from solpath.errors import UnsupportedModelError
from solpath.model.counting import count_costs
from solpath.model.discovery import find_pairs
from solpath.model.fingerprint import fingerprint
from solpath.model.linear import linear_map
from solpath.model.slicing import cut_linear
from solpath.planning.plan import Plan
from solpath.running.forward import forward, run

FRACTIONS = [
    (0.5,),
    (0.25, 0.75),
    (0.0, 0.5, 1.0),
    (1.0, 0.0, 0.4),
    (0.6, 1.0, 0.0),
    (0.0,),
    (0.1,),
]


@pytest.mark.parametrize("fractions", FRACTIONS)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_masked_equals_extracted(model, fractions, attention):
    if attention == "sdpa" and not model._supports_sdpa:
        pytest.skip("transformers has no such kernel for this family")
    model.set_attn_implementation(attention)
    plan = random_plan(model, fractions)
    for dtype, bound in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        # LLaMA and BERT upcast some sums to float32 themselves, in both models alike.
        masked, small = both(model.to(dtype), with_fingerprint(plan, model), inputs(model))
        assert (masked - small).abs().max() <= bound * masked.abs().max()


def with_fingerprint(plan: Plan, model) -> Plan:
    """The plan for the same model in another precision."""
    return replace(plan, fingerprint=fingerprint(model, plan.pairs))


@settings(max_examples=25, deadline=None)
@given(
    label=st.sampled_from(sorted(CASES)),
    fractions=st.lists(st.floats(0, 1), min_size=1, max_size=6),
    seed=st.integers(0, 1000),
)
def test_masked_equals_extracted_for_any_widths(label, fractions, seed):
    model = build(label, seed=seed % 7).double()
    masked, small = both(model, random_plan(model, fractions, seed), inputs(model, seed=seed))
    assert (masked - small).abs().max() <= 1e-12 * masked.abs().max()


def test_removing_units_changes_the_output(model):
    """The comparison above could not fail if masks did nothing."""
    masked, _ = both(model, random_plan(model, (0.5,)), inputs(model))
    with torch.no_grad():
        dense = forward(model, inputs(model))
    assert (masked - dense).abs().max() > 1e-2 * dense.abs().max()


def test_nothing_removed_is_bit_identical(model):
    before = copy.deepcopy(model.state_dict())
    small = solpath.extract(model, random_plan(model, (1.0,)))
    for name, value in small.state_dict().items():
        assert torch.equal(value, before[name])
    with torch.no_grad():
        assert torch.equal(forward(small, inputs(model)), forward(model, inputs(model)))


def test_the_model_shares_nothing_with_its_extract(model):
    small = solpath.extract(model, random_plan(model, (0.5,)))
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        for parameter in small.parameters():
            parameter.zero_()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_cost_of_a_plan_is_what_extraction_counts(model):
    for fractions in FRACTIONS:
        plan = random_plan(model, fractions)
        small = solpath.extract(model, plan)
        assert sum(p.numel() for p in small.parameters()) == plan.achieved.params
        assert saved_bytes(small) == plan.achieved.bytes
    # Unequal widths of query-key and value-output are padded to equal ones, so compare equal ones.
    pairs = find_pairs(model)
    whole = all(pair.kind != "qk" for pair in pairs)
    widths, channels = [], next((p.width for p in pairs if whole and p.kind == "vo"), 0)
    for pair in pairs:
        widths.append(channels if pair.kind == "vo" else pair.width // 2)
        if not whole:
            channels = channels + widths[-1] * pair.channels if pair.kind == "qk" else 0
    plan = plan_of(model, widths)
    small = solpath.extract(model, plan)
    counted = count_costs(small, (), inputs(model, samples=1)).dense["macs"]
    assert counted == plan.achieved.macs


def saved_bytes(model):
    """Bytes of tensor data in a file with everything that is saved, tied tensors once."""
    distinct = {t.data_ptr() if t.numel() else name: t for name, t in model.state_dict().items()}
    return sum(tensor.nbytes for tensor in distinct.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_bytes_are_those_of_the_dtype(dtype):
    model = build("llama").to(dtype)
    plan = random_plan(model, (0.25, 0.75))
    assert saved_bytes(solpath.extract(model, plan)) == plan.achieved.bytes
    assert plan.achieved.bytes == dtype.itemsize * plan.achieved.params


def test_gradients_flow_as_in_the_masked_model(model):
    model = model.double()
    plan = random_plan(model, (0.4, 0.7))
    small = solpath.extract(model, plan)
    forward(small, inputs(model)).square().sum().backward()
    with solpath.masked(model, plan):
        forward(model, inputs(model)).square().sum().backward()
    # ERNIE rotates in float32, and rounds each part of a gradient.
    bound = 1e-6 if model.config.model_type == "ernie4_5" else 1e-9
    rows = defaultdict(list)
    for pair in plan.pairs:
        for side in pair.sides:
            rows[side.module, side.axis].append(pair.channel_index(side, plan.kept[pair.name]))
    for (path, axis), parts in rows.items():
        index = torch.cat(parts).sort().values
        dense, cut = linear_map(model, path), linear_map(small, path)
        slopes = replace(dense, weight=nn.Parameter(dense.weight.grad), bias=None)
        [expected] = cut_linear(slopes, index, axis).values()
        torch.testing.assert_close(cut.weight.grad, expected, rtol=bound, atol=bound)


def test_output_attentions_and_hidden_states(model):
    model.set_attn_implementation("eager")
    plan = random_plan(model, (0.5, 0.25))
    small = solpath.extract(model, plan)
    options = {"output_attentions": True, "output_hidden_states": True}
    with torch.no_grad():
        dense, cut = (_shapes(run(m, inputs(m) | options, labels=False)) for m in (model, small))
    assert cut == dense
    assert any(len(shape) == 4 and shape[2] == shape[3] for shape in dense), "no attentions"


def _shapes(value) -> list[torch.Size]:
    """Shapes of all tensors in the outputs of a model, nested or not."""
    if isinstance(value, torch.Tensor):
        return [value.shape]
    parts = value.values() if hasattr(value, "values") else value
    return [shape for part in parts or () for shape in _shapes(part)]


def test_autocast_state_dict_and_copies(model):
    small = solpath.extract(model, random_plan(model, (0.5, 0.25)))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        low = forward(small, inputs(model))
    with torch.no_grad():
        full = forward(small, inputs(model))
        other = copy.deepcopy(small)
        other.load_state_dict(small.state_dict())
        assert torch.equal(forward(other, inputs(model)), full)
    assert (low.float() - full).abs().max() <= 0.2 * full.abs().max()
    assert type(small).__name__ == type(model).__name__
    assert small.config.to_dict() == model.config.to_dict()


def test_family_from_a_real_search_is_nested_and_exact(model):
    path = solpath.search(model, batches(model), solpath.SearchConfig(steps=6), progress=False)
    larger = None
    for sparsity in (0.0, 0.2, 0.5, 0.8, 0.95):
        plan = path.plan(sparsity=sparsity)
        masked, small = both(model, plan, inputs(model))
        assert (masked - small).abs().max() <= 1e-5 * masked.abs().max()
        if larger is not None:
            for name, kept in plan.kept.items():
                for row, wide in zip(kept.tolist(), larger.kept[name].tolist(), strict=True):
                    assert set(row) <= set(wide)
        larger = plan


def test_a_forward_that_was_set_on_a_module_is_refused():
    """It would run in place of the new one: four heads of 4 look like two of 8."""
    model = build("llama")
    plan = random_plan(model, (0.5,))
    for module in list(model.modules()):
        add_hook_to_module(module, ModelHook())
    with pytest.raises(UnsupportedModelError, match="self_attn has a hook of accelerate"):
        solpath.extract(model, plan)
    remove_hook_from_submodules(model)
    masked, small = both(model, plan, inputs(model))
    assert (masked - small).abs().max() <= 1e-5 * masked.abs().max()
