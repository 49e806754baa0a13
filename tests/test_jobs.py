"""The jobs of examples/jobs, from a checkpoint and data to a score, as a new user runs them."""

import runpy
import sys
from pathlib import Path

import pytest

import solpath

pytest.importorskip("datasets")
pytest.importorskip("sklearn")
JOBS = Path(__file__).parents[1] / "examples" / "jobs"
SCORES = {
    "bert_classifier": "accuracy",
    "vit_folder": "accuracy",
    "clip_pairs": "recall@1",
    "decoder_jsonl": "perplexity",
    "sentence_transformer": "recall@5",
}


def test_every_job_is_here():
    assert {file.stem for file in JOBS.glob("*.py")} == {"job", *SCORES}


@pytest.mark.parametrize("name", SCORES)
def test_a_job(name, tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(JOBS)
    monkeypatch.setattr(sys, "argv", [name, str(tmp_path)])
    runpy.run_path(str(JOBS / f"{name}.py"))
    shown = capsys.readouterr().out
    assert SCORES[name] in shown
    assert "Next: solpath extract" in shown
    small = solpath.load(tmp_path / "small")
    assert small.solpath_plan.achieved.sparsity == pytest.approx(0.3, abs=0.05)
    assert (tmp_path / "small" / "settings.toml").is_file()
    if name == "sentence_transformer":
        one, two = (tmp_path / f / "settings.toml" for f in ("path", "again"))
        lines = zip(one.read_text().splitlines(), two.read_text().splitlines(), strict=True)
        assert [pair for pair in lines if pair[0] != pair[1]] == [("seed = 0", "seed = 1")]
