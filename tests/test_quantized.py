"""Members that are quantised by torchao: held where they can be, refused by name elsewhere."""

import copy
import warnings

import pytest
import torch
from torch import nn

import solpath
from conftest import batches, build
from solpath.cli.main import run
from solpath.errors import UnsupportedModelError
from solpath.measuring.memory import bytes_on_disk
from solpath.model.counting import count_macs
from solpath.running.memory import resident_bytes

quantization = pytest.importorskip("torchao.quantization")
KINDS = {
    "int8": quantization.Int8WeightOnlyConfig,
    "int8 dynamic": quantization.Int8DynamicActivationInt8WeightConfig,
    "int4": lambda: quantization.IntxWeightOnlyConfig(weight_dtype=torch.int4),
}


@pytest.fixture(scope="module")
def cut():
    model = build("llama")
    config = solpath.SearchConfig(steps=3, scale_batches=1)
    path = solpath.search(model, batches(model), config, progress=False)
    return model, solpath.extract(model, path.plan(sparsity=0.3, for_="stock"))


def quantized(model, kind="int8"):
    made = copy.deepcopy(model)
    quantization.quantize_(made, KINDS[kind]())
    return made


def logits(model):
    with torch.no_grad():
        return model(**{"input_ids": torch.arange(12).view(2, 6)}).logits


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantised_member_is_measured_as_what_it_is(cut, kind):
    _, small = cut
    made = quantized(small, kind)
    batch = {"input_ids": torch.arange(12).view(2, 6)}
    found = solpath.measure({"float": small, "quantised": made}, batch, repeats=1)
    assert found["quantised"].params == found["float"].params
    assert found["quantised"].macs == found["float"].macs == count_macs(small, batch) // 2
    linear = [m.weight for m in small.modules() if isinstance(m, nn.Linear)]
    saved = sum(3 * weight.numel() for weight in linear)  # three bytes of four
    scales = sum(5 * len(weight) for weight in linear)
    assert found["float"].bytes_on_disk - found["quantised"].bytes_on_disk == pytest.approx(
        saved - scales, abs=4500
    )
    assert resident_bytes(small) - resident_bytes(made) == saved - scales
    assert bytes_on_disk(made) < bytes_on_disk(small)


def test_what_a_quantised_member_cannot_do_is_refused_by_name(cut, tmp_path):
    model, small = cut
    made, many = quantized(small), batches(model, count=12)
    calls = {
        "compensate before": [lambda: solpath.compensate(made, model, many)],
        "tune before": [lambda: solpath.tune(made, model, many)],
        "prune before": [
            lambda: solpath.extract(quantized(model), small.solpath_plan),
            lambda: solpath.find_pairs(quantized(model)),
        ],
        "before quantising, or to onnx": [
            lambda format=format: solpath.export(made, tmp_path / "a", format)
            for format in ("stock", "hub", "gguf", "openvino")
        ],
    }
    for words, refused in calls.items():
        for call in refused:
            with pytest.raises(UnsupportedModelError, match=rf"weight is a Int8Tensor.*{words}"):
                call()
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_the_ways_out_give_the_same_outputs(cut, kind, tmp_path):
    from transformers import AutoModelForCausalLM, TorchAoConfig

    _, small = cut
    expected = logits(quantized(small, kind))
    solpath.save(small, tmp_path / "own")
    loaded = quantized(solpath.load(tmp_path / "own"), kind)
    assert torch.equal(logits(loaded), expected)
    solpath.export(small, tmp_path / "stock", "stock")
    stock = quantized(AutoModelForCausalLM.from_pretrained(tmp_path / "stock"), kind)
    torch.testing.assert_close(logits(stock), expected, rtol=0.1, atol=0.1)
    if kind == "int4":
        return  # IntxUnpackedToInt8Tensor is for export, not for safetensors
    settings = TorchAoConfig(KINDS[kind]())
    given = {"quantization_config": settings, "dtype": torch.float32}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        stock = AutoModelForCausalLM.from_pretrained(tmp_path / "stock", **given)
        stock.save_pretrained(tmp_path / "again")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert type(again.model.layers[0].mlp.up_proj.weight).__name__ == "Int8Tensor"
    assert torch.equal(logits(again), logits(stock))


def test_weights_of_few_bits_go_to_onnx_as_they_are(tmp_path):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    sizes = {"hidden_size": 128, "intermediate_size": 512}  # smaller weights are folded to floats
    small = build("bert", num_hidden_layers=1, **sizes)
    solpath.export(quantized(small), tmp_path / "int8", "onnx")
    held = onnx.load(tmp_path / "int8" / "onnx" / "model.onnx").graph.initializer
    eight = sum(
        torch.tensor(one.dims).prod().item()
        for one in held
        if one.data_type == onnx.TensorProto.INT8 and len(one.dims) > 1
    )
    linear = [m.weight.numel() for m in small.modules() if isinstance(m, nn.Linear)]
    assert eight >= sum(linear)


def test_a_saved_member_of_few_bits_goes_to_onnx_by_a_command(cut, tmp_path, capsys):
    pytest.importorskip("onnxruntime")
    solpath.save(quantized(cut[1]), tmp_path / "small")
    words = ["export", str(tmp_path / "small"), "--format", "onnx", "--out", str(tmp_path / "onnx")]
    assert run(words) == 0
    assert run([*words[:3], "stock", "--out", str(tmp_path / "stock")]) == 2
    assert "export to stock before quantising, or to onnx" in capsys.readouterr().err


def test_a_quantised_dense_model_may_judge_but_not_be_cut(cut):
    """Its head is compared with that of a member by its outputs, as packed numbers cannot be."""
    model, small = cut
    data = 2 * batches(model)
    dense = quantized(model)
    found = solpath.evaluate(
        solpath.compensate(small, dense, data, progress=False), model, data
    ).metrics
    plain = solpath.evaluate(solpath.compensate(small, model, data, progress=False), model, data)
    assert found["kl"] == pytest.approx(plain.metrics["kl"], rel=0.2)
    path = solpath.baselines.magnitude(model, data)
    with pytest.raises(UnsupportedModelError, match="prune before quantising"):
        solpath.choose(dense, path, data, 0.9, confidence=0.6, progress=False)
