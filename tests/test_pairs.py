"""Finding pairs, their layout and their cost; and how an architecture is added."""

import copy
import re
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
import transformers
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from torch import nn
from torch.nn import utils
from torch.nn.utils import prune
from transformers.models.bert.modeling_bert import BertSelfAttention
from transformers.pytorch_utils import Conv1D

from conftest import CASES, TIMM_CASES, build, inputs
from solpath.arch import known_model_types, lookup, register
from solpath.arch.table import _REGISTERED, REFUSED
from solpath.errors import UnsupportedModelError
from solpath.model.counting import count_costs
from solpath.model.discovery import find_pairs
from solpath.model.linear import linear_map
from solpath.model.slicing import cut_linear, resize_
from solpath.pair import Pair, Side

# Layers that stay whole: docs/your-model-and-data.md says why. Or that are no part of a sublayer.
WHOLE = {
    "deberta-v2": r"(query|key)_proj$",
    "olmo2": r"\.[qk]_proj$",
    "olmo3": r"\.[qk]_proj$",
    "qwen2_moe": r"\.shared_expert_gate$",
    "swinv2": r"\.(query|key|continuous_position_bias_mlp\.\d)$",
    "wavlm": r"\.attention\.\w+$",
}


def test_every_known_type_has_a_case():
    assert {label.split()[0] for label in CASES | TIMM_CASES} == set(known_model_types())


def test_every_linear_layer_of_the_blocks_is_in_a_pair(model):
    pairs = find_pairs(model)
    sides = {side.module for pair in pairs for side in pair.sides}
    blocks = tuple(p.name.removesuffix("mlp") for p in pairs if p.kind == "mlp")
    for name, module in model.named_modules():
        if name.startswith(blocks) and isinstance(module, nn.Linear | Conv1D):
            whole = re.search(WHOLE.get(model.config.model_type, "^$"), name)
            assert (name in sides) is not bool(whole), name
    assert len({pair.name for pair in pairs}) == len(pairs)


@pytest.mark.parametrize("label", ["bert", "llama", "llama 1:6", "t5", "swin", "clip", "gpt2"])
def test_heads_and_widths(label):
    expected = {
        "bert": [("qk", 4, 8), ("vo", 4, 8), ("mlp", 1, 48)] * 2,
        "llama": [("qk", 2, 4), ("vo", 2, 8), ("mlp", 1, 48)] * 2,
        "llama 1:6": [("qk", 1, 5), ("vo", 1, 10), ("mlp", 1, 37)],
        "t5": [("qk", 3, 5), ("vo", 3, 5), ("mlp", 1, 43)] * 2
        + [("qk", 3, 5), ("vo", 3, 5), ("qk", 3, 5), ("vo", 3, 5), ("mlp", 1, 43)] * 2,
        "swin": [("qk", 2, 6), ("vo", 2, 6), ("mlp", 1, 20)] * 2
        + [("qk", 3, 8), ("vo", 3, 8), ("mlp", 1, 40)],
        "clip": [("qk", 6, 6), ("vo", 6, 6), ("mlp", 1, 43)] * 4,
        "gpt2": [("qk", 4, 9), ("vo", 4, 9), ("mlp", 1, 43)] * 2,
    }
    found = [(pair.kind, pair.heads, pair.width) for pair in find_pairs(build(label))]
    assert found == expected[label]


def test_units_account_for_every_parameter_but_the_outer_biases(model):
    """Cutting all units leaves exactly the biases of the layers whose inputs were cut."""
    pairs = find_pairs(model)
    sides = [side for pair in pairs for side in pair.sides]
    layers = {side.module: linear_map(model, side.module).parameters() for side in sides}
    inside = sum(p.numel() for layer in layers.values() for p in layer.values())
    outer = [layers[side.module].get("bias") for side in sides if side.axis == 1]
    inside -= sum(bias.numel() for bias in outer if bias is not None)
    assert sum(pair.units * pair.cost for pair in pairs) == inside


def test_channels_of_units_partition_every_layer(model):
    rows = defaultdict(list)
    for pair in find_pairs(model):
        everything = torch.arange(pair.width).expand(pair.heads, -1)
        for side in pair.sides:
            index = pair.channel_index(side, everything).tolist()
            rows[side.module, side.axis] += index
            owner = pair.unit_of_channel(side)
            number = min(2, pair.width - 1)
            one = torch.full((pair.heads, 1), number)
            chosen = torch.isin(pair.channels_of(side), pair.channel_index(side, one))
            units = torch.arange(pair.heads) * pair.width + number
            assert set(owner[chosen].tolist()) == set(units.tolist())
            chosen = owner[chosen]
            assert len(chosen) == int(torch.isin(owner, units).sum())
    for (path, axis), index in rows.items():
        linear = linear_map(model, path)
        size = linear.out_features if axis == 0 else linear.in_features
        assert sorted(index) == list(range(size))


def test_rotary_couples_are_half_a_head_apart():
    qk = find_pairs(build("llama"))[0]
    assert qk.channel_index(qk.left[0], torch.tensor([[1], [3]])).tolist() == [
        1, 5, 9, 13, 16 + 3, 16 + 7, 24 + 3, 24 + 7,
    ]  # fmt: skip


def test_gate_and_up_in_one_layer_are_its_halves():
    mlp = find_pairs(build("modernbert"))[2]
    assert mlp.left == (Side(mlp.left[0].module, 0), Side(mlp.left[0].module, 0, 1, mlp.width))


def test_a_layer_that_runs_many_times_is_one_pair_and_costs_its_runs():
    once, thrice = (build("albert inner", num_hidden_layers=n) for n in (1, 3))
    pairs = find_pairs(thrice)
    assert pairs == find_pairs(once)
    one, three = (count_costs(m, pairs, inputs(m, samples=1)) for m in (once, thrice))
    assert one.unit["params"] == three.unit["params"]
    for pair in pairs:
        assert three.unit["macs"][pair.name] == 3 * one.unit["macs"][pair.name]


def test_heads_that_rotate_in_part_are_two_pairs():
    """Of 9 channels, 4 are two couples half of the four apart, and 5 are units of their own."""
    couples, others, values, _ = find_pairs(build("gpt_neox"))[:4]
    assert [(p.kind, p.channels, p.width) for p in (couples, others, values)] == [
        ("qk", 2, 2), ("qk", 1, 5), ("vo", 1, 9),
    ]  # fmt: skip
    one = torch.tensor([[1]]).repeat(4, 1)
    # Each of the four heads has its query, its key and its value side by side.
    assert couples.channel_index(couples.right, one).tolist()[:4] == [9 + 1, 9 + 3, 36 + 1, 36 + 3]
    assert others.channel_index(others.left[0], one).tolist()[:2] == [4 + 1, 27 + 4 + 1]
    assert values.channel_index(values.left[0], one).tolist()[:2] == [18 + 1, 27 + 18 + 1]


def test_channels_of_an_interleaved_couple_are_neighbours():
    qk = find_pairs(build("cohere"))[0]
    assert qk.channel_index(qk.right, torch.tensor([[1], [3]])).tolist() == [2, 3, 8 + 6, 8 + 7]


@pytest.mark.parametrize(
    ("label", "changes", "message"),
    [
        ("bloom", {"slow_but_exact": True}, "slow_but_exact = True"),
        ("cohere", {"use_qk_norm": True}, "q_norm is a CohereLayerNorm"),
        ("falcon", {"alibi": True}, "config.alibi = True"),
        ("falcon", {"new_decoder_architecture": True}, "new_decoder_architecture = True"),
        ("olmo", {"clip_qkv": 8.0}, "config.clip_qkv = 8.0"),
        ("phi", {"qk_layernorm": True}, "q_layernorm is a LayerNorm"),
    ],
)
def test_settings_that_cutting_would_change_are_refused_by_name(label, changes, message):
    with pytest.raises(UnsupportedModelError, match=message):
        find_pairs(build(label, **changes))


@pytest.mark.parametrize("model_type", REFUSED)
def test_types_that_cannot_be_pruned_say_why(model_type):
    with pytest.raises(UnsupportedModelError, match=f"'{model_type}' cannot be pruned: (it|one)"):
        lookup(model_type)
    assert model_type not in known_model_types()


def test_experts_are_heads_of_one_pair_beside_the_expert_that_all_tokens_share():
    model = build("qwen2_moe")
    found = [(pair.kind, pair.heads, pair.width) for pair in find_pairs(model)]
    attention = [("qk", 2, 4), ("vo", 2, 8)]
    experts = [("mlp", 1, 21), ("experts", 4, 8)]
    assert found == [*attention, *experts, *attention, ("mlp", 1, 48)]
    assert [pair.kind for pair in find_pairs(build("mixtral"))] == ["qk", "vo", "experts"] * 2
    del model.model.layers[1].mlp.gate_proj
    with pytest.raises(UnsupportedModelError, match=r"layers\.1 has 0 MLPs"):
        find_pairs(model)


def test_couples_need_heads_of_an_even_width():
    with pytest.raises(UnsupportedModelError, match="odd width"):
        find_pairs(build("esm absolute", hidden_size=30))


def test_block_sparse_attention_is_refused_by_name():
    with pytest.raises(UnsupportedModelError, match="is a BigBirdBlockSparseAttention, not a"):
        find_pairs(build("big_bird", attention_type="block_sparse"))


def test_macs_of_the_dense_model_fall_by_the_cost_of_units(model):
    costs = count_costs(model, find_pairs(model), inputs(model, samples=1))
    inner = sum(p.units * costs.unit["macs"][p.name] for p in find_pairs(model))
    assert 0 < inner <= costs.dense["macs"]
    assert costs.dense["params"] == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("kind", ["linear", "without bias", "conv1d"])
def test_cut_linear(axis, kind):
    layer = Conv1D(6, 5) if kind == "conv1d" else nn.Linear(5, 6, bias=kind == "linear")
    layer = layer.double().requires_grad_(False)
    x = torch.randn(2, 5, dtype=torch.float64)
    for index in (torch.tensor([3, 0]), torch.tensor([], dtype=torch.int64)):
        memo = cut_linear(linear_map(nn.ModuleDict({"layer": layer}), "layer"), index, axis)
        small = copy.deepcopy(layer, memo)
        resize_(small)
        if axis == 0:
            torch.testing.assert_close(small(x), layer(x)[:, index])
        else:
            zeroed = torch.zeros_like(x).index_copy(1, index, x[:, index])
            torch.testing.assert_close(small(x[:, index]), layer(zeroed))
        assert small.weight.dtype == torch.float64
        assert not small.weight.requires_grad


def test_registering_a_type_is_enough_to_prune_it():
    """A BERT under another name; docs/adding-an-architecture.md writes a whole table."""
    model = build("bert")
    stacks = lookup("bert")
    model.config.model_type = "toy"
    try:
        register("toy", *stacks)
        assert len(find_pairs(model)) == 6
        assert "toy" in known_model_types()
    finally:
        del _REGISTERED["toy"]


@pytest.mark.parametrize("name", ["ViTMAE", "VideoMAE"])
def test_classes_whose_logits_are_no_classes_are_refused(name):
    config = getattr(transformers, f"{name}Config")(image_size=8, patch_size=4, hidden_size=12)
    with torch.device("meta"):
        model = getattr(transformers, f"{name}ForPreTraining")(config)
    with pytest.raises(UnsupportedModelError, match=f"pixels.*{name}Model"):
        find_pairs(model)


INNER = "encoder.layer.0.intermediate.dense"


class Scaled(nn.Module):
    def forward(self, weight):
        return 1.5 * weight


class OtherConv1D(Conv1D):
    def forward(self, x):
        return 2 * super().forward(x)


class OtherAttention(BertSelfAttention):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


def _own_forward(module):
    module.forward = lambda x: 2 * type(module).forward(module, x)


# What people put on a layer, and how the error says to take it off; None if it cannot be.
PUT_ON = {
    "prune": (lambda m: prune.l1_unstructured(m, "weight", 0.3), "prune.remove(layer, 'weight')"),
    "prune bias": (lambda m: prune.random_unstructured(m, "bias", 0.3), "remove(layer, 'bias')"),
    "prune twice": (
        lambda m: [prune.l1_unstructured(m, "weight", 0.3) for _ in range(2)],
        "prune.remove(layer, 'weight')",
    ),
    "weight_norm": (utils.weight_norm, "torch.nn.utils.remove_weight_norm(layer, 'weight')"),
    "spectral_norm": (utils.spectral_norm, "utils.remove_spectral_norm(layer, 'weight')"),
    "new weight_norm": (
        utils.parametrizations.weight_norm,
        "remove_parametrizations(layer, 'weight')",
    ),
    "new spectral_norm": (
        utils.parametrizations.spectral_norm,
        "remove_parametrizations(layer, 'weight')",
    ),
    "parametrize": (
        lambda m: utils.parametrize.register_parametrization(m, "bias", Scaled()),
        "remove_parametrizations(layer, 'bias')",
    ),
    "hook": (lambda m: m.register_forward_hook(lambda *args: None), "remove it first"),
    "pre-hook": (lambda m: m.register_forward_pre_hook(lambda *args: None), "remove it first"),
    "forward": (_own_forward, "del module.forward first"),
}


@pytest.mark.parametrize("layer", [INNER, "encoder.layer.1.output.dense"])
@pytest.mark.parametrize("name", PUT_ON)
def test_what_is_put_on_a_layer_is_refused_and_the_way_out_works(name, layer):
    model, (put_on, way_out) = build("bert"), PUT_ON[name]
    module = model.get_submodule(layer)
    handle = put_on(module)
    with pytest.raises(UnsupportedModelError, match=re.escape(layer)) as caught:
        find_pairs(model)
    assert way_out in str(caught.value)
    call = re.search(r"call (torch\.nn\.utils\.\S+\(layer, '\w+'\))", str(caught.value))
    if call:
        assert call[1].startswith("torch.nn.utils.")
        eval(call[1], {"torch": torch, "layer": module})  # noqa: S307
    elif name == "forward":
        del module.forward
    else:
        handle.remove()
    assert len(find_pairs(model)) == 6


def test_a_hook_between_the_layers_of_an_mlp_is_refused():
    model = build("bert")
    path = "encoder.layer.0.intermediate.intermediate_act_fn"
    handle = model.get_submodule(path).register_forward_hook(lambda *args: None)
    with pytest.raises(UnsupportedModelError, match=f"{path} has a hook .*<lambda>.*remove it"):
        find_pairs(model)
    handle.remove()
    model.encoder.layer[0].register_forward_hook(lambda *args: None)  # it sees no inner dimension
    assert len(find_pairs(model)) == 6


def test_subclasses_with_another_forward_are_refused():
    gpt = build("gpt2")
    gpt.transformer.h[0].mlp.c_fc.__class__ = OtherConv1D
    with pytest.raises(UnsupportedModelError, match=r"mlp\.c_fc is a test_pairs\.OtherConv1D"):
        find_pairs(gpt)
    bert = build("bert")
    attention = bert.encoder.layer[0].attention.self
    attention.__class__ = OtherAttention
    with pytest.raises(UnsupportedModelError, match="OtherAttention with another forward than Ber"):
        find_pairs(bert)
    attention.__class__ = BertSelfAttention
    attention.forward = attention.forward  # which a cut leaves out
    assert len(find_pairs(bert)) == 6
    attention.forward = bert.forward
    with pytest.raises(UnsupportedModelError, match=r"attention\.self has a forward of its own"):
        find_pairs(bert)
    del attention.forward
    attention.__class__ = type(
        "JinaSelfAttention", (nn.Module,), {"forward": OtherAttention.forward}
    )
    with pytest.raises(
        UnsupportedModelError, match="JinaSelfAttention, not a class of transformers"
    ):
        find_pairs(bert)
    for path in (INNER, "encoder.layer.0.attention.self"):
        bert = build("bert")
        add_hook_to_module(bert.get_submodule(path), ModelHook())
        with pytest.raises(UnsupportedModelError, match=rf"{path} has .*remove_hook_from_sub"):
            find_pairs(bert)
        remove_hook_from_module(bert, recurse=True)
        assert len(find_pairs(bert)) == 6
    peft = pytest.importorskip("peft")
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["value"]), bert := build("bert"))
    with pytest.raises(UnsupportedModelError, match=r"value is a peft.*merge adapters first"):
        find_pairs(bert)


def test_weights_of_another_class_are_refused():
    class Quantised(torch.Tensor):
        pass

    model = build("bert")
    weight = model.get_submodule(INNER).weight
    model.get_submodule(INNER).weight = nn.Parameter(weight.detach().as_subclass(Quantised))
    with pytest.raises(UnsupportedModelError, match=rf"{INNER}\.weight is a Quantised"):
        find_pairs(model)
    whole = nn.Parameter(weight.detach().to(torch.int8), requires_grad=False)
    model.get_submodule(INNER).weight = whole
    with pytest.raises(UnsupportedModelError, match=r"of torch\.int8.*before quantising"):
        find_pairs(model)


@pytest.mark.parametrize("method", ["torchao", "bitsandbytes", "fp8"])
def test_packed_weights_are_refused_wherever_they_are(method):
    """Layers that no cut touches, too: no gradient passes them, or they cannot be saved."""

    class AffineQuantizedTensor(torch.Tensor):  # says that it is of floats
        pass

    model = build("llama")
    weight = model.lm_head.weight.detach()
    model.lm_head.weight = {
        "torchao": lambda: nn.Parameter(weight.as_subclass(AffineQuantizedTensor)),
        "bitsandbytes": lambda: nn.Parameter(weight.to(torch.int8), requires_grad=False),
        "fp8": lambda: nn.Parameter(weight.to(torch.float8_e4m3fn), requires_grad=False),
    }[method]()
    with pytest.raises(UnsupportedModelError, match=r"lm_head\.weight is a .*not a plain"):
        find_pairs(model)
    model.config.quantization_config = SimpleNamespace(quant_method=method)
    with pytest.raises(UnsupportedModelError, match=rf"quantised by {method}.*dequantize\(\)"):
        find_pairs(model)


def test_tied_layers_are_refused():
    model = build("bert")
    model.encoder.layer[1].intermediate.dense.weight = model.get_submodule(INNER).weight
    with pytest.raises(UnsupportedModelError, match="is shared with another module"):
        find_pairs(model)
    model = build("bert")  # two parameters on one memory: the copy is cut, and memory is not shared
    other = nn.Parameter(model.get_submodule(INNER).weight.data)
    model.encoder.layer[1].intermediate.dense.weight = other
    assert len(find_pairs(model)) == 6


@pytest.mark.parametrize("label", ["llava", "clip", "gpt2", "siglip"])
def test_hooks_that_transformers_leaves_are_let_be(label):
    model = build(label)
    with torch.no_grad():
        model(**inputs(model), output_hidden_states=True, output_attentions=True)
    assert find_pairs(model) == find_pairs(build(label))


def test_pairs_survive_json():
    pair = Pair("a", "qk", 2, 3, (Side("q", 0, 2),), Side("k", 0), 10, 2)
    assert Pair.from_dict(pair.to_dict()) == pair
