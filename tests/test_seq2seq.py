"""Encoder-decoders in ONNX and OpenVINO: two graphs with a cache, transformers' tokens."""

import pytest
import torch
from transformers.modeling_outputs import BaseModelOutput

import solpath
from conftest import build
from plans import random_plan
from solpath.errors import ConfigError, ExportError
from solpath.exporting.graphs import Graph, in_steps, named
from solpath.exporting.onnx import _share
from solpath.exporting.onnx_graphs import HALVES, INT8, RUNTIME
from solpath.exporting.parity import check_parity

SHAPES = {"random", "given", "one more sample", "one sample", "longer texts", "padded targets"}
SMALL = {"t5": {"num_layers": 1}, "whisper": {"decoder_layers": 1}}
MULTILINGUAL = {
    "is_multilingual": True,
    "lang_to_id": {"<|en|>": 4, "<|de|>": 5},
    "task_to_id": {"transcribe": 6, "translate": 7},
    "no_timestamps_token_id": 8,
    "suppress_tokens": [9, 11],
}


ALL = ["t5", "whisper", "openvino_t5", "openvino_whisper"]


def exported(label, folder, format, **options):
    for package in {"onnx": ("onnxruntime", "onnxscript"), "openvino": ("openvino",)}[format]:
        pytest.importorskip(package)
    dense = build(label, **SMALL[label])
    small = solpath.extract(dense, random_plan(dense, (0.5, 0.25, 0.75)))
    if label == "whisper":
        for name, value in MULTILINGUAL.items():
            setattr(small.generation_config, name, value)
    return small, solpath.export(small, folder, format, **options)


def one_sample():
    return {"input_ids": torch.arange(1, 8)[None], "decoder_input_ids": torch.arange(9)[None]}


@pytest.fixture(scope="module")
def t5(tmp_path_factory):
    folder = tmp_path_factory.mktemp("t5") / "out"
    return exported("t5", folder, "onnx", batch=one_sample(), int8=True)


@pytest.fixture(scope="module")
def whisper(tmp_path_factory):
    return exported("whisper", tmp_path_factory.mktemp("whisper") / "out", "onnx")


@pytest.fixture(scope="module")
def openvino_t5(tmp_path_factory):
    folder = tmp_path_factory.mktemp("openvino_t5") / "out"
    return exported("t5", folder, "openvino", batch=one_sample())


@pytest.fixture(scope="module")
def openvino_whisper(tmp_path_factory):
    return exported("whisper", tmp_path_factory.mktemp("openvino_whisper") / "out", "openvino")


def opened(made, threads=1):
    from solpath.exporting import seq2seq

    small, out = made
    prefix = {"onnx": "Onnx", "openvino": "OpenVino"}[out.format]
    kind = "Whisper" if small.config.model_type == "whisper" else "Seq2Seq"
    return getattr(seq2seq, prefix + kind)(out.folder, threads=threads)


def source(model, samples, tokens):
    generator = torch.Generator().manual_seed(samples)
    if model.main_input_name == "input_features":
        return {"input_features": torch.randn(samples, 6, 14, generator=generator)}
    ids = torch.randint(1, 57, (samples, tokens), generator=generator)
    mask = (torch.arange(tokens) < torch.tensor([[tokens], [3], [5]])[:samples]).long()
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("label", ALL)
def test_both_graphs_are_the_model_on_every_shape(label, request):
    """Those of T5 were traced for a batch of one sample, and run on others."""
    _, out = request.getfixturevalue(label)
    rows = [row for row in out.parity if "int8" not in row.inputs]
    assert {row.inputs for row in rows} == SHAPES - ({"given"} if "whisper" in label else set())
    assert {row.output for row in rows} == {"logits", "encoder_last_hidden_state"}
    assert max(row.difference for row in rows) <= 1e-5


OPTIONS = [{}, {"num_beams": 3}, {"use_cache": False}, {"num_return_sequences": 2, "top_k": 5}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("label", ALL)
def test_tokens_are_those_of_transformers(label, options, request):
    small = request.getfixturevalue(label)[0]
    model = opened(request.getfixturevalue(label))
    given = {"max_new_tokens": 12, "min_new_tokens": 12, "repetition_penalty": 2.0, **options}
    given |= {"do_sample": "top_k" in options}
    for samples, tokens in ((3, 9), (1, 4), (2, 7)):
        batch = source(small, samples, tokens)
        found, expected = [], []
        for runs, one in ((found, model), (expected, small)):
            torch.manual_seed(0)
            runs.append(one.generate(**batch, **given))
        assert torch.equal(found[0], expected[0])
        assert len(found[0][0].unique()) > 3  # they are not all the same


@pytest.mark.parametrize("label", ["t5", "openvino_t5"])
def test_logits_of_every_step_are_those_of_transformers(label, request):
    made = request.getfixturevalue(label)
    small, batch = made[0], source(made[0], 3, 9)
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    options |= {"output_logits": True, "return_dict_in_generate": True}
    found, expected = (one.generate(**batch, **options) for one in (opened(made), small))
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(expected.logits))


@pytest.mark.parametrize("label", ["whisper", "openvino_whisper"])
def test_a_decoder_that_starts_with_padding_sees_none_of_it(label, request):
    """transformers counts Whisper's positions by the mask of the decoder; so must the graph."""
    made = request.getfixturevalue(label)
    small, model = made[0], opened(made)
    batch = source(small, 2, 0)
    ids = torch.tensor([[0, 0, 3, 21], [3, 17, 30, 31]])
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    prepared = [
        one.prepare_inputs_for_generation(ids, decoder_attention_mask=mask, use_cache=True)
        for one in (model, small)
    ]
    assert torch.equal(*(one["decoder_position_ids"] for one in prepared))
    with torch.no_grad():
        found, expected = (
            one(**batch, **given).logits
            for one, given in zip((model, small), prepared, strict=True)
        )
    torch.testing.assert_close(found[mask == 1], expected[mask == 1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("label", ["whisper", "openvino_whisper"])
def test_whisper_speaks_the_language_that_is_asked_for(label, request):
    """Languages, tasks and suppressed tokens are in the generation config, which is written."""
    made = request.getfixturevalue(label)
    small, model = made[0], opened(made)
    batch = source(small, 2, 0)
    options = {"language": "de", "task": "translate", "max_new_tokens": 6}
    options |= {"return_dict_in_generate": True, "repetition_penalty": 2.0}
    found, expected = (one.generate(**batch, **options) for one in (model, small))
    assert found["sequences"][0, :4].tolist() == [3, 5, 7, 8]
    assert torch.equal(found["sequences"], expected["sequences"])
    with pytest.raises(ConfigError, match="no attentions"):
        model.generate(**batch, return_token_timestamps=True)


@pytest.mark.parametrize("label", ["t5", "openvino_t5"])
def test_a_source_is_encoded_once(label, request, monkeypatch):
    made, runs = request.getfixturevalue(label), []
    run = Graph.__call__

    def counted(self, batch, past=None):
        runs.append("decoder" if self.cached else "encoder")
        return run(self, batch, past)

    monkeypatch.setattr(Graph, "__call__", counted)
    model = opened(made)
    model.generate(**source(made[0], 2, 7), max_new_tokens=5, min_new_tokens=5, do_sample=False)
    assert runs == ["encoder"] + 5 * ["decoder"]
    assert set(model._graph.inputs) == {
        "decoder_input_ids",
        "decoder_attention_mask",
        "attention_mask",
    }


def test_weights_that_both_graphs_need_lie_in_the_folder_once(t5):
    onnx = pytest.importorskip("onnx")
    small, out = t5
    found = [
        onnx.load(out.folder / file, load_external_data=False).graph.initializer for file in HALVES
    ]
    places = [
        {next(e.value for e in w.external_data if e.key == "offset"): list(w.dims) for w in graph}
        for graph in ([w for w in graph if w.external_data] for graph in found)
    ]
    both = [places[0][place] for place in set(places[0]) & set(places[1])]
    assert [60, 32] in both  # the embeddings of T5
    assert {file.name for file in (out.folder / "onnx").iterdir()} == {
        *("encoder.onnx", "decoder.onnx", "weights.data"),
        *("encoder_int8.onnx", "decoder_int8.onnx", "weights_int8.data"),
    }
    head = small.lm_head.weight.nbytes  # a second time, transposed, as in a graph of all
    size = sum(weight.nbytes for weight in small.parameters()) + head
    assert abs((out.folder / "onnx/weights.data").stat().st_size - size) < 0.05 * size


def test_openvino_writes_no_weight_twice_but_the_embeddings(openvino_t5):
    """Every graph of OpenVINO has a file of weights of its own."""
    small, out = openvino_t5
    size = sum(weight.nbytes for weight in small.parameters())
    size += small.get_input_embeddings().weight.nbytes
    files = [file for file in out.folder.iterdir() if file.suffix == ".bin"]
    assert {file.name for file in files} == {"openvino_encoder.bin", "openvino_decoder.bin"}
    assert abs(sum(file.stat().st_size for file in files) - size) < 0.05 * size


def test_equal_bytes_of_other_shapes_are_not_one_weight(tmp_path):
    onnx_ir = pytest.importorskip("onnx_ir")
    arrays = [torch.ones(4, 2).numpy(), torch.ones(2, 4).numpy(), torch.ones(4, 2).numpy()]
    values = [
        onnx_ir.Value(name=str(i), const_value=onnx_ir.tensor(array, name=str(i)))
        for i, array in enumerate(arrays)
    ]
    _share(values, tmp_path / "weights")
    offsets = [value.const_value.offset for value in values]
    assert offsets[0] == offsets[2] != offsets[1]
    assert all((v.const_value.numpy() == a).all() for v, a in zip(values, arrays, strict=True))
    assert [value.const_value.name for value in values] == ["0", "1", "2"]


def test_int8_halves_have_a_tolerance_of_their_own(t5):
    small, out = t5
    rows = [row for row in out.parity if row.inputs.endswith(", int8")]
    assert {row.inputs.removesuffix(", int8") for row in rows} == SHAPES
    assert max(row.difference for row in rows) > 1e-4
    halves = RUNTIME.open_halves(out.folder, threads=1, ending=INT8)
    batch = source(small, 3, 9) | {"decoder_input_ids": torch.ones(3, 1, dtype=torch.int64)}
    assert halves(batch)["logits"].shape == (3, 1, 60)
    sizes = [(out.folder / named("onnx/weights.data", end)).stat().st_size for end in (INT8, "")]
    assert sizes[0] < 0.6 * sizes[1]


def test_a_graph_that_is_wrong_for_one_token_is_not_written(t5):
    """Every step of generation has one token; a half of a text has more."""
    small, out = t5
    halves = RUNTIME.open_halves(out.folder, threads=1)
    decoder = halves.decoder

    def wrong(batch, past=None):
        outputs, cache = decoder(batch, past)
        single = batch["decoder_input_ids"].shape[1] == 1
        return {name: value + single for name, value in outputs.items()}, cache

    wrong.inputs = decoder.inputs
    halves.decoder = wrong
    batch = source(small, 2, 7) | {"decoder_input_ids": torch.arange(12).reshape(2, 6)}
    with pytest.raises(ExportError, match="logits of the exported model differs"):
        check_parity(small, halves, {"given": batch}, 1e-4)


@pytest.mark.parametrize("steps", [[1], [1, 1], [1, 1, 1], [4, 4, 1]], ids=str)
def test_a_text_of_any_length_is_run_in_steps(steps):
    seen, tokens = [], sum(steps)

    def graph(batch, past=None):
        seen.append({name: value.shape[1] for name, value in batch.items()})
        return {"logits": batch["input_ids"]}, {}

    ids = torch.arange(tokens)[None]
    found = in_steps(graph, {"input_ids": ids, "attention_mask": ids, "other": ids})
    assert torch.equal(found["logits"], ids)
    assert [one["input_ids"] for one in seen] == steps
    assert [one["attention_mask"] for one in seen] == torch.tensor(steps).cumsum(0).tolist()
    assert {one["other"] for one in seen} == {tokens}


@pytest.mark.parametrize(
    "labels", [("t5", "whisper", "Onnx"), ("openvino_t5", "openvino_whisper", "OpenVino")], ids=str
)
def test_what_cannot_run_a_folder_says_what_does(labels, request, tmp_path):
    from solpath.exporting import decoder, seq2seq

    (t5, whisper), prefix = map(request.getfixturevalue, labels[:2]), labels[2]
    for kind, folder, message in (
        ("Seq2Seq", whisper, f"of the type whisper, which {prefix}Whisper runs"),
        ("Whisper", t5, f"of the type t5, which {prefix}Seq2Seq runs"),
    ):
        with pytest.raises(ConfigError, match=message):
            getattr(seq2seq, prefix + kind)(folder[1].folder)
    with pytest.raises(ConfigError, match=f"{prefix}Seq2Seq runs it"):
        getattr(decoder, f"{prefix}Decoder")(t5[1].folder)
    t5[0].config.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=f"exported to {t5[1].format}"):
        getattr(seq2seq, f"{prefix}Seq2Seq")(tmp_path)
    model, ids = opened(t5), torch.ones(1, 1, dtype=torch.int64)
    foreign = BaseModelOutput(last_hidden_state=torch.zeros(1, 3, 32))
    with pytest.raises(ConfigError, match="what the encoder of this folder gave"):
        model(decoder_input_ids=ids, encoder_outputs=foreign)
    with pytest.raises(ConfigError, match="takes input_ids; give that"):
        model(decoder_input_ids=ids)


@pytest.mark.parametrize("label", ALL)
def test_the_card_and_the_command_name_what_runs_it(label, request):
    _, out = made = request.getfixturevalue(label)
    name = type(opened(made)).__name__
    assert f"{name}(folder).generate(" in (out.folder / "README.md").read_text()
    assert out.command == f'solpath.exporting.seq2seq.{name}("{out.folder}").generate(inputs)'
