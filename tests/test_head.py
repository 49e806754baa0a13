"""Logits of large vocabularies in parts: the same numbers, and never all of them at once."""

import pytest
import torch

import solpath
from conftest import build, inputs
from plans import random_plan
from solpath.errors import BatchError, ConfigError
from solpath.measuring.evaluation import evaluate, reference_outputs
from solpath.model import head
from solpath.running.forward import forward
from solpath.running.memory import peak_memory

# Caps, scales and biases on logits, heads of several layers, other children ahead of the head.
LABELS = ["bart", "cohere", "distilbert", "falcon", "gemma2", "gemma3", "gpt2", "llava", "mpnet"]
LABELS += ["opt", "t5", "t5 gated", "whisper"]


@pytest.fixture
def two_tokens(monkeypatch):
    """All vocabularies are large, and every part has two tokens of four samples."""
    monkeypatch.setattr(head, "LARGE", 0)
    monkeypatch.setattr(head, "_PART", 2 * 4 * 4 * 60)


def pruned(label):
    model = build(label)
    plan = random_plan(model, (0.5, 0.75))
    return model, plan, solpath.extract(model, plan)


@pytest.mark.parametrize("label", LABELS)
def test_parts_are_the_logits(label, two_tokens):
    model = build(label)
    batch = inputs(model)
    with torch.no_grad():
        whole = forward(model, batch)
        lazy = head.logits_in_parts(model, batch)
        inner = [m for m in model.modules() if type(m).__name__.endswith("Attention")]
        hooks = [m.register_forward_hook(lambda *given: pytest.fail("it ran again")) for m in inner]
        spans = list(head.parts(lazy.shape))
        found = torch.cat([lazy.part(*span) for span in spans], 1)
        for hook in hooks:
            hook.remove()
    assert inner
    assert len(spans) > 2
    assert found.shape == whole.shape == lazy.shape
    torch.testing.assert_close(found, whole, rtol=1e-5, atol=1e-5)
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("label", ["gemma2", "t5"])
def test_the_figures_are_those_of_whole_logits(label, monkeypatch, request):
    model, plan, small = pruned(label)
    batches = [inputs(model, seed=i) for i in range(2)]
    whole = evaluate(small, model, batches).metrics
    request.getfixturevalue("two_tokens")
    targets = reference_outputs(model, batches)
    assert all(isinstance(target, head.LazyLogits) for target in targets)
    close = pytest.approx(whole, rel=1e-4)
    assert evaluate(small, model, batches).metrics == close
    assert evaluate(small, targets, batches).metrics == close
    with solpath.masked(model, plan):
        assert evaluate(model, targets, batches).metrics == close
    assert 0 < whole["agreement"] < 1
    assert set(whole) == {"kl", "agreement", "cosine", "relative_error"}


@pytest.mark.parametrize("large", [False, True])
def test_several_models_side_by_side_are_each_alone(large, request):
    if large:
        request.getfixturevalue("two_tokens")
    model, _, small = pruned("llama")
    other = solpath.extract(model, random_plan(model, (0.25, 0.5)))
    batches, calls = [inputs(model, seed=i) for i in range(2)], []
    alone = {name: evaluate(one, model, batches) for name, one in (("a", small), ("b", other))}
    with torch.no_grad():
        count = model.model.layers[0].register_forward_hook(lambda *given: calls.append(given))
        found = evaluate({"a": small, "b": other}, model, batches, task=lambda one: one is small)
        count.remove()
    assert len(calls) == len(batches)  # the dense model runs once a batch
    for name, result in found.items():
        assert result.metrics == alone[name].metrics | {"task": name == "a"}
        assert (result.samples, result.cost) == (8, alone[name].cost)
    with pytest.raises(ConfigError, match="model is empty"):
        evaluate({}, model, batches)
    bad = build("llama")
    bad.model.embed_tokens.weight.data[58] = float("nan")
    batches[1]["input_ids"][2, 0] = 58
    with pytest.raises(BatchError, match="row 2 of batch 1: the output of b has NaN"):
        evaluate({"a": small, "b": bad}, model, batches)


def test_a_head_that_changed_is_refused(two_tokens):
    model, _, small = pruned("llama")
    batches = [inputs(model, seed=i) for i in range(2)]
    targets = reference_outputs(model, batches)
    model.lm_head.weight.data[3] += 1
    with pytest.raises(
        BatchError, match="reference output 0: the head of this LlamaForCausalLM has"
    ):
        evaluate(small, targets, batches)


def test_memory_is_that_of_a_part(monkeypatch):
    """Logits of 16,384 tokens over 262,144 classes would take 17 GB, and their softmax more."""
    model = build("llama", vocab_size=5000)
    batches = [{"input_ids": torch.arange(2 * 32).view(2, 32) + i} for i in range(2)]
    logits = 4 * 2 * 32 * 5000
    monkeypatch.setattr(head, "LARGE", logits)
    monkeypatch.setattr(head, "_PART", logits // 32)

    def work():
        targets = reference_outputs(model, batches)
        evaluate({"a": model, "b": model}, targets, batches)
        evaluate(model, model, batches)

    assert peak_memory(work)[0] < logits / 2


def test_small_outputs_and_others_come_whole(monkeypatch):
    model = build("llama")
    assert head.logits_in_parts(model, inputs(model)) is None
    monkeypatch.setattr(head, "LARGE", 0)
    for label in ("vit", "bert", "siglip"):
        model = build(label)
        assert head.logits_in_parts(model, inputs(model)) is None
