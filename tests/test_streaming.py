"""A cut from disk to disk is the cut in memory, and holds a few weights at a time."""

import hashlib
import json
import weakref
from dataclasses import replace

import accelerate
import pytest
import torch
from safetensors.torch import load_file, save_file, save_model

import solpath
from conftest import build, inputs
from plans import random_plan
from solpath.arch import lookup, register, table
from solpath.errors import (
    BudgetError,
    ConfigError,
    FileError,
    FingerprintError,
    UnsupportedModelError,
)
from solpath.loading import off_loaded
from solpath.model.discovery import find_pairs
from solpath.model.fingerprint import fingerprint, values_digest
from solpath.model.linear import linear_map
from solpath.planning.plan import Plan
from solpath.pretrained import from_pretrained
from solpath.reading import DTYPES
from solpath.running.forward import forward
from solpath.storing import shards
from solpath.storing.shards import Stored, write_file

FRACTIONS = (0.5, 0.3, 1.0, 0.7)


def saved(label, folder, **sizes):
    """A checkpoint of a tiny model, the model, and a plan for it."""
    model = build(label, **sizes)
    model.save_pretrained(folder)
    model = from_pretrained(folder)
    return model, random_plan(model, FRACTIONS)


def contents(folder):
    """All files of a folder, without the time."""
    files = {file.name: file.read_bytes() for file in folder.iterdir()}
    head = json.loads(files.pop("solpath.json"))
    del head["checksum"], head["provenance"]["time"]
    return files, head


def check_both_ways(folder, plan, **options):
    """Cut a checkpoint in memory and from disk to disk, and compare all files."""
    solpath.save(solpath.extract(folder / "dense", plan), folder / "memory", **options)
    found = solpath.extract(folder / "dense", plan, out=folder / "disk", **options)
    assert found == folder / "disk"
    assert contents(folder / "disk") == contents(folder / "memory")
    assert {file.name for file in folder.iterdir()} == {"dense", "memory", "disk"}


@pytest.mark.parametrize(
    "label",
    [
        "bert",
        "gemma3_text",  # gains, tied embeddings, grouped heads
        "gpt2",  # one layer for three pairs, tied embeddings
        "gpt_oss",  # experts with biases
        "marian",  # positions that are computed and in no file
        "mixtral",  # experts that transformers puts together
        "swin",  # buffers that no state_dict has
        "t5",
        "wav2vec2",  # a weight norm
    ],
)
def test_a_cut_from_disk_to_disk_is_the_cut_in_memory(label, tmp_path):
    _, plan = saved(label, tmp_path / "dense")
    check_both_ways(tmp_path, plan)


def test_shards_and_half_precision_stay_what_they_are(tmp_path):
    build("llama").bfloat16().save_pretrained(tmp_path / "dense", max_shard_size="20KB")
    assert len(list((tmp_path / "dense").glob("*.safetensors"))) > 1
    model = from_pretrained(tmp_path / "dense")
    check_both_ways(tmp_path, random_plan(model, FRACTIONS), max_shard_size="10KB")
    assert len(list((tmp_path / "disk").glob("*.safetensors"))) > 1


@pytest.mark.parametrize("label", ["bert", "gpt2"])
def test_rotated_pairs_are_turned_before_they_are_cut(label, tmp_path):
    model, plan = saved(label, tmp_path / "dense")
    generator = torch.Generator().manual_seed(1)
    basis = {
        pair.name: torch.randn(pair.heads, pair.width, pair.width, generator=generator).double()
        for pair in find_pairs(model)
        if pair.kind in ("qk", "vo")
    }
    plan = replace(plan, basis=basis)
    check_both_ways(tmp_path, plan)
    lost = Plan.from_dict(plan.to_dict())
    with pytest.raises(FingerprintError, match=r"basis of .* is not in this plan"):
        solpath.extract(tmp_path / "dense", lost, out=tmp_path / "lost")


def test_tied_weights_are_written_once(tmp_path):
    _, plan = saved("llama", tmp_path / "dense", tie_word_embeddings=True)
    check_both_ways(tmp_path, plan)
    loaded = solpath.load(tmp_path / "disk")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


@pytest.mark.parametrize(
    ("label", "sizes"),
    [("llama", {"tie_word_embeddings": True}), ("gpt2", {}), ("t5", {}), ("bart", {})],
)
def test_a_tied_weight_may_lie_in_the_file_under_another_name(label, sizes, tmp_path):
    """safetensors keeps the first name by the alphabet, and transformers that of the embedding."""
    model, plan = saved(label, tmp_path / "dense", **sizes)
    file = tmp_path / "dense" / "model.safetensors"
    names = set(load_file(file))
    save_model(model, str(file), metadata={"format": "pt"})
    assert set(load_file(file)) != names
    check_both_ways(tmp_path, plan)
    (tmp_path / "scratch").mkdir()
    away = off_loaded(tmp_path / "dense", tmp_path / "scratch")
    assert torch.equal(forward(away, inputs(model)), forward(model, inputs(model)))


@pytest.mark.parametrize("version", [1, 2])
def test_another_model_is_refused_and_nothing_is_left(version, tmp_path):
    model, plan = saved("bert", tmp_path / "dense")
    plan = replace(plan, fingerprint=fingerprint(model, plan.pairs, version=version))
    check_both_ways(tmp_path, plan)
    pair = plan.pairs[3]
    with torch.no_grad():
        linear_map(model, pair.left[0].module).bias[0] += 1
    model.save_pretrained(tmp_path / "other")
    before = sorted(file.name for file in tmp_path.iterdir())
    with pytest.raises(FingerprintError, match=rf"1 of 6 pairs, first {pair.name}"):
        solpath.extract(tmp_path / "other", plan, out=tmp_path / "out")
    assert sorted(file.name for file in tmp_path.iterdir()) == before
    solpath.extract(tmp_path / "other", plan, out=tmp_path / "out", check=False)
    build("llama").save_pretrained(tmp_path / "llama")
    with pytest.raises(FingerprintError, match="missing"):
        solpath.extract(tmp_path / "llama", plan, out=tmp_path / "new", check=False)


def test_a_few_weights_are_held_at_a_time(tmp_path, monkeypatch):
    _, plan = saved("llama", tmp_path / "dense")
    held, most = [], []
    real = shards._value

    def value(name, tensor):
        most.append(sum(ref() is not None for ref in held))
        found = real(name, tensor)
        held.append(weakref.ref(found))
        return found

    monkeypatch.setattr(shards, "_value", value)
    solpath.extract(tmp_path / "dense", plan, out=tmp_path / "out")
    assert len(held) > 20
    assert max(most) <= 2


def test_saving_holds_no_copy_of_the_weights(tmp_path, monkeypatch):
    model, plan = saved("bert", tmp_path / "dense")
    small = solpath.extract(model, plan)
    for parameter in small.parameters():  # as a weight that was transposed in place is
        if parameter.dim() == 2:
            parameter.data = parameter.data.mT.contiguous().mT
    made = []
    real = shards._value

    def value(name, tensor):
        assert sum(ref() is not None for ref in made) <= 2
        found = real(name, tensor)
        made.append(weakref.ref(found))
        return found

    monkeypatch.setattr(shards, "_value", value)
    solpath.save(small, tmp_path / "out")
    for name, parameter in solpath.load(tmp_path / "out").named_parameters():
        assert torch.equal(parameter, small.get_parameter(name))


def test_a_file_is_that_of_safetensors(tmp_path):
    tensors = {f"a {i}": torch.ones(i, 3).to(dtype) for i, dtype in enumerate(DTYPES)}
    tensors |= {"b": torch.randn(5), "scalar": torch.tensor(2.5), "ä": torch.zeros(3, 0, 2)}
    stored = {n: Stored(t.dtype, tuple(t.shape), lambda t=t: t) for n, t in tensors.items()}
    digest = write_file(tmp_path / "own", stored)
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    written = (tmp_path / "own").read_bytes()
    assert written == (tmp_path / "theirs").read_bytes()
    assert digest == hashlib.sha256(written).hexdigest()


def test_arguments_that_do_not_go_together_are_refused(bert, tmp_path):
    plan = random_plan(bert, FRACTIONS)
    with pytest.raises(ConfigError, match=r"save\(extract\(model, plan\), folder\)"):
        solpath.extract(bert, plan, out=tmp_path / "out")
    with pytest.raises(ConfigError, match="are for out="):
        solpath.extract(bert, plan, overwrite=True)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(FileError, match="not empty"):
        solpath.extract(tmp_path / "nowhere", plan, out=tmp_path / "full")
    with pytest.raises(FileError, match="nowhere"):
        solpath.extract(tmp_path / "nowhere", plan, out=tmp_path / "out")
    assert [file.name for file in tmp_path.iterdir()] == ["full"]


def test_what_transformers_holds_in_two_dtypes_is_refused(tmp_path):
    model, plan = saved("t5", tmp_path / "dense")
    model.half().save_pretrained(tmp_path / "half")
    with pytest.raises(UnsupportedModelError, match=r"holds .*\.wo\.weight in float32"):
        solpath.extract(tmp_path / "half", plan, out=tmp_path / "out", check=False)


def test_a_table_that_was_registered_needs_a_model_in_memory(tmp_path, monkeypatch):
    _, plan = saved("llama", tmp_path / "dense")
    monkeypatch.setattr(table, "_REGISTERED", dict(table._REGISTERED))
    register("llama", *lookup("mistral"))
    with pytest.raises(UnsupportedModelError, match=r"save\(extract"):
        solpath.extract(tmp_path / "dense", plan, out=tmp_path / "out")


# -------------------------------------------------------------------------------------- fingerprint


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_a_digest_is_one_of_numbers(dtype):
    values = torch.randn(3, 2**18 + 7, generator=torch.Generator().manual_seed(0)).to(dtype)
    values[0, :9] = torch.tensor([0.0, -0.0, 1.0, torch.inf, -torch.inf, 2.0, 0.5, 3.0, -1.0])
    wider = [
        wide for wide in (torch.float32, torch.float64) if values.to(wide).to(dtype).equal(values)
    ]
    digest = values_digest(values)
    assert {values_digest(values.to(wide)) for wide in wider} == {digest}
    assert values_digest(values.mT.contiguous().mT) == digest
    for place in (0, -1):  # a sign of zero, and the last number of all
        other = values.clone()
        other.flatten()[place] *= -1
        assert values_digest(other) != digest
    assert values_digest(values[:, :-1]) != values_digest(values.flatten()[: 3 * (2**18 + 6)])


def test_weights_of_another_dtype_are_accepted_if_they_are_the_same(tmp_path):
    build("llama").bfloat16().save_pretrained(tmp_path)
    half, wide = from_pretrained(tmp_path), from_pretrained(tmp_path, dtype=torch.float32)
    found = random_plan(wide, FRACTIONS), random_plan(half, FRACTIONS)
    assert found[0].fingerprint.digests == found[1].fingerprint.digests
    assert [plan.fingerprint.dtype for plan in found] == ["float32", "bfloat16"]
    for plan in found:
        for model in (half, wide, tmp_path):
            solpath.extract(model, plan)
        solpath.extract(tmp_path, plan, out=tmp_path / "out", overwrite=True)


def test_sizes_are_those_of_the_dtype_that_is_cut(tmp_path):
    build("llama").bfloat16().save_pretrained(tmp_path)
    wide = from_pretrained(tmp_path, dtype=torch.float32)
    plan = random_plan(wide, FRACTIONS)
    own = random_plan(from_pretrained(tmp_path), FRACTIONS).achieved
    assert (own.bytes, own.cache) != (plan.achieved.bytes, plan.achieved.cache)
    assert solpath.extract(wide, plan).solpath_plan is plan
    assert solpath.extract(tmp_path, plan).solpath_plan.achieved == own
    solpath.extract(tmp_path, plan, out=tmp_path / "out")
    assert solpath.load(tmp_path / "out").solpath_plan.achieved == own
    for measure in ("bytes", "cache"):
        share, count = (replace(plan, asked={measure: value}) for value in (0.5, 5000))
        solpath.extract(tmp_path, share)
        for options in ({}, {"out": tmp_path / "new"}):
            with pytest.raises(BudgetError, match=rf"5,000 of {measure} in torch.*a share"):
                solpath.extract(tmp_path, count, **options)


def test_rounded_weights_are_refused_with_both_dtypes():
    model = build("llama")
    plan = random_plan(model, FRACTIONS)
    said = r"differ in 6 of 6 pairs.*from float32 weights, and these are bfloat16.*in float32 and"
    with pytest.raises(FingerprintError, match=said):
        solpath.extract(model.bfloat16(), plan)


def test_digests_of_the_first_version_hold_as_they_did(bert):
    pairs = find_pairs(bert)
    plan = random_plan(bert, FRACTIONS)
    sides = [[side.module for side in pair.sides] for pair in pairs]
    raw = [
        b"".join(
            p.detach().numpy().tobytes()
            for path in group
            for p in bert.get_submodule(path).parameters()
        )
        for group in sides
    ]
    digests = {p.name: hashlib.sha256(b).hexdigest()[:16] for p, b in zip(pairs, raw, strict=True)}
    value = plan.to_dict()
    value["fingerprint"] = {"architecture": "BertModel", "digests": digests}
    old = Plan.from_dict(value)
    assert old.fingerprint.version == 1
    solpath.extract(bert, old)
    with pytest.raises(FingerprintError, match="older version and fit one dtype only"):
        solpath.extract(bert.double(), old)
    for fault in ({"version": 3}, {"version": "1"}, {"dtype": 3}):
        with pytest.raises(ValueError, match=r"fingerprint|whole number|wrong type"):
            Plan.from_dict(value | {"fingerprint": value["fingerprint"] | fault})


@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_off_loaded_weights_are_read_where_they_are(where, tmp_path):
    model, plan = saved("llama", tmp_path / "dense", tie_word_embeddings=True)
    small = solpath.extract(model, plan)
    solpath.save(small, tmp_path / "expected")
    for part in (model, small):
        if where == "cpu":
            accelerate.cpu_offload(part)
        else:
            accelerate.disk_offload(part, tmp_path / f"offload {len(list(tmp_path.iterdir()))}")
        assert next(part.parameters()).is_meta
    assert fingerprint(model, plan.pairs) == plan.fingerprint
    solpath.save(small, tmp_path / "small")
    expected = load_file(tmp_path / "expected" / "model.safetensors")
    found = load_file(tmp_path / "small" / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in found.items())


def test_a_model_without_data_is_not_saved(bert, tmp_path):
    small = solpath.extract(bert, random_plan(bert, FRACTIONS)).to("meta")
    with pytest.raises(solpath.SolpathError, match="has no data"):
        solpath.save(small, tmp_path / "empty")
    assert not any(tmp_path.iterdir())
