"""Models in ONNX and OpenVINO: other shapes than traced, padding, caches, int8, what is refused."""

import importlib.util
import json

import pytest
import torch

import solpath
from conftest import build, inputs
from plans import random_plan
from solpath.errors import ConfigError, ExportError
from solpath.exporting.parity import check_parity
from solpath.exporting.tracing import check_traceable, checked_batches, trace

FRACTIONS = (0.5, 0.25, 0.75)
SUPPRESSED = list(range(3, 50))
SHAPES = {"random", "given", "one more sample", "one sample", "longer texts"}


def single(model):
    """Return a batch of one sample, which must be no limit of a graph that is traced for it."""
    return {name: value[:1] for name, value in inputs(model).items()}


def cut(label, fractions=FRACTIONS, **changes):
    dense = build(label, **changes)
    return solpath.extract(dense, random_plan(dense, fractions))


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    small = cut("bert", num_hidden_layers=1)
    folder = tmp_path_factory.mktemp("bert") / "out"
    options = {"int8": True, "pooling": "mean"}
    return small, solpath.export(small, folder, "onnx", batch=single(small), **options)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    small = cut("llama", num_hidden_layers=1)
    small.generation_config.suppress_tokens = SUPPRESSED
    folder = tmp_path_factory.mktemp("llama") / "out"
    return small, solpath.export(small, folder, "onnx", batch=single(small))


def ragged(samples, tokens):
    generator = torch.Generator().manual_seed(1)
    mask = (torch.arange(tokens) < torch.tensor([[tokens], [3], [5]])[:samples]).long()
    return torch.randint(1, 57, (samples, tokens), generator=generator), mask


def test_onnx_is_the_model_on_every_shape(bert):
    small, exported = bert
    assert {row.inputs for row in exported.parity if "int8" not in row.inputs} == SHAPES
    assert max(row.difference for row in exported.parity if "int8" not in row.inputs) <= 1e-5
    assert "forward" not in vars(small)  # tracing leaves nothing in the model


def test_padding_changes_nothing(bert):
    from solpath.exporting.onnx_graphs import FILE, Graph

    small, exported = bert
    graph = Graph(exported.folder / FILE, threads=1)
    ids, mask = ragged(3, 13)
    batch = {"input_ids": ids, "attention_mask": mask, "token_type_ids": 1 - mask}
    found, _ = graph(batch)
    other, _ = graph(batch | {"input_ids": torch.where(mask == 1, ids, 7)})
    with torch.no_grad():
        expected = small(**batch).last_hidden_state
        blind = small(**batch | {"attention_mask": torch.ones_like(mask)}).last_hidden_state
    seen = mask.bool()
    torch.testing.assert_close(found["last_hidden_state"], expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(found["last_hidden_state"][seen], other["last_hidden_state"][seen])
    assert (blind - expected)[seen].abs().max() > 1e-3


def test_int8_has_its_own_file_and_tolerance(bert):
    _, exported = bert
    rows = [row for row in exported.parity if row.inputs.endswith(", int8")]
    assert {row.inputs.removesuffix(", int8") for row in rows} == SHAPES
    assert all(1e-4 < row.difference < row.tolerance for row in rows)
    files = {path.name for path in (exported.folder / "onnx").iterdir()}
    assert files == {"model.onnx", "model_int8.onnx"}


def test_sentence_transformers_finds_its_files(bert):
    _, exported = bert
    modules = json.loads((exported.folder / "modules.json").read_text())
    assert [part["type"].rsplit(".", 1)[1] for part in modules] == [
        "Transformer",
        "Pooling",
        "Normalize",
    ]
    assert all((exported.folder / part["path"]).is_dir() for part in modules)
    pooling = json.loads((exported.folder / "1_Pooling/config.json").read_text())
    assert pooling["pooling_mode_mean_tokens"]
    assert not pooling["pooling_mode_cls_token"]
    assert pooling["word_embedding_dimension"] == 32


@pytest.fixture(scope="module")
def openvino_llama(tmp_path_factory):
    pytest.importorskip("openvino")
    small = cut("llama", num_hidden_layers=1)
    small.generation_config.suppress_tokens = SUPPRESSED
    folder = tmp_path_factory.mktemp("openvino_llama") / "out"
    return small, solpath.export(small, folder, "openvino")


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"use_cache": False}], ids=str)
@pytest.mark.parametrize("runtime", ["llama", "openvino_llama"])
def test_decoders_generate_the_same_tokens(runtime, options, request):
    from solpath.exporting.decoder import OnnxDecoder, OpenVinoDecoder

    small, exported = request.getfixturevalue(runtime)
    kind = OnnxDecoder if runtime == "llama" else OpenVinoDecoder
    decoder = kind(exported.folder, threads=1)
    for samples in (3, 2):  # the second text starts anew
        ids, mask = ragged(samples, 7)
        batch = {"input_ids": ids.flip(1), "attention_mask": mask.flip(1), **options}
        batch |= {"do_sample": False, "max_new_tokens": 16, "min_new_tokens": 16}
        found = decoder.generate(**batch)
        assert found.shape == (samples, 7 + 16)
        assert torch.equal(found, small.generate(**batch))
        assert not torch.isin(found[:, 7:], torch.tensor(SUPPRESSED)).any()


def test_a_cache_that_the_graph_keeps_is_not_mistaken_for_another(openvino_llama):
    from solpath.exporting.decoder import OpenVinoDecoder

    small, exported = openvino_llama
    decoder, (ids, _) = OpenVinoDecoder(exported.folder, threads=1), ragged(3, 13)
    first = decoder(ids[:, :8])
    rest = decoder(ids[:, 8:], cache=first.cache)
    with torch.no_grad():
        expected = small(ids).logits
    torch.testing.assert_close(torch.cat([first.logits, rest.logits], 1), expected)
    decoder(ids)
    with pytest.raises(ConfigError, match="keeps one cache, and it is not this one"):
        decoder(ids[:, 8:], cache=rest.cache)
    with pytest.raises(ConfigError, match="no token can be taken back"):
        rest.cache.crop(3)


def test_a_folder_without_a_cache_is_no_decoder(bert):
    from solpath.exporting.decoder import OnnxDecoder

    with pytest.raises(ConfigError, match="holds no decoder"):
        OnnxDecoder(bert[1].folder)


@pytest.mark.parametrize("label", ["bert", "llama"])
def test_openvino_is_the_model_on_every_shape(label, tmp_path):
    pytest.importorskip("openvino")
    small = cut(label, num_hidden_layers=1)
    exported = solpath.export(small, tmp_path / "out", "openvino")
    assert {row.inputs for row in exported.parity} == SHAPES - {"given"}
    assert max(row.difference for row in exported.parity) <= 1e-5


def test_what_graphs_cannot_hold_is_refused():
    small = cut("bert", (0.0, 0.5), num_hidden_layers=1)
    with pytest.raises(ExportError, match=r"path\.plan\(min_width=1\)"):
        check_traceable(small, "onnx", ())
    with pytest.raises(ExportError, match=r"float16.*model\.float\(\)"):
        check_traceable(cut("bert").half(), "onnx", ())
    with pytest.raises(ExportError, match="not a model of transformers"):
        check_traceable(torch.nn.Linear(2, 2), "onnx", ())


def test_missing_packages_are_named(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for format in ("onnx", "openvino"):
        with pytest.raises(ConfigError, match=rf"solpath\[{format}\]"):
            solpath.export(cut("bert"), tmp_path / "out", format)


def test_unknown_options_are_named(tmp_path):
    with pytest.raises(ConfigError, match="int4"):
        solpath.export(cut("bert"), tmp_path / "out", "onnx", int4=True)


def test_graphs_of_one_shape_are_refused():
    """A graph that was traced for one number of samples fails on another, or is wrong there."""
    small = cut("bert", num_hidden_layers=1)
    random = inputs(small)

    def fixed(batch):
        if len(batch["input_ids"]) != len(random["input_ids"]):
            raise ValueError("got 5, expected 4")
        return {"pooler_output": small(**batch).pooler_output.detach()}

    with pytest.raises(ExportError, match="one more sample inputs: got 5"):
        check_parity(small, fixed, checked_batches(small, {"random": random}), 1e-4)


def test_what_cannot_be_traced_leaves_the_model_as_it_was():
    class Exporter:
        def export(self, model, inputs, config):
            model.forward = None
            raise RuntimeError("no such operator")

    small = cut("bert", num_hidden_layers=1)
    with pytest.raises(ExportError, match="BertModel cannot be traced: no such operator"):
        trace(Exporter, dict, small, inputs(small))
    assert "forward" not in vars(small)
