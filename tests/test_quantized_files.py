"""Members that torchao has quantised come back from their files bit for bit, or are refused."""

import copy
import json
import shutil
import sys

import pytest
import torch
from accelerate import cpu_offload
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import solpath
from conftest import batches, build
from solpath.cli.main import run
from solpath.errors import ConfigError, FileError, UnsupportedModelError
from solpath.reading import sealed

quantization = pytest.importorskip("torchao.quantization")
KINDS = {
    "int8": quantization.Int8WeightOnlyConfig,
    "int8 of a tensor": lambda: quantization.Int8WeightOnlyConfig(
        granularity=quantization.PerTensor()
    ),
    "int8 dynamic": quantization.Int8DynamicActivationInt8WeightConfig,
    "int4": lambda: quantization.IntxWeightOnlyConfig(weight_dtype=torch.int4),
    "int4 in groups": lambda: quantization.IntxWeightOnlyConfig(
        weight_dtype=torch.int4, granularity=quantization.PerGroup(8)
    ),
    "int2": lambda: quantization.IntxWeightOnlyConfig(weight_dtype=torch.int2),
    "int4 dynamic": lambda: quantization.Int8DynamicActivationIntxWeightConfig(
        weight_dtype=torch.int4, weight_granularity=quantization.PerAxis(0)
    ),
}
BATCH = {"input_ids": torch.arange(12).view(2, 6)}
WEIGHT = "encoder.layer.0.intermediate.dense.weight"


def cut(label="bert", **changes):
    model = build(label, **changes)
    config = solpath.SearchConfig(steps=3, scale_batches=1)
    path = solpath.search(model, batches(model), config, progress=False)
    return model, solpath.extract(model, path.plan(sparsity=0.3, min_width=1))


@pytest.fixture(scope="module")
def cuts():
    return {label: cut(label) for label in ("bert", "llama")}


def quantized(model, kind="int8"):
    def chosen(module, _):
        return type(module) is torch.nn.Linear and (
            kind != "int4 in groups" or module.in_features % 8 == 0
        )

    made = copy.deepcopy(model)
    quantization.quantize_(made, KINDS[kind](), filter_fn=chosen)
    return made


def outputs(model):
    with torch.no_grad():
        return [v for v in model(**BATCH).to_tuple() if isinstance(v, torch.Tensor)]


def assert_same(one, other):
    """Same parameters and buffers, of the same kinds and settings, bit for bit."""
    mine, others = one.state_dict(), other.state_dict()
    assert mine.keys() == others.keys()
    for name, tensor in mine.items():
        assert type(tensor) is type(others[name])
        assert tensor.dtype == others[name].dtype
        parts = [("", tensor, others[name])]
        if hasattr(tensor, "tensor_data_names"):
            names, settings = tensor.__tensor_flatten__()
            assert (names, settings) == others[name].__tensor_flatten__()
            parts = [(part, getattr(tensor, part), getattr(others[name], part)) for part in names]
        for part, a, b in parts:
            assert a.dtype == b.dtype, part
            assert torch.equal(a, b), part
    assert all(map(torch.equal, outputs(one), outputs(other)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("label", ["bert", "llama"])
def test_roundtrip(cuts, label, kind, tmp_path):
    made = quantized(cuts[label][1], kind)
    assert any(hasattr(p, "tensor_data_names") for p in made.parameters())
    solpath.save(made, tmp_path / "a", max_shard_size="20KB")
    loaded = solpath.load(tmp_path / "a", verify=True)
    assert_same(made, loaded)
    assert loaded.solpath_plan.to_dict() == made.solpath_plan.to_dict()
    assert [p.requires_grad for p in loaded.parameters()] == [
        p.requires_grad for p in made.parameters()
    ]
    assert {file.suffix for file in (tmp_path / "a").iterdir()} == {".json", ".safetensors"}
    loaded.save_pretrained(tmp_path / "b", state_dict=made.state_dict())
    assert_same(made, solpath.load(tmp_path / "b"))


def test_other_dtypes_ties_and_off_loading(tmp_path):
    """The table of words keeps its floats where the head, tied to it before, is quantised."""
    _, small = cut("llama", tie_word_embeddings=True)
    assert small.lm_head.weight is small.model.embed_tokens.weight
    made = quantized(small.to(torch.bfloat16))
    solpath.save(made, tmp_path / "a")
    assert_same(made, solpath.load(tmp_path / "a"))
    reference = copy.deepcopy(made)
    cpu_offload(made)
    solpath.save(made, tmp_path / "b")
    assert_same(reference, solpath.load(tmp_path / "b"))


def test_a_loaded_one_is_judged_and_exported_as_the_one_that_was_saved(tmp_path):
    model, small = cut("bert", num_hidden_layers=1)
    made = quantized(small)
    solpath.save(made, tmp_path / "a")
    loaded = solpath.load(tmp_path / "a")
    data = batches(model)
    found = [solpath.evaluate(one, model, data).metrics for one in (made, loaded)]
    assert found[0] == found[1]
    held = solpath.measure({"made": made, "loaded": loaded}, data[0], repeats=1)
    for name in ("params", "macs", "bytes_on_disk"):
        assert getattr(held["made"], name) == getattr(held["loaded"], name)
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    solpath.export(loaded, tmp_path / "onnx", "onnx", batch=data[0])


def test_kinds_that_cannot_be_saved_are_refused_by_name(cuts, tmp_path, monkeypatch):
    small = cuts["bert"][1]
    made = quantized(small)
    weight = made.get_parameter(WEIGHT)
    weight.act_quant_scale = torch.ones(1, 1)  # as of static quantisation of inputs
    with pytest.raises(UnsupportedModelError, match=rf"{WEIGHT} is a Int8Tensor.*act_quant_scale"):
        solpath.save(made, tmp_path / "a")
    weight.act_quant_scale = None
    weight.act_quant_kwargs = "none that is known"
    with pytest.raises(UnsupportedModelError, match="save the model before quantising"):
        made.save_pretrained(tmp_path / "a")
    monkeypatch.setattr("solpath.storing.quantized._KINDS", ("Int4Tensor",))
    with pytest.raises(UnsupportedModelError, match=r"not one of Int4Tensor, .*before quantising"):
        solpath.save(quantized(small), tmp_path / "a")
    assert not list(tmp_path.glob("a/*"))


def test_another_state_is_refused(cuts, tmp_path):
    made = quantized(cuts["bert"][1])
    for state in (cuts["bert"][1].state_dict(), quantized(cuts["bert"][1], "int4").state_dict()):
        with pytest.raises(ConfigError, match="is not quantised as the model is"):
            made.save_pretrained(tmp_path / "a", state_dict=state)
    with pytest.raises(ConfigError, match="is not quantised as the model is"):
        cuts["bert"][1].save_pretrained(tmp_path / "a", state_dict=made.state_dict())


@pytest.fixture(scope="module")
def saved(cuts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "a"
    solpath.save(quantized(cuts["bert"][1], "int8 dynamic"), folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "a")


def test_without_torchao_the_way_is_named(saved, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchao"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match=r"solpath.json holds .* pip install torchao"):
        solpath.load(saved)


def test_transformers_refers_to_load(saved):
    from transformers import AutoModel

    with pytest.raises(UnsupportedModelError, match=r"torchao has quantised.*call solpath.load"):
        AutoModel.from_pretrained(saved)


def change_at(path, value):
    """Return a change of the description of one weight; a value of `...` removes the field."""

    def change(head):
        at = head["quantized"][WEIGHT]
        for key in path[:-1]:
            at = at[key]
        if value is ...:
            del at[path[-1]]
        else:
            at[path[-1]] = value

    return change


INPUTS = ("attributes", "act_quant_kwargs")
FORGED = {
    "list": (lambda head: head.update(quantized=[]), "quantized is not a dict"),
    "empty": (lambda head: head["quantized"].update({WEIGHT: {}}), "other fields"),
    "unknown": (
        lambda head: head["quantized"].update({"x.y": head["quantized"][WEIGHT]}),
        "'x.y', which is no weight",
    ),
    "norm": (
        lambda head: head["quantized"].update(
            {"embeddings.LayerNorm.weight": head["quantized"][WEIGHT]}
        ),
        "block_size of embeddings.LayerNorm.weight",
    ),
    "lost": (lambda head: head["quantized"].pop(WEIGHT), f"{WEIGHT}.qdata' is not expected"),
    "kind": (change_at(["kind"], "Int4Tensor"), "kind is 'Int4Tensor'"),
    "other kind": (change_at(["kind"], "IntxUnpackedToInt8Tensor"), "IntxUnpackedToInt8Tensor"),
    "module": (change_at(["kind"], "os.system"), "kind is 'os.system'"),
    "kind list": (change_at(["kind"], ["Int8Tensor"]), "kind is"),
    "part": (change_at(["parts", "act_pre_scale"], "float32"), "parts is"),
    "no part": (change_at(["parts", "zero_point"], ...), "is not expected"),
    "no scale": (change_at(["parts", "scale"], ...), "parts is"),
    "part dtype": (change_at(["parts", "qdata"], "float32"), "parts.qdata is 'float32'"),
    "part none": (change_at(["parts", "qdata"], None), "parts.qdata is None"),
    "other scale": (change_at(["parts", "scale"], "float16"), "weight.scale' is F32"),
    "block": (change_at(["attributes", "block_size"], [0, 32]), "0 is not a whole number"),
    "block rank": (change_at(["attributes", "block_size"], [1]), "block_size of"),
    "block size": (change_at(["attributes", "block_size"], [1, 5]), "does not divide"),
    "block half": (change_at(["attributes", "block_size"], [1, 16]), "weight.scale' is"),
    "no block": (change_at(["attributes", "block_size"], ...), "block_size is missing"),
    "dtype": (
        change_at(["attributes", "dtype"], {"_type": "torch.dtype", "_data": "load"}),
        "is not float32",
    ),
    "more": (change_at(["attributes", "x"], 1), "unexpected keyword"),
    "name": (change_at(["attributes", "qdata"], 1), "would not write"),
    "number": (change_at(["attributes", "act_quant_scale"], 5), "would not write"),
    "class": (change_at([*INPUTS, "_type"], "MXTensor"), "'MXTensor'"),
    "in list": (change_at(INPUTS, [{"_type": "MXTensor", "_data": {}}]), "'MXTensor'"),
    "type list": (change_at([*INPUTS, "_type"], ["x"]), "not one of"),
    "of nothing": (change_at([*INPUTS, "_data"], {}), "QuantizeTensorToInt8Kwargs"),
    "text": (change_at(INPUTS, "x"), "would not write"),
    "grain": (change_at([*INPUTS, "_data", "granularity"], 3), "would not write"),
    "mapping": (change_at([*INPUTS, "_data", "mapping_type", "_data"], "X"), "X"),
    "mapping 3": (change_at([*INPUTS, "_data", "mapping_type", "_data"], 3), "attribute name"),
    "range": (change_at(["attributes", "reduce_range"], "no"), "would not write"),
}


@pytest.mark.parametrize("case", FORGED)
def test_forged_descriptions_are_refused(folder, case):
    change, words = FORGED[case]
    head = json.loads((folder / "solpath.json").read_text())
    change(head)
    (folder / "solpath.json").write_text(json.dumps(head))
    with pytest.raises(FileError, match="checksum"):
        solpath.load(folder)
    (folder / "solpath.json").write_text(json.dumps(sealed(head)))
    with pytest.raises(FileError) as caught:
        solpath.load(folder)
    assert str(folder) in str(caught.value)
    assert words in str(caught.value)


def test_damaged_parts_are_found(folder):
    tensors = load_file(folder / "model.safetensors")
    name = f"{WEIGHT}.scale"
    for value in (None, tensors[name][1:], tensors[name].double(), 2 * tensors[name]):
        changed = {key: t.clone() for key, t in tensors.items() if key != name}
        if value is not None:
            changed[name] = value.contiguous()
        save_file(changed, folder / "model.safetensors", {"format": "pt"})
        with pytest.raises(FileError, match=r"scale' is|damaged"):
            solpath.load(folder, verify=True)


def test_commands_take_the_folder(cuts, tmp_path, capsys):
    model, made = cuts["llama"]
    dense, small = str(tmp_path / "dense"), str(tmp_path / "small")
    words = Tokenizer(models.WordLevel({"the": 0, "a": 1, "?": 2}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="?").save_pretrained(dense)
    model.save_pretrained(dense)
    solpath.save(quantized(made), small)
    capsys.readouterr()
    assert run(["eval", small, "--reference", dense, "--json"]) == 0
    assert 0 < json.loads(capsys.readouterr().out)["metrics"]["kl"] < 10
    sizes = ["--samples", "1", "--tokens", "8", "--repeats", "1"]
    assert run(["bench", dense, small, *sizes, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["models"]
    assert found[small]["bytes_on_disk"] < 0.6 * found[dense]["bytes_on_disk"]
    assert run(["bench", dense, small, *sizes, "--dtype", "bfloat16"]) == 2
    assert "leave --dtype out, or cast before quantising" in capsys.readouterr().err
