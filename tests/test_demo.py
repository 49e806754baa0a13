"""The demo on a tiny model: what is on disk before the other methods run, and that it goes on."""

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import solpath
from conftest import build
from solpath import baselines
from solpath.errors import SolpathError
from solpath.reporting import demo
from solpath.reporting.family import Family


@pytest.fixture
def tiny(tmp_path):
    words = Tokenizer(models.WordLevel({"?": 0, "the": 1, "a": 2, "of": 3}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="?")
    tokenizer.save_pretrained(tmp_path / "tiny")
    build("bert", max_position_embeddings=64).save_pretrained(tmp_path / "tiny")
    return str(tmp_path / "tiny")


def quickly(model, batches, *, seed, scale_batches=4):
    return baselines.random(model, batches, seed=seed)


def test_the_family_is_there_before_other_methods_run(tiny, tmp_path, monkeypatch):
    out, said, options = tmp_path / "out", [], {"quick": True, "steps": 2, "progress": False}

    def fails(*args, **kwargs):
        raise SolpathError("no rival today")

    with monkeypatch.context() as patch:
        patch.setattr(baselines, "METHODS", dict.fromkeys(baselines.METHODS, fails))
        with pytest.raises(SolpathError, match="no rival today"):
            demo.run_demo(out, model=tiny, say=said.append, **options)
    assert (out / "report.html").stat().st_size > 10_000
    first = Family.read(out)
    assert [run.name for run in first.methods] == ["spp"]
    for member in first.members[1:]:
        assert (
            sum(p.numel() for p in solpath.load(out / member.folder).parameters()) == member.params
        )

    monkeypatch.setattr(baselines, "METHODS", dict.fromkeys(baselines.METHODS, quickly))
    second = demo.run_demo(out, model=tiny, rivals=True, say=said.append, **options)
    assert Family.read(out) == second
    assert [run.name for run in second.methods] == ["spp", *demo.QUICK.methods, *demo.SLOW]
    assert second.methods[0].points == first.methods[0].points
    assert not (out / demo.CHECKPOINT).exists()
    assert [stage.name for stage in second.stages][-1] == "compare"
    peaks = [stage.peak_memory for stage in second.stages]
    assert peaks == [None] * len(peaks) or peaks == sorted(peaks)
    assert any(line.startswith("search: ") and "of CPU" in line for line in said)


def test_a_demo_that_was_stopped_in_its_search_goes_on(tiny, tmp_path, monkeypatch):
    """Then the folder holds the checkpoint alone."""
    out, options = tmp_path / "out", {"quick": True, "steps": 2, "progress": False}

    def stopped(*args, **kwargs):
        solpath.search(*args, **kwargs)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(demo, "search", stopped)
        with pytest.raises(KeyboardInterrupt):
            demo.run_demo(out, model=tiny, say=lambda line: None, **options)
    assert [file.name for file in out.iterdir()] == [demo.CHECKPOINT]
    monkeypatch.setattr(baselines, "METHODS", dict.fromkeys(baselines.METHODS, quickly))
    demo.run_demo(out, model=tiny, say=lambda line: None, **options)
    assert (out / "report.html").exists()
    assert not (out / demo.CHECKPOINT).exists()
