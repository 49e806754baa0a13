"""Models by name: the same model as in memory, and nothing read that should not be."""

import json
import sys

import pytest
import torch
import transformers

import solpath
from conftest import CASES, batches, build, size_of_output
from solpath.errors import ConfigError, FileError, UnsupportedModelError
from solpath.model.extraction import extract
from solpath.pretrained import from_pretrained, load_processor

SHORT = solpath.SearchConfig(steps=4, scale_batches=2)


@pytest.mark.parametrize("model_type", sorted({label.split()[0] for label in CASES}))
def test_a_folder_is_loaded_as_its_own_class_with_its_head(model_type, tmp_path):
    model = build(model_type)
    model.save_pretrained(tmp_path)
    loaded = from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    assert not loaded.training
    expected = model.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in loaded.state_dict().items())
    empty = from_pretrained(tmp_path, device="meta")
    assert {p.device.type for p in empty.parameters()} == {"meta"}
    assert (
        solpath.find_pairs(empty) == solpath.find_pairs(str(tmp_path)) == solpath.find_pairs(model)
    )


def test_pairs_of_a_name_need_its_config_only(tmp_path):
    model = build("llama")
    model.config.architectures = ["LlamaForCausalLM"]
    model.config.save_pretrained(tmp_path)
    assert solpath.find_pairs(tmp_path) == solpath.find_pairs(model)
    with pytest.raises(FileError, match=r"model\.safetensors"):
        from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "method", ["spp", "random", "magnitude", "taylor", "iterative", "released"]
)
def test_a_name_gives_the_path_of_the_model(method, bert, tmp_path):
    bert.save_pretrained(tmp_path)
    released = {"steps": 3, "loss": size_of_output}
    options = {"iterative": {"stages": 2}, "released": released}.get(method, {})

    def order(model):
        if method == "spp":
            return solpath.search(model, batches(bert), SHORT, progress=False)
        return solpath.baselines.METHODS[method](model, iter(batches(bert)), **options)

    found, expected = order(str(tmp_path)), order(bert)
    assert torch.equal(found.order(), expected.order())
    assert found.fingerprint == expected.fingerprint


def test_extraction_by_name(bert, tmp_path):
    bert.save_pretrained(tmp_path / "dense")
    path = solpath.baselines.magnitude(tmp_path / "dense", batches(bert))
    plan = path.plan(sparsity=0.4)
    small, expected = extract(tmp_path / "dense", plan), extract(bert, plan)
    batch = batches(bert)[0]
    with torch.no_grad():
        assert torch.equal(small(**batch).last_hidden_state, expected(**batch).last_hidden_state)
    solpath.save(small, tmp_path / "small")
    with pytest.raises(UnsupportedModelError, match=r"already extracted.*solpath\.load"):
        solpath.search(tmp_path / "small", batches(bert))


def test_the_model_goes_where_the_batches_are(bert, tmp_path, monkeypatch):
    bert.save_pretrained(tmp_path)
    places = []
    real = solpath.loading.from_pretrained

    def load(name, *, device, dtype=None):
        places.append(torch.device(device).type)
        return real(name, device=device, dtype=dtype)

    monkeypatch.setattr(solpath.loading, "from_pretrained", load)
    there = [{key: value.to("meta") for key, value in batch.items()} for batch in batches(bert)]
    solpath.loading.for_batches(tmp_path, there)
    assert places == ["meta"]
    solpath.loading.for_batches(tmp_path, iter(batches(bert)))
    assert places == ["meta", "meta", "cpu"]  # its size, then its weights


def test_the_dtype_is_that_of_the_files_or_the_one_asked(tmp_path):
    build("bert").bfloat16().save_pretrained(tmp_path)
    assert from_pretrained(tmp_path).dtype == torch.bfloat16
    assert from_pretrained(tmp_path, device="meta").dtype == torch.bfloat16
    assert from_pretrained(tmp_path, dtype=torch.float32).dtype == torch.float32


def test_an_unknown_type_is_refused_before_weights_are_looked_for(tmp_path):
    for name in ("mamba", "made-up"):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": name}))
        with pytest.raises(UnsupportedModelError, match=name):
            from_pretrained(tmp_path)


@pytest.mark.parametrize("method", ["torchao", "bitsandbytes", "gptq", "awq", "fp8", "gguf"])
def test_a_folder_of_packed_weights_is_refused_before_they_are_looked_for(method, tmp_path):
    config = build("llama").config.to_dict() | {"quantization_config": {"quant_method": method}}
    (tmp_path / "config.json").write_text(json.dumps(config, default=str))
    for read in (from_pretrained, solpath.find_pairs):
        with pytest.raises(UnsupportedModelError, match=rf"quantization_config is of '{method}'"):
            read(tmp_path)


def test_pickled_weights_and_code_are_never_read(tmp_path):
    model = build("bert")
    config = model.config.to_dict() | {
        "architectures": ["Evil"],
        "auto_map": {"AutoConfig": "evil.Config", "AutoModel": "evil.Evil"},
    }
    (tmp_path / "config.json").write_text(json.dumps(config, default=str))
    (tmp_path / "evil.py").write_text("raise SystemExit('was run')\n")
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(FileError, match="safetensors"):
        from_pretrained(tmp_path)
    model.save_pretrained(tmp_path / "safe")
    (tmp_path / "config.json").rename(tmp_path / "safe" / "config.json")
    (tmp_path / "evil.py").rename(tmp_path / "safe" / "evil.py")
    assert type(from_pretrained(tmp_path / "safe")) is transformers.BertModel


def test_weights_that_are_missing_are_not_made_up(tmp_path):
    model = build("bert")
    model.config.architectures = None
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["architectures"] = ["BertForSequenceClassification"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        FileError, match=r"BertForSequenceClassification lack classifier\.bias and 1 more"
    ):
        from_pretrained(tmp_path)


def test_damaged_files_are_named(bert, tmp_path):
    bert.save_pretrained(tmp_path)
    weights = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights[:1000])
    with pytest.raises(FileError, match="cannot load"):
        from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(weights)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"hidden_size": "wide"}))
    with pytest.raises(FileError, match="cannot load"):
        from_pretrained(tmp_path)


def test_names_that_lead_nowhere(tmp_path):
    (tmp_path / "file").write_text("")
    for name in (tmp_path / "nothing", tmp_path / "file", "a/b/c", "../up"):
        with pytest.raises(FileError, match="no such folder, and not a hub id"):
            from_pretrained(name)
        with pytest.raises(FileError, match="no such folder, and not a hub id"):
            load_processor(name)
    with pytest.raises(FileError, match="cannot load nobody/nothing"):
        from_pretrained("nobody/nothing")
    with pytest.raises(FileError, match="cannot load"):
        load_processor(tmp_path)


def test_timm_ids_name_the_extra(tmp_path, monkeypatch):
    config = {"architecture": "vit_tiny_patch16_224", "num_classes": 3, "pretrained_cfg": {}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ConfigError, match=r"pip install 'solpath\[timm\]'"):
        from_pretrained(tmp_path)


def test_a_timm_model_is_loaded_with_its_head(tmp_path):
    try:
        import timm
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"timm: {error}")
    from safetensors.torch import save_file

    sizes = {"depth": 1, "embed_dim": 12, "num_heads": 2, "img_size": 32}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=3, **sizes).eval()
    save_file(model.state_dict(), tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = {"architecture": "vit_tiny_patch16_224", "num_classes": 3, "model_args": sizes}
    config |= {"label_names": ["a", "b", "c"], "pretrained_cfg": {"input_size": [3, 32, 32]}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = from_pretrained(tmp_path)
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(loaded(pixels).logits, model(pixels))
