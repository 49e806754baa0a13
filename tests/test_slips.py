"""What people type by mistake: the command says what is wrong and the way out, before long work."""

from pathlib import Path

import pytest
from PIL import Image
from transformers import ViTImageProcessor

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
