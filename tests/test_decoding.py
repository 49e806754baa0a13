"""What generating costs: equal work for all models, and a cache of the bytes that plans count."""

import itertools
import json

import pytest
import torch
from transformers import GenerationConfig

import solpath
from conftest import build, inputs
from plans import random_plan
from solpath.errors import BatchError, ConfigError, UnsupportedModelError
from solpath.measuring import generation
from solpath.model.discovery import survey

NEW = 5
# Queries and keys, values, MLP: every kind keeps another share of its width.
UNEVEN = (0.6, 0.3, 0.75)
FAMILIES = ["bloom", "falcon", "gemma3_text", "gpt2", "llama", "mistral", "qwen3", "t5", "whisper"]


def prompts(model, samples=2):
    """Prompts without padding."""
    batch = inputs(model, samples=samples)
    if "attention_mask" in batch:
        batch["attention_mask"] = torch.ones_like(batch["attention_mask"])
    return batch


def pruned(label):
    model = build(label)
    plan = random_plan(model, UNEVEN)
    return model, plan, solpath.extract(model, plan)


def counted(model, plan, widths, batch, seen):
    """Bytes of a cache, from the widths that a plan counts with.

    A layer with a window keeps one token less than the window; a cross attention keeps what its
    encoder saw.
    """
    size = next(model.parameters()).element_size()
    kinds = getattr(model.config, "layer_types", None)
    window = getattr(model.config, "sliding_window", None)
    kinds = kinds or ["sliding_attention" if window else "full_attention"] * 9

    def tokens(name):
        layer = next(int(part) for part in name.split(".") if part.isdigit())
        return min(seen, window - 1) if kinds[layer] == "sliding_attention" else seen

    total = sum(
        size * pair.heads * widths[pair.name] * pair.cache * tokens(pair.name)
        for pair in plan.pairs
    )
    total += sum(size * site.keys * tokens(site.vo.name) for site in survey(model)[1])
    crossing = [pair for pair in plan.pairs if "cross_attention" in pair.name]
    assert not any(pair.cache for pair in crossing)
    source = 7 if "input_features" in batch else batch["input_ids"].shape[1]
    total += sum(size * p.heads * widths[p.name] * source for p in crossing)
    return 2 * total  # samples


@pytest.mark.parametrize("label", FAMILIES)
def test_the_cache_has_the_bytes_that_plans_count(label):
    model, plan, small = pruned(label)
    batch = prompts(model)
    found = solpath.measure({"dense": model, "small": small}, batch, repeats=1, generate=NEW)
    dense, cut = found["dense"].generation, found["small"].generation
    assert dense.tokens == cut.tokens == NEW
    assert dense.cache_tokens == cut.cache_tokens == dense.prompt + NEW - 1
    assert dense.prompt == (1 if model.config.is_encoder_decoder else 9)
    whole = {pair.name: pair.width for pair in plan.pairs}
    assert dense.cache_bytes == counted(model, plan, whole, batch, dense.cache_tokens)
    assert cut.cache_bytes == counted(model, plan, plan.widths, batch, dense.cache_tokens)
    assert cut.cache_bytes < dense.cache_bytes
    if not model.config.is_encoder_decoder and not getattr(model.config, "sliding_window", None):
        assert cut.cache_bytes == 2 * cut.cache_tokens * plan.achieved.cache


def test_first_token_and_rate_come_from_the_moments_of_tokens(monkeypatch):
    """On a clock that goes on by one second whenever it is looked at."""
    model, _, small = pruned("llama")
    seconds = itertools.count()
    monkeypatch.setattr(generation, "moment", lambda gpus: float(next(seconds)))
    calls, greedy = [], generation.greedy

    def noted(one, batch, tokens, *, cached=True, watch=()):
        calls.append((one is model, cached))
        return greedy(one, batch, tokens, cached=cached, watch=watch)

    monkeypatch.setattr(generation, "greedy", noted)
    models = {"dense": model, "small": small}
    found = solpath.measure(models, prompts(model), repeats=2, generate=NEW)
    for one in found.values():
        for way in (one.generation.cached, one.generation.uncached):
            assert (way.ttft_ms, way.tokens_per_s) == (1000, 2)  # of two samples
            assert (way.ttft_iqr_ms, way.tokens_per_s_iqr) == (0, 0)
    ways = [(True, True), (True, False), (False, True), (False, False)]
    turns = ways + ways[1:] + ways[:1] + ways[2:] + ways[:2]  # one round warms up
    assert calls == [*turns, (True, True), (False, True)]
    assert json.loads(json.dumps(found["small"].to_dict()))["generation"]["tokens"] == NEW


@pytest.mark.parametrize("label", ["gemma3_text", "t5", "whisper"])
def test_all_models_do_the_same_greedy_work(label):
    """Whatever their own configuration asks for; it comes back."""
    model, plan, small = pruned(label)
    batch = prompts(model)
    model.eval()
    first = generation.greedy(small, batch, NEW).new
    own = GenerationConfig(do_sample=True, num_beams=2, eos_token_id=list(range(60)), max_length=3)
    own.decoder_start_token_id = small.generation_config.decoder_start_token_id
    small.generation_config = own
    again = generation.greedy(small, batch, NEW)
    assert small.generation_config is own
    assert again.new.shape == (2, NEW)
    assert torch.equal(first, again.new)
    uncached = generation.greedy(small, batch, NEW, cached=False)
    assert torch.equal(uncached.new, first)
    assert uncached.cache is None
    with solpath.masked(model, plan):
        assert torch.equal(generation.greedy(model, batch, NEW).new, first)


def test_what_cannot_generate_is_refused():
    model, bert = build("llama"), build("bert")
    batch = prompts(model)
    with pytest.raises(UnsupportedModelError, match=r"b: a Bert\w+ cannot generate text"):
        solpath.measure({"a": model, "b": bert}, batch, generate=4)
    with pytest.raises(ConfigError, match=r"a: a prompt of 9 tokens and 32 new .* 40 positions"):
        solpath.measure({"a": model}, batch, generate=32)
    with pytest.raises(ConfigError, match="generate must be an integer of at least 2, got 1"):
        solpath.measure({"a": model}, batch, generate=1)
    with pytest.raises(BatchError, match="input_ids"):
        solpath.measure({"a": model}, batch["input_ids"], generate=4)
    with pytest.raises(BatchError, match="generates after input_ids, which the batch lacks"):
        solpath.measure({"a": model}, {"attention_mask": batch["attention_mask"]}, generate=4)
    t5 = build("t5")
    t5.generation_config.decoder_start_token_id = t5.config.decoder_start_token_id = None
    with pytest.raises(ConfigError, match="no token to start with"):
        solpath.measure({"a": t5}, inputs(t5), generate=4)
