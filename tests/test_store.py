"""What is saved is what is loaded, and nothing else is ever loaded."""

import hashlib
import json
import shutil
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import solpath
from conftest import build, inputs
from solpath import files
from solpath.errors import ConfigError, FileError
from solpath.model.counting import count_costs
from solpath.model.discovery import find_pairs
from solpath.model.extraction import extract
from solpath.model.fingerprint import fingerprint
from solpath.planning.budget import Budget
from solpath.planning.constraints import Constraints
from solpath.planning.making import make_plan
from solpath.reading import sealed
from solpath.storing import manifest, shards
from solpath.storing import writing as store
from solpath.storing.skeleton import state_of


def shrink(model, sparsity=0.5, seed=0):
    """Extract a random plan."""
    pairs = find_pairs(model)
    generator = torch.Generator().manual_seed(seed)
    score = {p.name: torch.rand(p.heads, p.width, generator=generator) for p in pairs}
    costs = count_costs(model, pairs, inputs(model, samples=1))
    energy = {p.name: torch.ones(p.heads, p.left[0].repeat + 1, p.width) for p in pairs if p.norms}
    plan = make_plan(
        pairs,
        score,
        costs,
        fingerprint(model, pairs),
        Budget("sparsity", sparsity),
        Constraints(),
        energy,
        {},
    )
    return extract(model, plan)


def run(model):
    with torch.no_grad():
        return [v for v in model(**inputs(model)).to_tuple() if isinstance(v, torch.Tensor)]


def assert_same(one, two):
    """Bitwise equal in everything a user can see."""
    assert type(one) is type(two)
    a, b = state_of(one), state_of(two)
    assert list(a) == list(b)
    for name in a:
        assert a[name].dtype == b[name].dtype
        assert torch.equal(a[name], b[name]), name
    assert list(one.state_dict()) == list(two.state_dict())
    assert one.config == two.config
    assert one.config._attn_implementation == two.config._attn_implementation
    assert not two.training
    assert one.solpath_plan.to_dict() == two.solpath_plan.to_dict()
    for left, right in zip(run(one), run(two), strict=True):
        assert torch.equal(left, right)


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.95])
def test_roundtrip(model, sparsity, tmp_path):
    small = shrink(model, sparsity)
    solpath.save(small, tmp_path / "out")
    before = torch.random.get_rng_state()
    loaded = solpath.load(tmp_path / "out")
    assert torch.equal(before, torch.random.get_rng_state())
    assert_same(small, loaded)
    assert sum(p.numel() for p in small.parameters()) == sum(p.numel() for p in loaded.parameters())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_roundtrip_in_other_precisions(name, dtype, tmp_path):
    small = shrink(build(name)).to(dtype)
    solpath.save(small, tmp_path / "out")
    assert_same(small, solpath.load(tmp_path / "out"))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_implementation_is_kept(attention, tmp_path):
    model = build("bert")
    model.set_attn_implementation(attention)
    small = shrink(model)
    solpath.save(small, tmp_path / "out")
    assert_same(small, solpath.load(tmp_path / "out"))


@pytest.mark.parametrize("experts", ["eager", "grouped_mm"])
def test_the_way_that_experts_run_is_kept(experts, tmp_path):
    small = shrink(build("mixtral", experts_implementation=experts))
    solpath.save(small, tmp_path / "out")
    loaded = solpath.load(tmp_path / "out")
    assert_same(small, loaded)
    assert loaded.config._experts_implementation == experts


def test_tied_weights_are_stored_once_and_stay_tied(tmp_path):
    small = shrink(build("llama", tie_word_embeddings=True))
    assert small.lm_head.weight is small.model.embed_tokens.weight
    solpath.save(small, tmp_path / "out")
    loaded = solpath.load(tmp_path / "out")
    assert "lm_head.weight" not in load_file(tmp_path / "out" / "model.safetensors")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert_same(small, loaded)


@pytest.mark.parametrize("name", ["bert", "roberta", "vit", "deit", "swin"])
@pytest.mark.parametrize("masked", [False, True])
def test_models_with_and_without_optional_parts(name, masked, tmp_path):
    torch.manual_seed(0)
    config = build(name).config
    base = transformers.AutoModel.from_config(config).__class__
    options = {"add_pooling_layer": False}
    if name in ("vit", "deit", "swin"):
        options["use_mask_token"] = masked
    small = shrink(base(config, **options).eval())
    solpath.save(small, tmp_path / "out")
    loaded = solpath.load(tmp_path / "out")
    assert loaded.pooler is None
    if "use_mask_token" in options:
        assert (loaded.embeddings.mask_token is not None) == masked
    assert_same(small, loaded)


def test_trained_weights_are_what_is_saved(tmp_path):
    small = shrink(build("bert"))
    with torch.no_grad():
        for parameter in small.parameters():
            parameter.add_(torch.randn_like(parameter))
    solpath.save(small.train(), tmp_path / "out")
    assert_same(small.eval(), solpath.load(tmp_path / "out"))


def test_generation_settings_are_kept(tmp_path):
    small = shrink(build("llama"))
    small.generation_config.max_new_tokens = 7
    solpath.save(small, tmp_path / "out")
    loaded = solpath.load(tmp_path / "out")
    assert loaded.generation_config.to_dict() == small.generation_config.to_dict()
    prompt = torch.ones(1, 3, dtype=torch.long)
    assert torch.equal(small.generate(prompt), loaded.generate(prompt))


def test_shards(model, tmp_path):
    small = shrink(model)
    solpath.save(small, tmp_path / "one")
    solpath.save(small, tmp_path / "many", max_shard_size="10KB")
    assert len(list((tmp_path / "many").glob("model-*.safetensors"))) > 1
    assert not (tmp_path / "many" / "model.safetensors").exists()
    assert_same(solpath.load(tmp_path / "one"), solpath.load(tmp_path / "many"))


def test_loaded_model_needs_its_files_no_more(tmp_path):
    small = shrink(build("bert"))
    solpath.save(small, tmp_path / "out")
    loaded = solpath.load(tmp_path / "out")
    (tmp_path / "out" / "model.safetensors").write_bytes(b"")
    assert_same(small, loaded)


def test_saved_again_is_the_same_weights(tmp_path):
    solpath.save(shrink(build("llama")), tmp_path / "a")
    solpath.save(solpath.load(tmp_path / "a"), tmp_path / "b")
    a, b = (tmp_path / n / "model.safetensors" for n in "ab")
    assert a.read_bytes() == b.read_bytes()


def test_contents_of_the_folder(tmp_path):
    small = shrink(build("bert"))
    solpath.save(small, tmp_path / "out")
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert names == {"config.json", "model.safetensors", "solpath.json"}
    head = json.loads((tmp_path / "out" / "solpath.json").read_text())
    assert (head["format"], head["version"]) == ("solpath.model", 2)
    assert (head["class"], head["model_type"], head["dtype"]) == ("BertModel", "bert", "float32")
    assert head["plan"] == json.loads(json.dumps(small.solpath_plan.to_dict()))
    assert set(head["provenance"]) == {"solpath", "torch", "transformers", "time"}
    for name, digest in head["digests"].items():
        data = (tmp_path / "out" / name).read_bytes()
        assert hashlib.sha256(data).hexdigest() == digest


class Tokenizer:
    def save_pretrained(self, folder):
        (Path(folder) / "tokenizer.json").write_text("{}")
        (Path(folder) / "config.json").write_text("{}")  # must not win over the model's


def test_tokenizer_files_are_added(tmp_path):
    small = shrink(build("bert"))
    solpath.save(small, tmp_path / "out", tokenizer=Tokenizer())
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
    assert_same(small, solpath.load(tmp_path / "out"))
    with pytest.raises(ConfigError, match="save_pretrained"):
        solpath.save(small, tmp_path / "other", tokenizer="bert-base")


# ---------------------------------------------------------------- refusals and atomicity of save


def test_dense_model_is_refused(bert, tmp_path):
    with pytest.raises(solpath.SolpathError, match=r"save_pretrained"):
        solpath.save(bert, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_load_cannot_rebuild_is_not_saved(tmp_path):
    small = shrink(build("bert"))
    small.extra = torch.nn.Linear(2, 2)
    with pytest.raises(solpath.SolpathError, match=r"extra\.bias"):
        solpath.save(small, tmp_path / "out")
    del small.extra
    small.encoder.layer[0].output.dense.double()
    with pytest.raises(solpath.SolpathError, match="float64"):
        solpath.save(small, tmp_path / "out")
    small.float().__class__ = type("Own", (transformers.BertModel,), {})
    with pytest.raises(solpath.SolpathError, match="Own"):
        solpath.save(small, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("size", ["5 elephants", None, "GB"])
def test_bad_shard_size(size, tmp_path):
    with pytest.raises(ConfigError, match="max_shard_size"):
        solpath.save(shrink(build("bert")), tmp_path / "out", max_shard_size=size)
    assert not list(tmp_path.iterdir())


def snapshot(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_overwrite(tmp_path):
    solpath.save(shrink(build("bert"), 0.2), tmp_path / "out")
    (tmp_path / "out" / "old.txt").write_text("old")
    small = shrink(build("bert"), 0.6)
    before = snapshot(tmp_path)
    with pytest.raises(FileError, match="not empty"):
        solpath.save(small, tmp_path / "out")
    assert snapshot(tmp_path) == before
    solpath.save(small, tmp_path / "out", overwrite=True)
    assert_same(small, solpath.load(tmp_path / "out"))
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert not (tmp_path / "out" / "old.txt").exists()


FULL = OSError(28, "No space left on device")


@pytest.mark.parametrize("error", [FULL, RuntimeError("bug"), KeyboardInterrupt()])
@pytest.mark.parametrize(
    ("home", "name"),
    [
        (store, "write_shards"),
        (shards, "values_as_bytes"),
        (store, "json_bytes"),
        (files, "sync"),
        (files, "_rename_with"),
    ],
)
def test_failed_save_leaves_the_old_folder(home, name, error, tmp_path, monkeypatch):
    solpath.save(shrink(build("bert"), 0.2), tmp_path / "out")
    small, before = shrink(build("bert"), 0.6), snapshot(tmp_path)

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(home, name, fail)
    with pytest.raises(FileError if error is FULL else type(error)):
        solpath.save(small, tmp_path / "out", overwrite=True)
    with pytest.raises(FileError if error is FULL else type(error)):
        solpath.save(small, tmp_path / "new")
    monkeypatch.undo()
    assert snapshot(tmp_path) == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_output_is_checked_before_any_work(tmp_path, monkeypatch):
    def refused(*_, **__):
        raise PermissionError(13, "Permission denied")

    small = shrink(build("bert"))
    (tmp_path / "file").write_text("x")
    monkeypatch.setattr(store, "contents_of", None)
    with pytest.raises(FileError, match="is a file"):
        solpath.save(small, tmp_path / "file")
    monkeypatch.setattr(Path, "mkdir", refused)
    with pytest.raises(FileError, match="Permission denied"):
        solpath.save(small, tmp_path / "out")


# ------------------------------------------------------------------------------- damage and forgery


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder that is only read: a sharded LLaMA, so that every kind of file is there."""
    folder = tmp_path_factory.mktemp("saved") / "out"
    small = shrink(build("llama"))
    solpath.save(small, folder, max_shard_size="10KB")
    return folder, small


@pytest.fixture
def folder(tmp_path):
    """A copy of a saved BERT, free to damage."""
    solpath.save(shrink(build("bert")), tmp_path / "out")
    return tmp_path / "out"


def forge(folder, change, name="solpath.json"):
    """Change a JSON file, and make checksum and digests fit again, as a forger would."""
    value = json.loads((folder / name).read_text())
    change(value)
    (folder / name).write_text(json.dumps(value))
    reseal(folder)


def reseal(folder):
    head = json.loads((folder / "solpath.json").read_text())
    if isinstance(head.get("digests"), dict):
        for name in head["digests"]:
            if manifest.SHARD.fullmatch(name) or name.endswith(".json"):
                data = (folder / name).read_bytes() if (folder / name).is_file() else b""
                head["digests"][name] = hashlib.sha256(data).hexdigest()
    (folder / "solpath.json").write_text(json.dumps(sealed(head)))


def refused(folder, *words):
    """`load` must refuse, whether or not it compares digests, and say where and what."""
    for verify in (True, False):
        start = time.perf_counter()
        with pytest.raises(FileError) as caught:
            solpath.load(folder, verify=verify)
        assert time.perf_counter() - start < 2
        for word in words:
            assert word in str(caught.value)
    return str(caught.value)


def load_or_refuse(folder, **options):
    """The model, or None when there was a `FileError` that names the folder."""
    try:
        return solpath.load(folder, **options)
    except FileError as error:
        if str(folder) not in str(error):
            raise AssertionError("the file is not named") from error
        return None


def flip(data, position, mask):
    changed = bytearray(data)
    changed[position] ^= mask
    return bytes(changed)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_random_damage_is_found(saved, data):
    source, small = saved
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "out"
        shutil.copytree(source, folder)
        file = folder / data.draw(st.sampled_from(sorted(p.name for p in source.iterdir())))
        content = file.read_bytes()
        kind = data.draw(st.sampled_from(["flip", "cut", "insert", "zero", "repeat", "remove"]))
        at = data.draw(st.integers(0, len(content) - 1))
        size = data.draw(st.integers(1, 64))
        if kind == "remove":
            file.unlink()
        else:
            file.write_bytes(
                {
                    "flip": flip(content, at, data.draw(st.integers(1, 255))),
                    "cut": content[:at],
                    "insert": content[:at] + data.draw(st.binary(min_size=1)) + content[at:],
                    "zero": content[:at]
                    + bytes(len(content[at : at + size]))
                    + content[at + size :],
                    "repeat": content[:at] + content[max(0, at - size) :],
                }[kind]
            )
        loaded = load_or_refuse(folder, verify=True)
        if loaded is not None:
            assert_same(small, loaded)
        load_or_refuse(folder)  # damaged weights may be loaded, or refused


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_random_forgery_is_never_another_error(saved, data):
    """Any value of any field replaced by any other, all digests made to fit."""
    source, _ = saved
    strange = st.sampled_from(
        [None, True, -1, 0, 1, 1.5, 10**9, 10**12, 10**400, "", "x", [], {}, [[]], {"a": 1}]
    )
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "out"
        shutil.copytree(source, folder)
        name = data.draw(st.sampled_from(sorted(p.name for p in source.glob("*.json"))))
        value = json.loads((folder / name).read_text())
        at = value
        while True:
            keys = sorted(at) if isinstance(at, dict) else range(len(at))
            key = data.draw(st.sampled_from(list(keys)))
            if isinstance(at[key], dict | list) and at[key] and data.draw(st.booleans()):
                at = at[key]
                continue
            at[key] = data.draw(strange)
            break
        (folder / name).write_text(json.dumps(value))
        if name == "solpath.json" and not isinstance(value.get("digests"), dict):
            refused(folder, "digests")
            return
        reseal(folder)
        start = time.perf_counter()
        load_or_refuse(folder)
        assert time.perf_counter() - start < 5


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("format", "other"),
        ("version", 1),
        ("version", None),
        ("class", "PreTrainedModel"),
        ("class", "AutoModel"),
        ("class", "pipeline"),
        ("class", "os"),
        ("class", "models.bert.modeling_bert.BertModel"),
        ("class", "LlamaModel"),
        ("class", 3),
        ("model_type", "llama"),
        ("model_type", "gpt2"),
        ("dtype", "int8"),
        ("dtype", "save"),
        ("attention", "someone/kernel"),
        ("experts", "someone/kernel"),
        ("experts", ["eager"]),
        ("options", {"add_pooling_layer": 1}),
        ("options", {"config": True}),
        ("digests", {}),
        ("digests", {"config.json": 3}),
        ("digests", {"../config.json": "0" * 64}),
        ("digests", {"/etc/passwd": "0" * 64}),
        ("digests", {"model-00001-of-00002.safetensors/../../x": "0" * 64}),
        ("plan", []),
        ("plan", {}),
    ],
)
def test_forged_field_is_named(folder, field, value):
    def change(head):
        head[field] = value
        if field == "class":
            head["plan"]["fingerprint"]["architecture"] = value

    forge(folder, change)
    refused(folder, "solpath.json", field)


def first_row(plan):
    return next(rows for rows in plan["kept"].values() if len(rows[0]) > 2)[0]


@pytest.mark.parametrize("value", [-1, 10**6, 10**30, 1.0, True, None, "1", [1]])
def test_bad_index_is_refused(folder, value):
    forge(folder, lambda head: first_row(head["plan"]).__setitem__(1, value))
    refused(folder, "solpath.json", "kept[")


def test_duplicate_and_disordered_indices_are_refused(folder):
    def duplicate(head):
        row = first_row(head["plan"])
        row[1] = row[0]

    forge(folder, duplicate)
    refused(folder, "solpath.json", "kept[", "distinct")
    forge(folder, lambda head: first_row(head["plan"]).reverse())
    refused(folder, "solpath.json", "kept[", "ascending")


def test_nan_and_infinity_are_refused(folder):
    text = (folder / "solpath.json").read_text()
    for word in ("NaN", "Infinity", "-Infinity", "1e999"):
        value = json.loads(text)
        first_row(value["plan"])[0] = "HERE"
        (folder / "solpath.json").write_text(json.dumps(value).replace('"HERE"', word))
        refused(folder, "solpath.json", word)


@pytest.mark.parametrize(
    "change",
    [
        lambda plan: plan["pairs"].pop(),
        lambda plan: plan["pairs"][0].update(width=plan["pairs"][0]["width"] * 2),
        lambda plan: plan["pairs"][0].update(channels=2),
        lambda plan: plan["pairs"][0].update(heads=0),
        lambda plan: plan["pairs"][0]["right"].update(module="pooler.dense"),
        lambda plan: plan["pairs"][0].update(name="x"),
        lambda plan: plan["pairs"][0].update(surprise=1),
        lambda plan: plan["achieved"].update(params="many"),
        lambda plan: plan["fingerprint"].update(architecture="BertForMaskedLM"),
        lambda plan: plan["fingerprint"].update(digests=3),
        lambda plan: plan["kept"].popitem(),
        lambda plan: plan["kept"].update(x=[[0]]),
    ],
)
def test_plan_must_fit_the_model(folder, change):
    forge(folder, lambda head: change(head["plan"]))
    refused(folder, "solpath.json", "plan")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("vocab_size", 10**12),
        ("hidden_size", 10**9),
        ("num_hidden_layers", 10**9),
        ("intermediate_size", 10**10),
        ("num_attention_heads", 10**9),
        ("type_vocab_size", 2**62),
        ("max_position_embeddings", 10**12),
        ("num_labels", 10**9),
        ("vocab_size", 10**300),
        ("id2label", {"1": [10**12]}),
    ],
)
def test_absurd_sizes_are_refused_before_anything_is_built(folder, field, value):
    forge(folder, lambda config: config.update({field: value}), "config.json")
    # Positions are no size in every model; here the first thing that does not fit is named.
    refused(folder, "position_ids" if field == "max_position_embeddings" else "config.json")


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_size": 64},
        {"hidden_size": -32},
        {"hidden_size": 32.5},
        {"num_hidden_layers": 3},
        {"num_hidden_layers": 1},
        {"num_attention_heads": 0},
        {"num_attention_heads": 8},
        {"vocab_size": 61},
        {"model_type": "roberta"},
        {"model_type": None},
        {"hidden_act": "exec"},
        {"pruned_heads": {"0": [0]}, "hidden_size": "32"},
    ],
)
def test_config_must_fit_the_weights(folder, change):
    forge(folder, lambda config: config.update(change), "config.json")
    refused(folder, str(folder))


def test_code_from_elsewhere_is_never_asked_for(folder, monkeypatch):
    def network(*_, **__):
        raise AssertionError("asked for a file of the Hub")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", network)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", network)
    change = {"auto_map": {"AutoModel": "evil--evil.Evil"}, "trust_remote_code": True}
    change |= {"attn_implementation": "evil/kernel", "_attn_implementation": "evil/kernel"}
    forge(folder, lambda config: config.update(change), "config.json")
    assert type(solpath.load(folder)) is transformers.BertModel


@pytest.mark.parametrize("change", ["shape", "dtype", "rename", "extra", "missing"])
def test_wrong_tensor_is_named_before_data_is_read(folder, change, monkeypatch):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    name = "encoder.layer.0.intermediate.dense.weight"
    tensor = tensors.pop(name)
    tensors |= {
        "shape": {name: tensor.t().contiguous()},
        "dtype": {name: tensor.half()},
        "rename": {"other": tensor},
        "extra": {name: tensor, "other": tensor.clone()},
        "missing": {},
    }[change]
    save_file(tensors, file)
    reseal(folder)
    monkeypatch.setattr("solpath.storing.reading.read_data", None)
    refused(folder, "model.safetensors", "other" if change in ("rename", "extra") else name)


@pytest.mark.parametrize("place", ["../x.safetensors", "/etc/passwd", "a/b", 3, None, "\ud800"])
def test_shard_names_cannot_leave_the_folder(saved, tmp_path, place):
    shutil.copytree(saved[0], tmp_path / "out")
    index = tmp_path / "out" / "model.safetensors.index.json"

    def change(value):
        value["weight_map"][next(iter(value["weight_map"]))] = place

    forge(tmp_path / "out", change, index.name)
    refused(tmp_path / "out", index.name, "weight_map")


def test_shards_must_hold_what_the_index_says(saved, tmp_path):
    shutil.copytree(saved[0], tmp_path / "out")
    index = tmp_path / "out" / "model.safetensors.index.json"

    def change(value):
        places = value["weight_map"]
        one, *_, two = places
        places[one], places[two] = places[two], places[one]

    forge(tmp_path / "out", change, index.name)
    refused(tmp_path / "out", "weight_map")
    (tmp_path / "out" / "model-00001-of-00001.safetensors").write_bytes(b"")
    forge(tmp_path / "out", lambda head: head["digests"].pop(index.name))
    refused(tmp_path / "out", "digests")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "solpath.json"])
def test_links_out_of_the_folder(folder, name, tmp_path):
    (folder / name).rename(tmp_path / "outside")
    (folder / name).symlink_to(tmp_path / "outside")
    refused(folder, name, "out of the folder")
    # The cache of the Hub keeps files in <repo>/blobs and links to them from snapshots/<revision>.
    small = tmp_path / "repo" / "snapshots" / "main"
    shutil.copytree(folder, small, symlinks=True)
    (tmp_path / "repo" / "blobs").mkdir()
    (tmp_path / "outside").rename(tmp_path / "repo" / "blobs" / "abc")
    (small / name).unlink()
    (small / name).symlink_to("../../blobs/abc")
    assert type(solpath.load(small)) is transformers.BertModel


@pytest.mark.parametrize("name", ["config.json", "solpath.json"])
@pytest.mark.parametrize(
    "text",
    [
        "",
        "[1]",
        "[" * 200_000,
        '{"a":' * 100_000,
        '{"version": ' + "9" * 5000 + "}",
        '{"a": "\xff"}'.encode("latin-1"),
    ],
)
def test_json_bombs(folder, name, text):
    (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    if name != "solpath.json":
        reseal(folder)
    refused(folder, name)


@pytest.mark.parametrize("name", ["config.json", "solpath.json", "model.safetensors"])
def test_huge_and_special_files(folder, name):
    (folder / name).unlink()
    refused(folder, name)
    with (folder / name).open("wb") as stream:
        stream.write((10**6 if name.endswith("s") else 0).to_bytes(8, "little"))
        stream.truncate(2**40)  # sparse
    refused(folder, name)
    (folder / name).unlink()
    (folder / name).mkdir()
    refused(folder, name)


def test_header_length_is_checked_first(folder):
    file = folder / "model.safetensors"
    data = file.read_bytes()
    for length in (2**63, 2**40, len(data), 17 * 2**20):
        file.write_bytes(length.to_bytes(8, "little") + data[8:])
        refused(folder, "model.safetensors", "header")


def test_edited_config_is_refused_and_edited_weights_when_asked(folder):
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace("1e-12", "1e-10"))
    refused(folder, "config.json", "SHA-256")
    (folder / "config.json").write_text(text)
    weights = folder / "model.safetensors"
    weights.write_bytes(flip(weights.read_bytes(), -1, 1))
    solpath.load(folder)
    with pytest.raises(FileError, match=r"model\.safetensors.*SHA-256"):
        solpath.load(folder, verify=True)


def test_plan_of_another_model_cannot_be_saved(tmp_path):
    small = shrink(build("bert"))
    other = shrink(build("roberta"))
    small.solpath_plan = replace(other.solpath_plan)
    with pytest.raises(solpath.SolpathError, match="plan"):
        solpath.save(small, tmp_path / "out")


# --------------------------------------------------------------------------------------------- hub


class Hub:
    """A Hub in a local folder."""

    def __init__(self, root, monkeypatch):
        self.root, self.created, self.asked = root, [], []
        hub = self

        class Api:
            def __init__(self, token=None):
                self.token = token

            def create_repo(self, repo_id, *, private, exist_ok):
                hub.created.append((repo_id, private, exist_ok, self.token))

            def upload_folder(self, *, repo_id, folder_path, commit_message):
                shutil.copytree(folder_path, hub.root / repo_id, dirs_exist_ok=True)
                return f"https://hub/{repo_id}/commit/1"

        def download(repo_id, *, revision, token, allow_patterns):
            hub.asked.append((repo_id, revision, token, tuple(allow_patterns)))
            if not (hub.root / repo_id).is_dir():
                raise huggingface_hub.errors.LocalEntryNotFoundError("no such repository")
            return str(hub.root / repo_id)

        monkeypatch.setattr(huggingface_hub, "HfApi", Api)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", download)


def test_hub_roundtrip(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    hub = Hub(tmp_path / "hub", monkeypatch)
    small = shrink(build("bert"))
    small.config._name_or_path = str(tmp_path / "secret")
    url = solpath.push_to_hub(
        small, "me/small", tokenizer=Tokenizer(), private=True, token="t", commit_message="hi"
    )
    assert url == "https://hub/me/small/commit/1"
    assert hub.created == [("me/small", True, True, "t")]
    assert all(b"secret" not in data for data in snapshot(tmp_path / "hub").values())
    loaded = solpath.load("me/small", revision="main", token="t")
    small.config._name_or_path = ""
    assert_same(small, loaded)
    [(repo, revision, token, patterns)] = hub.asked
    assert (repo, revision, token) == ("me/small", "main", "t")
    assert not any(Path("code.py").match(p) or Path("model.bin").match(p) for p in patterns)


def test_local_folder_wins_over_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    hub = Hub(tmp_path / "hub", monkeypatch)
    solpath.save(shrink(build("bert")), "me/small")
    solpath.load("me/small")
    assert not hub.asked


def test_hub_errors_are_solpath_errors(tmp_path, monkeypatch):
    Hub(tmp_path / "hub", monkeypatch)
    with pytest.raises(FileError, match="no such repository"):
        solpath.load("me/none")
    for name in ("nowhere", "../up", "a/b/c", str(tmp_path / "none"), "", "a b/c"):
        with pytest.raises(FileError):
            solpath.load(name)

    def offline(*_, **__):
        raise huggingface_hub.errors.OfflineModeIsEnabled("offline")

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", offline)
    with pytest.raises(solpath.SolpathError, match="offline"):
        solpath.push_to_hub(shrink(build("bert")), "me/small")
    with pytest.raises(solpath.SolpathError, match="not extracted"):
        solpath.push_to_hub(build("bert"), "me/small")
