"""The benchmark of a pretrained decoder, on a tiny random one that reads bytes."""

import json
import math

import pytest
import torch

import gemma
import language
import passages
import workloads
from language_page import language_table
from solpath.model.discovery import find_pairs


@pytest.fixture(autouse=True, scope="module")
def _few_texts():
    """Every twentieth file and every third topic."""
    with pytest.MonkeyPatch.context() as patch:
        for text, step in (("code", 20), ("english", 3)):
            found = dict(list(getattr(passages, f"_{text}")().items())[::step])
            patch.setattr(passages, f"_{text}", lambda found=found: found)
        passages.split.cache_clear()
        yield
    passages.split.cache_clear()


@pytest.fixture(autouse=True)
def _short_continuations(monkeypatch):
    whole = gemma.continuations
    monkeypatch.setattr(gemma, "continuations", lambda *args: whole(*args, tokens=2))


def smoke(tmp_path, **options):
    language.main(
        seeds="0",
        checkpoint=None,
        out=tmp_path / "runs.json",
        paths=tmp_path / "paths",
        steps=96,
        windows=64,
        threads=1,
        smoke=True,
        **{"tune": None, "tuned_keeps": "0.6", "methods": "spp_best", "texts": "code"}
        | {"judged": "code,english"}
        | options,
    )
    return json.loads((tmp_path / "runs.json").read_text())["runs"]


def test_runs_are_added_once_and_judged_on_both_texts(tmp_path, monkeypatch):
    methods = "spp_best,best_unfitted,random,flap,slicegpt"
    runs = smoke(tmp_path, methods=methods)
    assert [run["method"] for run in runs] == methods.split(",")
    for run in runs:
        assert [size["keep"] for size in run["sizes"]] == [0.95, 0.9, 0.8, 0.7, 0.6, 0.4]
        for metrics in (run["dense"], *(size["metrics"] for size in run["sizes"])):
            assert set(metrics) == {"code", "code_agreement", "english", "english_agreement"}
            assert all(math.isfinite(value) for value in metrics.values())
    for size in runs[0]["sizes"]:
        assert len(size["written"]) == len(runs[0]["prompts"]) == len(runs[0]["dense_written"]) == 5
    assert "written" not in runs[2]["sizes"][0]

    monkeypatch.setattr(language.quality, "run_method", None)  # nothing runs again
    assert smoke(tmp_path, methods=methods) == runs


def test_an_order_that_was_found_is_not_searched_again(tmp_path, monkeypatch):
    first = smoke(tmp_path, methods="spp_best")
    monkeypatch.setattr(language.quality, "find_path", None)
    again = smoke(tmp_path, methods="best_unfitted", judged="code")
    assert again[1]["seconds"] == first[0]["seconds"]
    assert set(again[1]["dense"]) == {"code", "code_agreement"}


def test_a_search_on_both_texts_takes_them_in_turn(tmp_path):
    decoder = gemma.tiny()
    single = [workloads.gemma(None, 2, texts=[t], decoder=decoder) for t in passages.TEXTS]
    both = workloads.gemma(None, 2, texts=passages.TEXTS, decoder=decoder)
    (mixed,) = both.batches(0, 1, 4)
    for i, work in enumerate(single):
        (batch,) = work.batches(0, 1, 2)
        assert torch.equal(mixed["input_ids"][i::2], batch["input_ids"])
    assert both.data["searched"] == ["code", "english"]


def test_members_are_tuned(tmp_path):
    (run,) = smoke(tmp_path, tune="1")
    assert run["settings"]["keep"] == 0.6
    assert run["before"].keys() == run["after"].keys() == run["dense"].keys()


def test_unknown_names_are_refused(tmp_path):
    with pytest.raises(SystemExit, match="unknown method 'nonsense'"):
        smoke(tmp_path, methods="nonsense")
    with pytest.raises(SystemExit, match="unknown text 'french'"):
        smoke(tmp_path, texts="french")


def test_perplexity_in_slices_is_that_of_the_loss(monkeypatch):
    model = gemma.tiny().model
    windows = torch.randint(256, (5, 32), generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(gemma, "SLICE", 7)
    judge, dense = gemma.judging(model, {"code": windows})
    with torch.no_grad():
        wanted = math.exp(float(model(input_ids=windows, labels=windows).loss))
    assert dense["code"] == pytest.approx(wanted, rel=1e-5)
    assert dense["code_agreement"] == 1
    assert judge(model) == dense


def test_splits_share_no_window():
    for text in passages.TEXTS:
        split = passages.split(text)
        assert split.calibration
        assert split.heldout
        known = {p for source in split.heldout for p in source.split("\n\n") if len(p) >= 60}
        assert known.isdisjoint(p for source in split.calibration for p in source.split("\n\n"))
    assert not any("pydoc_data" in name or "/test" in name for name in passages._code())


def test_windows_that_judge_are_never_drawn():
    windows = torch.arange(100).view(50, 2)
    drawn = passages.drawn(windows, seed=1, count=90)
    assert drawn.shape == (90, 2)
    assert set(drawn[:, 0].tolist()) == set(windows[passages.JUDGES :, 0].tolist())
    assert torch.equal(drawn, passages.drawn(windows, seed=1, count=90))


def test_a_file_with_other_weights_is_refused(tmp_path):
    (tmp_path / gemma.FILE).write_bytes(b"GGUF")
    with pytest.raises(SystemExit, match="has the SHA-256"):
        gemma.load(tmp_path / gemma.FILE)


def test_the_tiny_model_has_what_the_real_one_has():
    pairs = find_pairs(gemma.tiny().model)
    assert {pair.kind for pair in pairs} == {"qk", "vo", "mlp"}
    assert any(pair.norms and pair.left[0].repeat == 4 and pair.channels == 2 for pair in pairs)


def run_of(method: str, keeps: list[float], code: float, seed: int = 0, **data) -> dict:
    sizes = [{"keep": k, "metrics": {"code": code / k, "code_agreement": k}} for k in keeps]
    return {
        "method": method,
        "seed": seed,
        "settings": {"smoke": False, "data": {"searched": ["code"]} | data},
        "dense": {"code": 10.0, "code_agreement": 1.0, "english": 20.0},
        "sizes": sizes,
    }


def test_tables_show_what_there_is(tmp_path):
    file = tmp_path / "language.json"
    for name in ("language", "language_agreement", "language_transfer", "language_written"):
        assert language_table(name, file).startswith("Not measured")
    runs = [run_of("spp_best", [0.9, 0.5], 10.0), run_of("spp_best", [0.9], 12.0, seed=1)]
    runs += [run_of("flap", [0.5], 1e4)]
    file.write_text(json.dumps({"runs": runs}))
    header, best, flap = language_table("language", file)
    assert header == ["kept (dense 10.0)", "90%", "50%", "seeds"]
    assert best[1:] == ["12.2", "20.0", "2"]
    assert flap == ["FLAP", "", "20,000", "1"]
    assert language_table("language_agreement", file)[1][1:] == ["90%", "50%", "2"]
    assert len(language_table("language_transfer", file)) == 1  # one text has no other
    assert language_table("language_written", file).startswith("Not measured")
    other = run_of("spp_best", [0.9, 0.5], 30.0, searched=["english"])
    file.write_text(json.dumps({"runs": [*runs, other]}))
    rows = language_table("language_transfer", file)
    assert [row[1:3] for row in rows[1:]] == [
        ["code", "code"],
        ["code", "English"],
        ["English", "code"],
        ["English", "English"],
    ]
    runs[0] |= {"prompts": ["a"], "dense_written": ["b\n"]}
    runs[0]["sizes"] = [{"keep": 0.8, "metrics": {"code": 1.0}, "written": ["c"]}]
    file.write_text(json.dumps({"runs": runs}))
    assert language_table("language_written", file).splitlines() == [
        "```text",
        ">>> 'a'",
        r"dense 'b\n'",
        "  80% 'c'",
        "```",
    ]
