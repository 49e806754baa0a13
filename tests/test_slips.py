"""What people type by mistake: the command says what is wrong and the way out, before long work."""

import json
import re
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import ViTImageProcessor

import solpath
from conftest import batches, build
from solpath.cli import wording
from solpath.cli.main import run
from solpath.cli.wording import as_typed
from solpath.data.preparation import Preparation
from solpath.errors import BatchError
from solpath.measuring.metrics import figure
from test_batching import PADDED, tokenizer

datasets = pytest.importorskip("datasets")


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A folder with models, a path, a smaller model and texts."""
    folder = tmp_path_factory.mktemp("slips")
    bert = build("bert", vocab_size=60, max_position_embeddings=16)
    bert.save_pretrained(folder / "bert")
    tokenizer(**PADDED).save_pretrained(folder / "bert")
    path = solpath.baselines.magnitude(bert, batches(bert))
    path.save(folder / "path")
    solpath.save(solpath.extract(bert, path.plan(sparsity=0.4)), folder / "small")
    (folder / "a.txt").write_text("".join(f"w{i} w{i + 1}\n" for i in range(58)))
    (folder / "empty").mkdir()
    few = build("bert", vocab_size=40, max_position_embeddings=16)
    few.save_pretrained(folder / "few")
    tokenizer(**PADDED).save_pretrained(folder / "few")
    build("vit", num_channels=3).save_pretrained(folder / "vit")
    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(folder / "vit")
    (folder / "photos").mkdir()
    for i in range(4):
        Image.new("RGB", (10, 10), (40 * i, 0, 200)).save(folder / "photos" / f"{i}.png")
    (folder / "losses.py").write_text(
        "def size(outputs, batch): return outputs.last_hidden_state.square().mean()\n"
        "def three(outputs, batch): return 3\n"
        "def raising(outputs, batch): return outputs.nothing\n"
    )
    return folder


@pytest.fixture(autouse=True)
def _at_home(home, monkeypatch):
    monkeypatch.chdir(home)


@pytest.fixture
def refused(capsys):
    """Return a function that runs a command, which must be refused, and returns what it says."""

    def says(*words: object) -> str:
        capsys.readouterr()
        assert run([str(word) for word in words]) == 2
        return capsys.readouterr().err.splitlines()[-1]

    return says


def test_blank_lines_are_no_rows(tmp_path, capsys):
    (tmp_path / "b.txt").write_text("w1 w2\n\nw3\n \n")
    search = "search", "bert", "--text", f"{tmp_path / 'b.txt'}", "--steps", "2", "--length", "4"
    assert run([*search, "--out", str(tmp_path / "p")]) == 0
    assert "2 of 2 rows" in capsys.readouterr().err


def choosing(*more):
    return "choose", "bert", "path", "--text", "a.txt", "--length", "6", "--max-loss", "0.9", *more


def test_a_choice_that_cannot_be_written_is_found_before_the_work(refused, tmp_path, monkeypatch):
    monkeypatch.setattr("solpath.cli.choose.load_any", None)  # the work would begin with it
    (tmp_path / "old.json").write_text("{}")
    assert "path is a folder; give the name" in refused(*choosing("--out", "path"))
    said = refused(*choosing("--out", tmp_path / "old.json"))
    assert "old.json exists; choose another file or remove it" in said
    said = refused(*choosing("--out", "a.txt/choice.json"))
    assert "cannot write to a.txt/choice.json: a.txt is a file" in said
    assert "cannot write to '/proc/" in refused(*choosing("--out", "/proc/choice.json"))
    assert (tmp_path / "old.json").read_text() == "{}"


def test_a_folder_in_a_file_is_named(refused):
    said = refused("extract", "bert", "path", "--sparsity", "0.4", "--out", "a.txt/small")
    assert "cannot write to a.txt/small: a.txt is a file" in said


def test_the_next_command_judges_by_other_data_that_is_read_the_same_way(tmp_path, capsys):
    words = ["compensate", "small", "bert", "--text", "a.txt", "--length", "6", "--batch-size", "8"]
    words += ["--batches", "4", "--dtype", "float32", "--loss", "losses:size"]
    assert run([*words, "--out", str(tmp_path / "better")]) == 0
    said = capsys.readouterr().out.splitlines()[-1]
    assert said == (
        f"Next: solpath eval {tmp_path / 'better'} --reference bert --text OTHER_DATA "
        "--batch-size 8 --length 6 --dtype float32 --loss losses:size"
    )


@pytest.mark.parametrize(
    ("name", "text"),
    [("three", "--loss returned 3"), ("raising", "--loss losses:raising raised AttributeError(")],
)
def test_a_loss_that_fails_is_named(name, text, refused, tmp_path):
    search = "search", "bert", "--text", "a.txt", "--steps", "2", "--length", "6"
    said = refused(*search, "--loss", f"losses:{name}", "--out", tmp_path / "p")
    assert text in said


@pytest.mark.parametrize(
    "words",
    [
        ["search", "nosuch", "--text", "a.txt", "--out", "{tmp}/p"],
        ["extract", "nosuch", "path", "--sparsity", "0.4", "--out", "{tmp}/s"],
        ["eval", "small", "--reference", "nosuch", "--text", "a.txt"],
        ["inspect", "nosuch"],
    ],
)
def test_a_name_that_nobody_knows_is_refused_once(words, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("transformers.AutoProcessor.from_pretrained", None)
    monkeypatch.setattr("transformers.PreTrainedConfig.get_config_dict", None)
    assert run([word.format(tmp=tmp_path) for word in words]) == 2
    [said] = capsys.readouterr().err.splitlines()
    assert "cannot load nosuch: there is no folder of that name here, and the Hub does not" in said


def test_a_name_in_the_cache_is_not_asked_for(tmp_path, monkeypatch):
    from solpath.vetting import check_on_hub

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(solpath.SolpathError, match="does not answer"):
        check_on_hub("nobody/nothing")
    (tmp_path / "models--nobody--nothing").mkdir()
    check_on_hub("nobody/nothing")


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ("plan bert --sparsity 0.4", "bert holds a dense model, not a path (there is no path.json"),
        ("plan small --sparsity 0.4", "small holds an extracted model, not a path"),
        ("plan nosuch --sparsity 0.4", "the folder nosuch does not exist; give the folder that"),
        ("plan a.txt --sparsity 0.4", "the folder a.txt is a file; give the folder that search"),
        ("extract path bert --sparsity 0.4 --out {out}", "path holds a path, and bert a dense"),
        ("extract path path --sparsity 0.4 --out {out}", "path holds a path; give the model"),
        ("choose path bert --text a.txt --max-loss 0.5", "and bert a dense model; swap them"),
        ("family path bert --text a.txt --out {out}", "and bert a dense model; swap them"),
        ("tune bert small --text a.txt --out {out}", "and small an extracted model; swap them"),
        ("compensate bert small --text a.txt --out {out}", "an extracted model; swap them"),
        ("compensate bert bert --text a.txt --out {out}", "bert holds a dense model, not an"),
        ("export bert --format stock --out {out}", "bert holds a dense model, not an extracted"),
        ("export path --format onnx --out {out}", "path holds a path, not an extracted model"),
        ("eval path --reference bert --text a.txt", "path holds a path; give the model"),
        ("search path --text a.txt --out {out}", "path holds a path; give the model"),
        ("inspect path", "path holds a path; give the model"),
        ("inspect empty", "empty holds no model: it has no config.json"),
        ("bench bert path", "path holds a path; give the model"),
        ("eval bert --reference small --text a.txt", "bert holds a dense model, and small an"),
        ("eval small --reference small --text a.txt", "--reference small holds an extracted model"),
        ("search bert --text a.txt --out {out} --method released", "released needs --loss;"),
        ("search bert --text a.txt --out {out} --checkpoint bert", "bert, which holds a dense"),
        ("tune small bert --text a.txt --out {out} --checkpoint path", "path, which holds a path"),
        ("report path", "path holds a path, not a family (there is no family.json"),
    ],
)
def test_a_folder_of_the_wrong_kind_is_named(words, text, tmp_path, capsys):
    assert run(words.format(out=tmp_path / "out").split()) == 2
    [said] = capsys.readouterr().err.splitlines()
    assert text in said


def test_a_dense_model_is_not_loaded_as_an_extracted_one():
    with pytest.raises(solpath.SolpathError, match="bert holds a dense model, not an extracted"):
        solpath.load("bert")


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ("search bert --text a.txt --out path", "path is not empty; choose another folder."),
        ("plan path --latency-ms 3", "--latency-ms needs --latency FILE, which solpath extract"),
        ("plan path --sparsity 0.4 --for nosuch", "--for must be one of onnx, openvino"),
        ("plan path --sparsity 0.4 --min-width -1", "--min-width must be an integer of at least"),
        ("search small --text a.txt --out {out}", "small was already extracted; give the dense"),
    ],
)
def test_messages_name_the_options_of_the_command_line(words, text, refused, tmp_path):
    said = refused(*words.format(out=tmp_path / "out").split())
    assert text in said


@pytest.mark.parametrize(
    ("python", "typed"),
    [
        ("of every head: path.plan(min_width=1).", "of every head: --min-width 1."),
        ("a share, such as path.plan(bytes=0.5).", "a share, such as --bytes 0.5."),
        ("latency= is a table for latency_ms=, not for sparsity=.",
         "--latency is a table for --latency-ms, not for --sparsity."),
        ("plan with the constraint uniform.", "plan with --uniform all."),
        ("With pad=True the rest", "With --pad the rest"),
        ("protect=['*.qk', '*.vo'], or", "--protect '*.qk' --protect '*.vo', or"),
        ("min_width=1 or more (multiple_of, if", "--min-width 1 or more (--multiple-of, if"),
        ("take quantization='f16'.", "take --quantization f16."),
        ("dtype=torch.bfloat16 or dtype=torch.float32.", "--dtype bfloat16 or --dtype float32."),
        ("from_pretrained(folder, dtype=...)", "from_pretrained(folder, dtype=...)"),
        ("members[0].latency_ms, asked={'multiple_of': 1}",
         "members[0].latency_ms, asked={'multiple_of': 1}"),
    ],
)  # fmt: skip
def test_arguments_become_options(python, typed):
    assert as_typed(python) == typed


def test_sentences_that_are_put_otherwise_are_said():
    """One that was changed in the package would not be recognised any more."""
    package = Path(solpath.__file__).parent
    sources = (file.read_text() for file in package.rglob("*.py") if file.stem != "wording")
    joined = re.sub(r'"\s*\n\s*f?"', "", "".join(sources))
    assert [sentence for sentence in wording._SENTENCES if sentence not in joined] == []


def test_placeholders_of_images_need_no_embedding():
    """Some models put images where a token stands that is beyond their embedding."""
    model = build("bert", vocab_size=40)
    model.config.image_token_id = 40
    prepare = Preparation(model)
    prepare(0, {"input_ids": torch.tensor([[39, 40]])})
    with pytest.raises(BatchError, match="go up to 41"):
        prepare(0, {"input_ids": torch.tensor([[41, 40]])})


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ("search bert --text a.txt --seed 99999999999999999999999 --out {out}", "'--seed'"),
        ("search bert --text a.txt --device meta --out {out}", "--device meta: nothing can be"),
        ("eval small --reference vit --images photos", "small takes text, and vit image; give"),
        ("search few --text a.txt --steps 2 --length 6 --out {out}",
         "and the embedding of BertModel ends at 39; give the tokenizer"),
    ],
)  # fmt: skip
def test_what_was_an_unexpected_error(words, text, refused, tmp_path):
    assert text in refused(*words.format(out=tmp_path / "out").split())


def test_a_seed_that_torch_does_not_take_is_refused():
    with pytest.raises(solpath.SolpathError, match="seed must be at most 9223372036854775807"):
        solpath.SearchConfig(seed=2**63)


def test_tokens_beyond_the_embedding_are_named():
    bert = build("bert", vocab_size=40)
    with pytest.raises(BatchError, match=r"input_ids of batch 0 go up to 40.* ends at 39"):
        solpath.search(bert, [{"input_ids": torch.full((2, 5), 40)}], progress=False)


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("head.csv", b"text,label\n", "head.csv has no rows."),
        ("none.csv", b"", "none.csv has no rows."),
        ("none.jsonl", b"", "none.jsonl has no rows."),
        ("wide.csv", "text,label\na,0\n".encode("utf-16-le"), "wide.csv is not UTF-8 text; save"),
        ("wide.txt", "a cat\n".encode("utf-16-le"), "wide.txt is not UTF-8 text; save the file"),
        ("latin.txt", "é\n".encode("latin-1"), "save the file as UTF-8"),
    ],
)
def test_files_that_hold_no_text_are_named(name, content, text, refused, tmp_path):
    (tmp_path / name).write_bytes(content)
    search = "search", "bert", "--data", tmp_path / name, "--length", "6", "--steps", "2"
    assert text in refused(*search, "--out", tmp_path / "p")


@pytest.mark.parametrize(
    ("column", "text"),
    [
        ("foo=text", "--column foo=text: 'foo' is none of the roles text, pair, image, label"),
        ("label=nope", "has no column 'nope'; its columns are text, kind=of"),
        ("nope", "has no column 'nope'"),
    ],
)
def test_columns_that_are_not_there_are_refused(column, text, refused, tmp_path):
    (tmp_path / "t.csv").write_text("text,kind=of\nw1 w2,0\nw3,1\n")
    search = "search", "bert", "--data", tmp_path / "t.csv", "--length", "6", "--steps", "2"
    assert text in refused(*search, "--column", column, "--out", tmp_path / "p")


def test_a_kind_is_given_once(refused):
    said = refused("plan", "path", "--sparsity", "0.4", "--multiple-of", "qk=2,mlp=8,qk=4")
    assert "--multiple-of gives a kind twice: qk=2,mlp=8,qk=4" in said


def test_pickled_weights_say_the_way_out(refused, tmp_path):
    build("bert").config.save_pretrained(tmp_path / "old")
    (tmp_path / "old" / "pytorch_model.bin").write_bytes(b"")
    said = refused("bench", tmp_path / "old", tmp_path / "old")
    assert "has its weights in pytorch_model.bin, a pickle" in said
    assert "model.save_pretrained(folder), which writes safetensors" in said


def test_what_python_is_given_by_mistake_is_named():
    model = build("bert", vocab_size=60)
    data = batches(model)
    path = solpath.baselines.magnitude(model, data)
    for call, text in (
        (lambda: path.plan(0.4), r"a budget says of what: sparsity=0\.4"),
        (lambda: solpath.extract(model, path), r"got a SolutionPath; make one.* path\.plan\("),
        (lambda: solpath.extract("bert", 0.4, out="new"), r"plan must be a Plan, got a float"),
        (lambda: solpath.choose(model, "path", data, 0.1), r"SolutionPath\.load\('path'\)"),
        (lambda: solpath.make_family(model, data, data, "new"), r"a SolutionPath, got a list"),
        (lambda: solpath.plan_for_latency(model, "path", data[0], 1), r"the name of a folder"),
        (lambda: solpath.masked(model, path).__enter__(), r"must be a Plan, got a SolutionPath"),
        (lambda: solpath.search(model, data, checkpoint="bert"), r"which holds a dense model"),
        (lambda: solpath.measure(model, data[0]), r"dict of name to model, got a BertModel"),
        (lambda: solpath.text_batches(["w1"], "bert"), r"AutoTokenizer\.from_pretrained\('bert'\)"),
    ):
        with pytest.raises(solpath.SolpathError, match=text):
            call()


def test_a_budget_is_shown_in_its_measure(capsys):
    assert run(["plan", "path", "--bytes", "0.8"]) == 0
    made = solpath.SolutionPath.load("path").plan(bytes=0.8)
    assert f", bytes={made.achieved.bytes:,}, " in capsys.readouterr().out


def test_a_small_distance_is_not_shown_as_none():
    assert [figure(v) for v in (0.0, 0.00004, 0.01234567, 12.5)] == [
        "0.0000", "4.0e-05", "0.0123", "12.5000",
    ]  # fmt: skip


def test_an_export_says_that_it_casts(tmp_path, capsys):
    low = solpath.load("small").bfloat16()
    solpath.save(low, tmp_path / "low")
    words = f"export {tmp_path / 'low'} --format stock --pad --out {tmp_path / 'out'}"
    assert run(words.split()) == 0
    assert "weights in bfloat16 are written in float32." in capsys.readouterr().err
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == "float32"


def test_data_that_nobody_knows_says_that_it_is_not_here(refused, tmp_path):
    said = refused("search", "bert", "--data", "nosuch", "--out", tmp_path / "p")
    assert "cannot read nosuch (there is no file or folder of that name here): " in said
