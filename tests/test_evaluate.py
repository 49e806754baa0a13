"""`evaluate` against plain formulas, on tiny random models."""

import copy
import json
import math

import pytest
import torch
from torch.nn import functional
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

import solpath
from solpath.errors import BatchError
from solpath.measuring.evaluation import evaluate, reference_outputs


@pytest.fixture
def bert():
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=40,
        max_position_embeddings=16,
    )
    return BertModel(config)


@pytest.fixture
def llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=30,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=6,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config)


def text(count=3, vocab=30, length=7):
    generator = torch.Generator().manual_seed(1)
    batches = []
    for size in range(2, 2 + count):
        mask = torch.ones(size, length, dtype=torch.int64)
        mask[0, 4:] = 0
        ids = torch.randint(vocab, (size, length), generator=generator)
        batches.append({"input_ids": ids, "attention_mask": mask})
    return batches


def disturbed(model, seed=2):
    """A copy of `model` with slightly different weights."""
    other = type(model)(model.config)
    other.load_state_dict(model.state_dict())
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return other


def test_a_model_against_itself_is_perfect(llama, bert):
    found = evaluate(llama, llama, text()).metrics
    assert found["cosine"] == pytest.approx(1, abs=1e-6)
    assert found["kl"] == pytest.approx(0, abs=1e-6)
    assert found["agreement"] == 1
    assert found["relative_error"] == 0
    found = evaluate(bert, bert, text()).metrics
    assert set(found) == {"cosine", "relative_error"}
    assert found["cosine"] == pytest.approx(1, abs=1e-6)


def test_logits_metrics_are_means_over_real_tokens(llama):
    other, batches = disturbed(llama), text()
    result = evaluate(other, llama, batches)
    rows = {"kl": [], "agreement": [], "cosine": [], "relative_error": []}
    with torch.no_grad():
        for batch in batches:
            y, t = other.eval()(**batch).logits, llama.eval()(**batch).logits
            for i, j in batch["attention_mask"].nonzero().tolist():
                p, q = t[i, j].softmax(-1), y[i, j].softmax(-1)
                rows["kl"].append(sum(p * (p / q).log()))
                rows["agreement"].append(float(t[i, j].argmax() == y[i, j].argmax()))
                rows["cosine"].append((t[i, j] @ y[i, j]) / (t[i, j].norm() * y[i, j].norm()))
                rows["relative_error"].append((t[i, j] - y[i, j]).norm() ** 2 / t[i, j].norm() ** 2)
    assert result.samples == 2 + 3 + 4
    for name, values in rows.items():
        assert result.metrics[name] == pytest.approx(float(sum(values)) / len(values), rel=1e-4)
    assert 0 < result.metrics["agreement"] < 1


def test_hidden_metrics_pool_real_tokens_of_each_sample(bert):
    other, batches = disturbed(bert), text()
    result = evaluate(other, bert, batches)
    cosines, errors = [], []
    with torch.no_grad():
        for batch in batches:
            y = other.eval()(**batch).last_hidden_state
            t = bert.eval()(**batch).last_hidden_state
            for i, length in enumerate(batch["attention_mask"].sum(1).tolist()):
                a, b = y[i, :length], t[i, :length]
                cosines.append(functional.cosine_similarity(a.mean(0), b.mean(0), dim=0).item())
                errors.append(((a - b).norm() ** 2 / b.norm() ** 2).item())
    assert result.metrics["cosine"] == pytest.approx(sum(cosines) / len(cosines), rel=1e-5)
    assert result.metrics["relative_error"] == pytest.approx(sum(errors) / len(errors), rel=1e-4)
    assert result.metrics["cosine"] < 0.9999


def test_what_stands_under_the_padding_does_not_count(bert):
    other, batches = disturbed(bert), text()
    before = evaluate(other, bert, batches).metrics
    for batch in batches:
        batch["input_ids"] = batch["input_ids"].clone()
        batch["input_ids"][0, 4:] = 1
    assert evaluate(other, bert, batches).metrics == pytest.approx(before, rel=1e-5)


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_cached_reference_gives_the_same_numbers(kind, request):
    model = request.getfixturevalue(kind)
    other, batches = disturbed(model), text()
    cached = reference_outputs(model, batches)
    assert evaluate(other, cached, iter(batches)).metrics == pytest.approx(
        evaluate(other, model, iter(batches)).metrics
    )


def test_inside_masked_it_agrees_with_the_extracted_model(bert):
    batches = text()
    path = solpath.baselines.METHODS["random"](bert, batches)
    plan = path.plan(sparsity=0.5)
    cached = reference_outputs(bert, batches)
    with solpath.masked(bert, plan):
        inside = evaluate(bert, cached, batches)
    small = solpath.extract(bert, plan)
    outside = evaluate(small, bert, batches)
    assert inside.metrics == pytest.approx(outside.metrics, rel=1e-4)
    assert inside.metrics["relative_error"] > 1e-6
    assert inside.cost is None
    assert outside.cost == plan.achieved


def test_task_is_run_on_the_model_and_reported(llama):
    seen = []

    def task(model):
        seen.append((model, model.training, torch.is_grad_enabled()))
        return torch.tensor(0.25)

    assert evaluate(llama, llama, text(), task=task).metrics["task"] == 0.25
    assert seen == [(llama, False, False)]


def test_models_and_random_state_are_left_as_found(llama):
    other = disturbed(llama)
    llama.train()
    llama.model.layers[0].eval()
    other.eval()
    flags = [module.training for module in (*llama.modules(), *other.modules())]
    state = torch.get_rng_state()
    evaluate(other, llama, text(), task=lambda model: float(torch.rand(())))
    assert [module.training for module in (*llama.modules(), *other.modules())] == flags
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.is_grad_enabled()
    assert not any(module._forward_hooks for module in (*llama.modules(), *other.modules()))


def test_result_goes_to_json(llama):
    value = json.loads(json.dumps(evaluate(llama, llama, text()).to_dict(), allow_nan=False))
    assert value["samples"] == 9
    assert value["cost"] is None
    assert value["provenance"]["versions"]["torch"] == torch.__version__


def test_single_batches_and_other_devices_are_refused(llama):
    with pytest.raises(BatchError, match="a single dict; wrap it in a list"):
        evaluate(llama, llama, text(1)[0])
    there = [{key: value.to("meta") for key, value in text(1)[0].items()}]
    with pytest.raises(BatchError, match="input_ids is on meta, the model on cpu"):
        evaluate(llama, reference_outputs(llama, text(1)), there)
    with pytest.raises(BatchError, match="input_ids is on meta, the model on cpu"):
        evaluate(llama, llama, there)
    with pytest.raises(BatchError, match="input_ids is on meta, the model on cpu"):
        reference_outputs(llama, there)
    with pytest.raises(BatchError, match="input_ids is on cpu, the model on meta"):
        evaluate(llama, copy.deepcopy(llama).to("meta"), text(1))


def test_empty_batches_are_refused(llama):
    with pytest.raises(BatchError, match="empty"):
        evaluate(llama, llama, [])
    with pytest.raises(BatchError, match="empty"):
        reference_outputs(llama, iter(()))


@pytest.mark.parametrize(("take", "message"), [(2, "batch 2 has no"), (4, "output 3 has no")])
def test_a_reference_of_other_batches_is_refused(llama, take, message):
    cached = reference_outputs(llama, text(4))[:take]
    with pytest.raises(BatchError, match=message):
        evaluate(llama, cached, text(3))


def test_outputs_of_another_shape_are_refused(llama):
    with pytest.raises(BatchError, match="batch 0"):
        evaluate(llama, reference_outputs(llama, text(3))[::-1], text(3))


def test_nan_outputs_are_refused(llama):
    other = disturbed(llama)
    with torch.no_grad():
        other.lm_head.weight[0, 0] = math.nan
    with pytest.raises(BatchError, match="output of the model"):
        evaluate(other, llama, text())


def test_a_single_batch_in_place_of_several(bert):
    with pytest.raises(BatchError, match="wrap it in a list"):
        reference_outputs(bert, {"input_ids": torch.ones(2, 3, dtype=torch.int64)})
