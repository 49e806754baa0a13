"""The progress bars of long work."""

import re

import pytest
import rich
import torch

import solpath
from conftest import batches, build
from plans import random_plan
from solpath.data.source import work_of
from solpath.refining import compensation


@pytest.mark.parametrize(("label", "unit"), [("bert", "tokens"), ("vit", "samples")])
def test_bars_show_the_rate_and_the_time_left(label, unit, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(rich, "_console", None)  # another test may have made one for 80 columns
    model = build(label)
    data = 4 * batches(model)
    path = solpath.search(model, data, solpath.SearchConfig(steps=4, scale_batches=2))
    small = solpath.extract(model, path.plan(sparsity=0.3))
    solpath.compensate(small, model, data)
    solpath.tune(small, model, data, solpath.TuneConfig(steps=2), heldout=data)
    shown = capsys.readouterr().out
    for title in ("search", "compensate", "tune"):
        found = re.search(rf"^{title} .*?([\d,.]+) {unit}/s +\d:\d\d:\d\d", shown, re.MULTILINE)
        assert found, shown
        assert float(found[1].replace(",", "")) > 0


def test_a_bar_keeps_to_one_line_of_a_narrow_terminal(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(rich, "_console", None)
    model = build("bert")
    solpath.search(model, batches(model), solpath.SearchConfig(steps=40, scale_batches=2))
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert re.search(r"^search .*40/40 loss .* size .* tokens/s +\d:\d\d:\d\d$", last), last


def test_a_bar_says_that_blocks_are_run_again(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(rich, "_console", None)
    monkeypatch.setattr(compensation, "fits", lambda size, device: False)
    model = build("bert")
    small = solpath.extract(model, random_plan(model, [0.5]))
    solpath.compensate(small, model, 4 * batches(model))
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert re.search(r"^compensate .*blocks again, to save memory .* tokens/s", last), last


def test_padding_is_no_work():
    ids = torch.ones(2, 5, dtype=torch.long)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    assert work_of({"input_ids": ids, "attention_mask": mask}) == (7, "tokens")
    assert work_of({"input_ids": ids, "attention_mask": mask.bool()}) == (7, "tokens")
    assert work_of({"input_ids": ids}) == (10, "tokens")
    elsewhere = {"input_ids": ids.to("meta"), "attention_mask": mask.to("meta")}
    assert work_of(elsewhere) == (10, "tokens")  # reading the mask would wait for the device
    assert work_of({"input_ids": ids, "pixel_values": torch.ones(2, 3, 4, 4)}) == (2, "samples")
    assert work_of(torch.ones(3, 2)) == (3, "samples")
