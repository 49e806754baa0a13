"""One search, every runtime: plans for a target go into its format, and what cannot is refused."""

import json

import pytest

import solpath
from conftest import build, inputs
from solpath import baselines
from solpath.errors import ConfigError, ModelInUseError
from solpath.exporting.export import options_of


def cut(label, target=None, **constraints):
    model = build(label)
    path = baselines.magnitude(model, [inputs(model)])
    return solpath.extract(model, path.plan(sparsity=0.4, for_=target, **constraints))


@pytest.mark.parametrize(
    ("label", "target", "format"),
    [
        ("llama", "stock", "stock"),
        ("llama", "vllm", "hub"),
        ("vit", "stock", "stock"),
        ("t5", "stock", "stock"),
        ("gemma3_text", "stock", "stock"),
    ],
)
def test_a_plan_for_a_runtime_goes_into_its_format(tmp_path, label, target, format):
    small = cut(label, target)
    made = solpath.export(small, tmp_path / "out", format, batch=inputs(small))
    assert {row.inputs for row in made.parity} >= {"random", "given"}
    assert max(row.difference for row in made.parity) < 1e-5
    record = json.loads((tmp_path / "out" / "solpath_export.json").read_text())
    assert record["plan"]["asked"]["target"] == target
    assert record["parity"][0]["difference"] == made.parity[0].difference


def test_a_plan_for_llama_cpp_goes_into_a_file(tmp_path):
    pytest.importorskip("gguf")
    model = build("llama", intermediate_size=128)
    path = baselines.magnitude(model, [inputs(model)])
    small = solpath.extract(model, path.plan(sparsity=0.3, for_="gguf"))
    made = solpath.export(small, tmp_path / "out", "gguf", quantization="q8_0")
    assert (tmp_path / "out" / "model.gguf").stat().st_size < made.bytes


@pytest.mark.parametrize(
    ("label", "target", "format"),
    [("llama", "stock", "stock"), ("vit", "stock", "stock"), ("qwen2", "vllm", "hub"),
     ("bert", None, "hub"), ("t5", None, "hub"), ("mistral", "gguf", "gguf")],
)  # fmt: skip
def test_plans_of_whole_heads_go_into_every_format(tmp_path, label, target, format):
    pytest.importorskip("gguf")
    grouped = label in ("llama", "qwen2", "mistral")
    counts = {"num_attention_heads": 8, "num_key_value_heads": 4} if grouped else {}
    model = build(label, **counts, **({"sliding_window": None} if format == "gguf" else {}))
    path = baselines.magnitude(model, [inputs(model)])
    plan = path.plan(sparsity=0.11, for_=target, whole_groups=True, protect=["*.mlp"])
    assert plan.heads
    small = solpath.extract(model, plan)
    options = {"quantization": "f32"} if format == "gguf" else {"batch": inputs(small)}
    made = solpath.export(small, tmp_path / "out", format, **options)
    assert max(row.difference for row in made.parity) < 1e-5


def test_lost_heads_are_traced(tmp_path):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    made = solpath.export(cut("vit", whole_groups=True), tmp_path / "out", "onnx")
    assert max(row.difference for row in made.parity) < 1e-5


def test_wrong_words_are_named(tmp_path):
    small = cut("bert")
    with pytest.raises(ConfigError, match="format must be one of stock, hub, onnx"):
        solpath.export(small, tmp_path / "out", "coreml")
    with pytest.raises(ConfigError, match="'hub' takes multiple_of, tokenizer, not 'pad'"):
        solpath.export(small, tmp_path / "out", "hub", pad=True)
    with pytest.raises(ConfigError, match="no save_pretrained"):
        solpath.export(small, tmp_path / "out", "stock", tokenizer="bert")
    assert options_of("stock") == ("pad", "tokenizer")
    assert not (tmp_path / "out").exists()


def test_a_model_is_left_in_its_modes_and_a_masked_one_is_refused(tmp_path):
    small = cut("bert").train()
    part = small.encoder.layer[0].eval()
    solpath.export(small, tmp_path / "out", "hub")
    assert small.training
    assert small.embeddings.training
    assert not part.training
    model = build("bert")
    plan = baselines.magnitude(model, [inputs(model)]).plan(sparsity=0.4)
    with solpath.masked(model, plan), pytest.raises(ModelInUseError, match="masked"):
        solpath.export(model, tmp_path / "other", "stock")
