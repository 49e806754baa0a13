"""Extracted decoders generate: with or without cache, in padded batches, with beams."""

from collections import defaultdict

import pytest
import torch
import transformers

import solpath
from conftest import CASES, build, inputs
from plans import random_plan
from solpath.model.discovery import survey

GENERATORS = [
    label for label, (name, _) in CASES.items() if getattr(transformers, name).can_generate()
]
# The encoders of BART and its relatives count positions from the first column, padding or not.
PADDED_ON_THE_RIGHT = {"bart", "blenderbot", "blenderbot-small", "marian", "mbart", "pegasus"}
PADDED_ON_THE_RIGHT |= {"plbart"}
TEXT_ONLY = [
    label
    for label in GENERATORS
    if label not in {"gemma3", "llava", "whisper"} | PADDED_ON_THE_RIGHT
]
# Of queries and keys, values, MLP: some of each, no query and key at all, no value at all.
PLANS = [(0.5, 0.25, 0.75), (0.0, 0.5, 1.0), (0.6, 0.0, 0.5)]
WINDOW = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
NEW = 6  # tokens
every_generator = pytest.mark.parametrize("label", GENERATORS)


def pruned(label, fractions=PLANS[0]):
    """Dense model, plan and extracted model, in double precision. Windows are shorter than texts.

    transformers sizes T5's cache by its encoder, so that gets as many layers as the decoder.
    """
    changes = {"t5 gated": {"num_layers": 2}, "qwen2": WINDOW, "qwen3": WINDOW}.get(label, {})
    model = build(label, **changes)
    # Eager attention takes the softmax in float32, where a mask of double precision is infinite.
    model = model.double() if model._supports_sdpa else model
    plan = random_plan(model, fractions)
    return model, plan, solpath.extract(model, plan)


def prompts(model):
    """Two prompts; texts of 4 and 9 tokens are padded on the left."""
    batch = inputs(model, samples=2)
    batch.pop("decoder_input_ids", None)
    if model.config.model_type in ("gemma3", "llava"):
        images = (batch["input_ids"] == 59).long()
        kinds = {"token_type_ids": images} if model.config.model_type == "gemma3" else {}
        return batch | {"attention_mask": torch.ones_like(images)} | kinds
    if "input_ids" in batch:
        lengths = torch.tensor([[4], [9]])
        batch["attention_mask"] = (torch.arange(9) >= 9 - lengths).long()
        tokens = torch.randint(1, 57, (2, 9), generator=torch.Generator().manual_seed(1))
        batch["input_ids"] = tokens * batch["attention_mask"]
    return batch


def generate(model, batch, **options):
    """New tokens, and the logits (or, with beams, the scores) that chose them."""
    beams = "num_beams" in options
    options |= {"output_scores" if beams else "output_logits": True}
    # Whisper's own `generate` returns tokens only.
    result = transformers.GenerationMixin.generate(
        model,
        **batch,
        **options,
        max_new_tokens=NEW,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
        return_dict_in_generate=True,
    )
    values = result.sequences_scores if beams else torch.stack(result.logits, 1)
    return result.sequences[:, -NEW:], values


def assert_same(one, two):
    assert torch.equal(one[0], two[0])
    bound = 1e-10 if one[1].dtype is torch.float64 else 1e-5
    torch.testing.assert_close(one[1], two[1], rtol=0, atol=bound * two[1].abs().max().item())


@every_generator
@pytest.mark.parametrize("fractions", PLANS)
def test_cached_is_uncached_is_masked(label, fractions):
    model, plan, small = pruned(label, fractions)
    batch = prompts(model)
    cached = generate(small, batch, use_cache=True)
    assert cached[1].shape[:2] == (2, NEW)
    assert_same(cached, generate(small, batch, use_cache=False))
    with solpath.masked(model, plan):
        assert_same(cached, generate(model, batch))


@every_generator
def test_static_cache(label):
    model, _, small = pruned(label)
    batch = prompts(model)
    expected = generate(small, batch)
    assert_same(generate(small, batch, cache_implementation="static"), expected)
    # None of this could fail if what was cut made no difference.
    assert (expected[1] - generate(model, batch)[1]).abs().max() > 1e-2


@every_generator
def test_beam_search_is_that_of_the_masked_model(label):
    model, plan, small = pruned(label)
    batch = prompts(model)
    beams = generate(small, batch, num_beams=3)
    with solpath.masked(model, plan):
        assert_same(beams, generate(model, batch, num_beams=3))


@pytest.mark.parametrize("label", TEXT_ONLY)
def test_padding_on_the_left_changes_nothing(label):
    model, _, small = pruned(label)
    batch = prompts(model)
    tokens, logits = generate(small, batch)
    for i, length in enumerate((4, 9)):
        alone = {name: value[i : i + 1, 9 - length :] for name, value in batch.items()}
        assert alone["attention_mask"].all()
        assert_same(generate(small, alone), (tokens[i : i + 1], logits[i : i + 1]))


@every_generator
@pytest.mark.parametrize("fractions", PLANS)
def test_the_cache_is_as_small_as_the_plan_says(label, fractions):
    model, plan, small = pruned(label, fractions)
    size = next(model.parameters()).element_size()
    # A key without channels keeps one column of zeros, so that the cache can tell its length.
    keys = defaultdict(int)
    for pair in plan.pairs:
        if pair.kind == "qk" and pair.cache:
            name = pair.name.removesuffix(".qk").removesuffix(".unrotated")
            keys[name, pair.heads] += plan.widths[pair.name]
    empty = sum(size * heads for (_, heads), width in keys.items() if not width)
    dense, cut = cache_bytes(model), cache_bytes(small)
    assert cut == plan.achieved.cache + empty
    whole = sum(site.keys for site in survey(model)[1])
    assert dense == size * (whole + sum(pair.units * pair.cache for pair in plan.pairs))
    assert cut < dense


def cache_bytes(model):
    """Bytes per sample and token in the cache of self attention, after 3 tokens."""
    batch, tokens = inputs(model, samples=2), torch.ones(2, 3, dtype=torch.long)
    if model.config.is_encoder_decoder:
        batch["decoder_input_ids"] = tokens
    else:
        batch = {"input_ids": tokens}
    with torch.no_grad():
        output = model(**batch, use_cache=True)
    cache = output.get("cache", output.get("past_key_values"))  # the name before transformers 5.24
    cache = getattr(cache, "self_attention_cache", cache)
    found = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert found % 6 == 0
    return found // 6
