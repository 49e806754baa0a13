"""Finding pairs, their layout and their cost; and how an architecture is added."""

import pytest
import torch
from torch import nn

from conftest import CASES, build, inputs
from solpath.arch import known_model_types, lookup, register
from solpath.arch.table import _REGISTERED
from solpath.counting import count_costs
from solpath.discover import find_pairs
from solpath.pair import Pair, Side
from solpath.slicing import slice_linear


def test_every_known_type_has_a_case():
    assert sorted(CASES) == known_model_types()


def test_every_inner_dimension_is_found(model):
    config, pairs = model.config, find_pairs(model)
    assert len(pairs) == 3 * config.num_hidden_layers
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = config.hidden_size // config.num_attention_heads
    couple = 2 if config.model_type == "llama" else 1
    for qk, vo, mlp in zip(pairs[::3], pairs[1::3], pairs[2::3], strict=True):
        assert (qk.kind, qk.heads, qk.width, qk.channels) == ("qk", heads, width // couple, couple)
        assert (vo.kind, vo.heads, vo.width) == ("vo", heads, width)
        assert (mlp.kind, mlp.heads, mlp.width) == ("mlp", 1, config.intermediate_size)
    assert len({pair.name for pair in pairs}) == len(pairs)


def test_units_account_for_every_parameter_but_the_outer_biases(model):
    """Cutting all units leaves exactly the biases of the layers whose columns were cut."""
    for pair in find_pairs(model):
        layers = [model.get_submodule(side.module) for side in pair.sides]
        inside = sum(p.numel() for layer in layers for p in layer.parameters())
        outer = [model.get_submodule(s.module).bias for s in pair.sides if s.axis == 1]
        inside -= sum(b.numel() for b in outer if b is not None)
        assert pair.units * pair.cost == inside


def test_channels_of_units_partition_every_layer(model):
    for pair in find_pairs(model):
        everything = torch.arange(pair.width).expand(pair.heads, -1)
        for side in pair.sides:
            layer = model.get_submodule(side.module)
            size = layer.out_features if side.axis == 0 else layer.in_features
            index = pair.channel_index(side, everything)
            assert index.tolist() == list(range(size))
            owner = pair.unit_of_channel(side)
            one = torch.full((pair.heads, 1), 2)
            chosen = pair.channel_index(side, one)
            units = torch.arange(pair.heads) * pair.width + 2
            assert set(owner[chosen].tolist()) == set(units.tolist())
            assert len(chosen) == int(torch.isin(owner, units).sum())


def test_rotary_couples_are_half_a_head_apart():
    qk = find_pairs(build("llama"))[0]
    assert qk.channel_index(qk.left[0], torch.tensor([[1], [3]])).tolist() == [
        1, 5, 9, 13, 16 + 3, 16 + 7, 24 + 3, 24 + 7,
    ]  # fmt: skip


def test_macs_of_the_dense_model_fall_by_the_cost_of_units(model):
    costs = count_costs(model, find_pairs(model), inputs(model, samples=1))
    inner = sum(p.units * costs.unit_macs[p.name] for p in find_pairs(model))
    assert 0 < inner < costs.macs
    assert costs.params == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("bias", [True, False])
def test_slice_linear(axis, bias):
    layer = nn.Linear(5, 6, bias=bias).double().requires_grad_(False)
    index = torch.tensor([3, 0])
    small = slice_linear(layer, index, axis)
    x = torch.randn(2, 5, dtype=torch.float64)
    if axis == 0:
        torch.testing.assert_close(small(x), layer(x)[:, index])
    else:
        zeroed = torch.zeros_like(x).index_copy(1, index, x[:, index])
        torch.testing.assert_close(small(x[:, index]), layer(zeroed))
    assert small.weight.dtype == torch.float64
    assert not small.weight.requires_grad
    assert slice_linear(layer, index[:0], axis).weight.numel() == 0


def test_registering_a_type_is_enough_to_prune_it():
    """A BERT under another name. docs/how-to.md writes a table from nothing."""
    model = build("bert")
    model.config.model_type = "toy"
    try:
        register("toy", lookup("bert"))
        assert len(find_pairs(model)) == 6
        assert "toy" in known_model_types()
    finally:
        del _REGISTERED["toy"]


def test_pairs_survive_json():
    pair = Pair("a", "qk", 2, 3, (Side("q", 0, 2),), Side("k", 0), 10, 2)
    assert Pair.from_dict(pair.to_dict()) == pair
