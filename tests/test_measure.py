"""`measure` against hand counts and real files."""

import json
import time

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

from solpath.errors import BatchError, ConfigError
from solpath.measuring.measurement import measure
from solpath.measuring.memory import bytes_on_disk
from solpath.measuring.timing import interquartile_range, latencies
from solpath.model.counting import count_macs
from solpath.running.memory import peak_memory
from solpath.running.provenance import provenance

HIDDEN, MLP, LAYERS, LENGTH, VOCAB = 24, 40, 2, 7, 50


def bert():
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=3,
        intermediate_size=MLP,
        max_position_embeddings=16,
    )
    return BertModel(config, add_pooling_layer=False)


def llama(tied):
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=MLP,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=6,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config)


def tokens(batch=4):
    return {"input_ids": torch.arange(batch * LENGTH).view(batch, LENGTH) % VOCAB}


def test_macs_are_the_matrix_products_of_one_sample():
    linear = LAYERS * LENGTH * (4 * HIDDEN * HIDDEN + 2 * HIDDEN * MLP)
    attention = LAYERS * 2 * LENGTH * LENGTH * HIDDEN
    assert count_macs(bert(), tokens(1)) == linear + attention
    assert measure({"dense": bert()}, tokens(4), repeats=1)["dense"].macs == linear + attention


@pytest.mark.parametrize("tied", [False, True])
def test_bytes_and_parameters_count_a_tied_tensor_once(tied, tmp_path):
    model = llama(tied)
    state = model.state_dict()
    if tied:
        del state["lm_head.weight"]
    save_file(state, tmp_path / "a.safetensors", metadata={"format": "pt"})
    assert bytes_on_disk(model) == (tmp_path / "a.safetensors").stat().st_size
    found = measure({"a": model}, tokens(), repeats=1)["a"].params
    assert found == sum(value.numel() for value in state.values())


def test_peak_memory_counts_what_is_alive_at_once():
    def chain(hold):
        held = []
        x = torch.ones(1000)
        for _ in range(5):
            x = x + 1
            if hold:
                held.append(x)

    size = 4 * 1000
    assert peak_memory(lambda: chain(hold=True))[0] == 5 * size
    assert peak_memory(lambda: chain(hold=False))[0] == 2 * size


def test_peak_memory_ignores_views_and_what_was_there_before():
    weight = torch.ones(1000)
    assert peak_memory(lambda: weight.view(10, 100).transpose(0, 1))[0] == 0
    assert peak_memory(lambda: weight.mul_(2))[0] == 0


def test_peak_memory_sees_what_autograd_saves():
    class Block(nn.Module):
        def forward(self, x):
            for _ in range(4):
                x = x.sin()
            return x

    x = torch.ones(1000, requires_grad=True)
    saved = peak_memory(lambda: Block()(x).sum().backward())[0]
    with torch.no_grad():
        free = peak_memory(lambda: Block()(x).sum())[0]
    assert saved >= free + 2 * 4000


def test_peak_memory_includes_the_weights_and_grows_with_the_batch():
    model = bert()
    weights = sum(4 * p.numel() for p in model.parameters())
    one = measure({"a": model}, tokens(1), repeats=1)["a"]
    many = measure({"a": model}, tokens(8), repeats=1)["a"]
    assert weights < one.peak_memory < many.peak_memory
    assert one.peak_memory_source


def test_latencies_are_interleaved_and_start_elsewhere_each_round():
    calls = []
    functions = {name: lambda name=name: calls.append(name) for name in "abc"}
    times = latencies(functions, repeats=3, warm_up=1)
    assert calls == list("abcbcacababc")
    assert {name: len(values) for name, values in times.items()} == dict.fromkeys("abc", 3)


def test_latency_is_the_median_and_tells_slow_from_fast():
    class Sleep(nn.Module):
        def __init__(self, seconds):
            super().__init__()
            self.seconds = seconds
            self.linear = nn.Linear(2, 2)

        def forward(self, x):
            time.sleep(self.seconds)
            return self.linear(x)

    found = measure({"fast": Sleep(0.001), "slow": Sleep(0.01)}, torch.ones(3, 2), repeats=3)
    assert 10 <= found["slow"].latency_ms < 100
    assert found["fast"].latency_ms < found["slow"].latency_ms
    assert found["fast"].samples == 3
    assert json.loads(json.dumps(found["fast"].to_dict()))["repeats"] == 3


def test_interquartile_range():
    assert interquartile_range([1.0]) == 0
    assert interquartile_range([0.0, 1.0, 2.0, 3.0, 4.0]) == 2


def test_models_are_left_as_found():
    model = bert().train()
    state = torch.get_rng_state()
    measure({"a": model}, tokens(), repeats=2)
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)


def test_bad_input_is_refused():
    with pytest.raises(ConfigError, match="models is empty"):
        measure({}, tokens())
    with pytest.raises(ConfigError, match="repeats"):
        measure({"a": bert()}, tokens(), repeats=0)
    with pytest.raises(BatchError, match="samples"):
        measure({"a": bert()}, {"input_ids": tokens()["input_ids"][:0]})
    with pytest.raises(BatchError, match="meta"):
        measure({"a": bert()}, {"input_ids": tokens()["input_ids"].to("meta")})


def test_provenance_names_versions_and_hides_the_working_directory(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", [str(tmp_path / "run.py"), "--out", str(tmp_path / "a b")])
    found = provenance()
    assert found["command"] == "python run.py --out 'a b'"
    assert set(found["versions"]) >= {"python", "torch", "transformers", "solpath"}
    assert found["threads"] == torch.get_num_threads()
    assert found["time"].endswith("Z")
    json.dumps(found, allow_nan=False)


@pytest.mark.parametrize("tied", [False, True])
def test_counting_takes_no_memory_for_every_query_and_key(tied):
    """32 heads over 4096 tokens would take gigabytes."""
    model, length = llama(tied), 300
    batch = {"input_ids": torch.arange(length).view(1, length) % VOCAB}
    batch["attention_mask"] = torch.ones(1, length, dtype=torch.int64)
    if tied:  # padding makes the mask of attention explicit
        batch["attention_mask"][0, :3] = 0
    peak, _ = peak_memory(lambda: count_macs(model, batch))
    assert peak < 2.5 * 4 * length * length  # a mask has no heads; there are 4
    q, kv = 4 * 6 * HIDDEN, 2 * 6 * HIDDEN
    linear = length * (2 * q + 2 * kv + 3 * HIDDEN * MLP + HIDDEN * VOCAB)
    assert count_macs(model, batch) == linear + 2 * 4 * 6 * length * length
