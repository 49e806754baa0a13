"""What people type by mistake: the command says what is wrong and the way out, before long work."""

from pathlib import Path

import pytest

import solpath
from conftest import batches, build
from solpath.cli.main import run
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
    [("three", "returned 3, not a tensor"), ("raising", "raised AttributeError: ")],
)
def test_a_loss_that_fails_is_named(name, text, refused, tmp_path):
    search = "search", "bert", "--text", "a.txt", "--steps", "2", "--length", "6"
    said = refused(*search, "--loss", f"losses:{name}", "--out", tmp_path / "p")
    assert f"--loss losses:{name} {text}" in said
