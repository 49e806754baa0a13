"""What a search would need, from shapes alone, beside what it measures when it runs."""

import pytest
import torch
from torch.utils.data import DataLoader
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from conftest import build
from solpath.errors import UnsupportedModelError
from solpath.model.discovery import find_pairs
from solpath.running.memory import peak_memory
from solpath.searching.engine import open_engine
from solpath.searching.forecast import Forecast, forecast


@pytest.mark.parametrize("label", ["bert", "llama", "vit", "clip"])
def test_a_forecast_is_near_what_is_measured(label):
    model = build(label)
    config = getattr(model.config, "vision_config", model.config)
    batch = {}
    if label in ("vit", "clip"):
        shape = 4, config.num_channels, config.image_size, config.image_size
        batch["pixel_values"] = torch.randn(shape)
    if label != "vit":
        batch["input_ids"] = torch.randint(1, 59, (4, 8))
    with open_engine(model, [batch], loss=None, seed=0) as engine:
        measured = engine.estimate(1, 200)
    found = forecast(model.to("meta"), find_pairs(model), tokens=8, samples=4)
    step = found.passes[0] + 3 * (found.passes[1] - found.passes[0])
    assert found.weights == pytest.approx(measured.weights, rel=0.1)
    assert 0.6 < step / measured.step < 1.7
    assert found.recomputed[1] <= found.passes[1]


@pytest.mark.parametrize("head", ["gemma2", "gemma2 uncapped", "cohere", "llama"])
def test_a_forecast_knows_whether_logits_are_whole(head):
    """A model that caps or scales its logits makes all of them."""
    sizes = {
        "vocab_size": 8192, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2,
    }  # fmt: skip
    model: torch.nn.Module
    if "gemma2" in head:
        cap = {"final_logit_softcapping": None} if "uncapped" in head else {}
        model = Gemma2ForCausalLM(Gemma2Config(**sizes, head_dim=8, **cap))
    elif head == "cohere":
        model = CohereForCausalLM(CohereConfig(**sizes, logit_scale=0.0625))
    else:
        model = LlamaForCausalLM(LlamaConfig(**sizes))
    model.eval()
    batch = {"input_ids": torch.randint(1, 59, (4, 16))}
    with open_engine(model, [batch], loss=None, seed=0) as engine:
        measured = engine.estimate(1, 200)
    found = forecast(model.to("meta"), find_pairs(model), tokens=16, samples=4)
    step = found.passes[0] + 3 * (found.passes[1] - found.passes[0])
    assert 0.8 < step / measured.step < 1.25


def test_a_text_model_of_a_family_that_sees_has_a_forecast():
    model = build("gemma3_text").to("meta")
    assert forecast(model, find_pairs(model), tokens=8, samples=2).passes[0] > 0


@pytest.mark.parametrize("whole", [True, False], ids=["whole batches", "any samples"])
def test_the_estimate_of_a_loss_of_the_users_holds_what_the_loss_needs(whole):
    """Cross-entropy over a vocabulary; one that refuses one or two samples is not followed."""
    config = LlamaConfig(
        vocab_size=8192, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    ids = torch.randint(1, 59, (8, 32))

    def loss(outputs, batch):
        assert not whole or len(batch["input_ids"]) == 8
        return outputs.loss

    batch = {"input_ids": ids, "labels": ids}
    with open_engine(model, [batch], loss=loss, seed=0) as engine:
        step = engine.estimate(1, 200).step
        mask = torch.ones(engine.units)
        taken, _ = peak_memory(lambda: engine.gradients(0, mask, binary=True), passing=True)
    assert (0.1 if whole else 0.8) < step / taken < 1.25


def test_the_estimate_is_of_the_largest_batch_of_a_list():
    model = build("bert")
    data = [{"input_ids": torch.randint(1, 59, (4, length))} for length in (8, 32, 16)]
    steps = []
    for batches in (data, data[1:2]):
        with open_engine(model, batches, loss=None, seed=0) as engine:
            steps.append(engine.estimate(200, 200).step)
    assert 0.8 < steps[0] / steps[1] < 1.25


def test_targets_that_are_not_remembered_are_not_in_the_estimate():
    data = [{"input_ids": torch.randint(1, 59, (4, 8))} for _ in range(50)]
    kept = []
    for batches in (data, DataLoader(data, batch_size=None)):
        with open_engine(build("bert"), batches, loss=None, seed=0) as engine:
            kept.append(engine.estimate(200, 200).kept)
    assert kept[0] > kept[1]


def test_experts_have_no_forecast():
    model = build("mixtral").to("meta")
    with pytest.raises(UnsupportedModelError, match="no forecast for MixtralForCausalLM"):
        forecast(model, find_pairs(model), tokens=8, samples=2)


def test_what_is_done_for_less_memory():
    found = Forecast(10**9, (10**8, 2 * 10**8), (10**7, 2 * 10**7), 0, 16)
    assert found.on(8 * 10**9, disk=False) == (10**9 + 16 * 10**8, "as it is")
    assert found.on(2 * 10**9, disk=False) == (10**9 + 16 * 10**7, "recompute")
    more = found._replace(recomputed=(3 * 10**7, 6 * 10**7))
    eight = 10**9 + 8 * 3 * 10**7, "recompute, --micro-batch 8"
    assert more.on(1_310_000_000, disk=False) == eight
    assert found.on(10**9, disk=False)[0] is None
    assert found.on(10**9, disk=True) == (16 * 10**7, "weights stay on disk, recompute")
