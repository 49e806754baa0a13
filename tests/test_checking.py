"""Tables from outside are checked; ours read all settings that transformers read."""

import ast
import inspect
import textwrap
from collections import defaultdict

import pytest
import torch
import transformers
from torch import nn

import solpath
from conftest import CASES, SIZES, TEXT, batches, build, inputs, randomise_
from plans import random_plan
from solpath.arch import Mlp, Stack, lookup, register
from solpath.arch.llama import stacks
from solpath.arch.table import _REGISTERED
from solpath.errors import UnsupportedModelError
from solpath.model import checking
from solpath.model.discovery import survey
from solpath.nn.rotary import rotary
from solpath.running.forward import forward


@pytest.fixture(autouse=True)
def _own_registry(monkeypatch):
    """Nothing that a test registers, or finds right, is known after it."""
    monkeypatch.setattr(checking, "_CHECKED", set())
    known = dict(_REGISTERED)
    yield
    _REGISTERED.clear()
    _REGISTERED.update(known)


def olmo2() -> nn.Module:
    """It norms all heads of a query at once."""
    config = transformers.Olmo2Config(**SIZES | TEXT | {"num_key_value_heads": 2})
    return randomise_(transformers.Olmo2ForCausalLM(config).eval())


WRONG = ["cohere", "cohere2", "ernie4_5", "gemma2", "gemma3_text", "helium", "mistral", "olmo2"]
WRONG += ["ministral3", "qwen3", "smollm3"]


@pytest.mark.parametrize("label", WRONG)
def test_llamas_table_is_refused_where_it_is_wrong(label):
    model = olmo2() if label == "olmo2" else build(label)
    register(label, *lookup("llama"))
    wrong = (
        rf"table of model_type '{label}' is wrong for model\.layers\.\d\.attention\.qk \(\w+Layer\)"
    )
    with pytest.raises(UnsupportedModelError, match=wrong):
        solpath.extract(model, random_plan(model, (0.5,)))
    with pytest.raises(UnsupportedModelError, match=wrong):
        solpath.search(model, batches(model), solpath.SearchConfig(steps=2), progress=False)


@pytest.mark.parametrize(
    ("label", "fault", "said"),
    [
        (
            "gemma2",
            {"attn_logit_softcapping": 50.0},
            "softcap = None, and the model's own with 5",
        ),
        ("mistral", {}, "sliding_window = None, and the model's own with 4"),
        ("cohere", {}, r"differ by 0\.\d+ of the largest value"),
    ],
)
def test_the_error_says_what_differs(label, fault, said):
    model = build(label, **fault)
    for parameter in model.parameters():  # so small that no bound of the logits shows
        nn.init.normal_(parameter, std=1e-3)
    register(label, *stacks())
    with pytest.raises(UnsupportedModelError, match=said):
        solpath.extract(model, random_plan(model, (0.5,)))


def test_a_forward_that_cannot_run_with_the_cut_widths_is_refused():
    model = build("llama")
    register("llama", *stacks(forward=None))
    with pytest.raises(UnsupportedModelError, match="cut to half, it cannot run"):
        solpath.extract(model, random_plan(model, (0.5,)))


@pytest.mark.parametrize("label", ["llama", "qwen3", "t5", "vit", "clip", "gemma3", "bert"])
def test_a_right_alias_passes_once_and_leaves_everything_as_it_was(label, monkeypatch):
    model = build(label).to(torch.bfloat16).train()
    plan, batch = random_plan(model, (0.5,)), inputs(model)
    register("alias", *lookup(model.config.model_type))
    monkeypatch.setattr(model.config, "model_type", "alias", raising=False)
    type(model.config).model_type, before = "alias", type(model.config).model_type
    try:
        weights = {name: value.clone() for name, value in model.state_dict().items()}
        state = torch.get_rng_state()
        if label == "gemma3":  # made-up tokens hold no image
            with pytest.raises(UnsupportedModelError, match=r"vision_tower.*solpath\.check_table"):
                solpath.extract(model, plan)
            solpath.check_table(model, batch)
        solpath.extract(model, plan)
        assert torch.equal(torch.get_rng_state(), state)
        assert all(torch.equal(v, weights[name]) for name, v in model.state_dict().items())
        assert all(module.training for module in model.modules())
        monkeypatch.setattr(checking, "_compare", None)
        solpath.extract(model, plan)
    finally:
        type(model.config).model_type = before


def test_a_forward_that_forgets_the_cache_is_refused():
    remembering = rotary("config.sliding_window")

    def forgetting(self, *args, cache=None, **kwargs):
        return remembering(self, *args, **kwargs)

    register("mistral", *stacks(forward=forgetting))
    model = build("mistral")
    with pytest.raises(UnsupportedModelError, match=r"leaves 0 tokens in the cache, .* own 12"):
        solpath.extract(model, random_plan(model, (0.5,)))


def test_other_settings_and_other_tables_are_checked_anew():
    register("llama", *stacks(forward=rotary("sliding_window", project=None)))
    model = build("llama")
    with pytest.raises(UnsupportedModelError):
        solpath.extract(model, random_plan(model, (0.5,)))
    register("llama", *lookup("mistral"))
    model = build("llama", sliding_window=None)
    solpath.extract(model, random_plan(model, (0.5,)))
    assert len(checking._CHECKED) == 1  # two blocks of one kind
    model = build("llama", sliding_window=None, hidden_act="gelu")
    solpath.extract(model, random_plan(model, (0.5,)))
    assert len(checking._CHECKED) == 2


def test_blocks_that_the_plan_leaves_whole_are_not_checked():
    model = build("cohere")
    register("cohere", *lookup("llama"))
    solpath.extract(model, random_plan(model, (1.0,)))
    register(
        "cohere", Stack("layers", (), (Mlp(("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj"),))
    )
    solpath.extract(model, random_plan(model, (0.5,)))


# What attentions of transformers read about the sizes of their heads: cut ones have others. And
# the index of a block, which only caches ask for.
SIZE = {"head_dim", "attention_head_size", "all_head_size", "key_value_proj_dim", "embed_dim"}
SIZE |= {"head_size", "hidden_size", "split_size", "rotary_ndims", "layer_idx"}
# What has no say in the result, by class, and why.
IDLE = {
    "BloomAttention": {"beta", "pretraining_tp"},  # 1 always; for `slow_but_exact` only
    "CohereAttention": {"use_qk_norm"},  # then there is `q_norm`
    "DisentangledSelfAttention": {"share_att_key"},
    "FalconAttention": {"attention_dropout", "training", "multi_query"},  # with alibi only
    "GPT2Attention": {"q_attn", "reorder_and_upcast_attn"},  # of cross attentions; same product
    "LayoutLMSelfAttention": {"attention_dropout"},  # that of `dropout`
    "MT5Attention": {"gradient_checkpointing"},
    "MultiheadAttention": {  # as SigLIP builds it
        "_qkv_same_embed_dim", "add_zero_attn", "batch_first", "bias_k", "bias_v", "dropout",
        "training", "q_proj_weight", "k_proj_weight", "v_proj_weight",
    },
    "PhiAttention": {"qk_layernorm"},  # then there is `q_layernorm`
    "T5Attention": {"gradient_checkpointing"},
}  # fmt: skip


def test_every_setting_that_an_attention_reads_is_read_once_it_is_cut():
    """A new version of transformers that reads a new setting fails here, not silently."""
    read, known = defaultdict(set), {}
    for label in CASES:
        model = build(label)
        small = solpath.extract(model, random_plan(model, (0.5,)))
        for site in survey(model)[1]:
            stock = type(model.get_submodule(site.path))
            known[stock] = {*site.table.identity, *site.table.unset}
            _watch_(small.get_submodule(site.path), read[stock])
        forward(small.train(), inputs(model))
    left = {}
    for stock, names in read.items():
        ignored = _reads(stock) - names - known[stock] - SIZE - IDLE.get(stock.__name__, set())
        if ignored:
            left[stock.__name__] = ignored
    assert not left


def _reads(stock: type) -> set[str]:
    """Names of all attributes that `forward`, and what it calls on the module, may read."""
    found, left = set(), ["forward"]
    while left:
        name = left.pop()
        code = textwrap.dedent(inspect.getsource(inspect.unwrap(getattr(stock, name))))
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) in (
                "self",
                "self.config",
            ):
                read = ast.unparse(node).removeprefix("self.")
                method = callable(getattr(stock, read, None))
                if method and read not in found:
                    left.append(read)
                found.add(read)
    return {name for name in found if name != "config" and not callable(getattr(stock, name, None))}


def _read(node: ast.AST) -> str:
    """Name of what an expression reads of `self` or of `self.config`, by a dot or by `getattr`."""
    owner, name = "", ""
    if isinstance(node, ast.Attribute):
        owner, name = ast.unparse(node.value), node.attr
    elif isinstance(node, ast.Call) and ast.unparse(node.func) == "getattr":
        owner, name = ast.unparse(node.args[0]), ast.literal_eval(node.args[1])
    return {"self": name, "self.config": f"config.{name}"}.get(owner, "")


def _watch_(attention: nn.Module, read: set[str]) -> None:
    """Let a cut attention note the names of the attributes that it reads."""

    class Config:
        def __init__(self, config):
            self.inner = config

        def __getattr__(self, name):
            read.add(f"config.{name}")
            return getattr(self.inner, name)

    def get(self, name):
        read.add(name)
        return nn.Module.__getattribute__(self, name)

    slim = type(attention)
    fields = {"forward": slim.forward, "__getattribute__": get}
    attention.__class__ = type("Slim", (slim.__mro__[1],), fields)
    if "config" in vars(attention):
        attention.config = Config(attention.config)


@pytest.mark.parametrize("train", [False, True])
def test_every_known_table_passes_the_check(train, monkeypatch):
    """It compares the settings of attention functions too, with dropout in training."""
    if train:
        monkeypatch.setattr(checking, "_BOUND", float("inf"))
        monkeypatch.setattr(nn.Module, "eval", nn.Module.train)
    for label in CASES:
        model = build(label)
        solpath.check_table(model, inputs(model))
