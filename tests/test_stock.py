"""Folders of stock classes: every family and cut that plain transformers holds exactly."""

import json
import subprocess
import sys
import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import solpath
from conftest import CASES, build, inputs
from plans import HEADS, NO_MLP, stock_plan
from solpath.errors import ExportError
from solpath.exporting.card import Facts, model_card
from solpath.exporting.export import export
from solpath.exporting.stock import auto_class, open_folder
from solpath.exporting.stock_rotary import longrope_factors

CUTS = [("llama", "mlp")]


def numbers(folder):
    """How many numbers the weight files of a folder hold."""
    count = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            count += sum(opened.get_tensor(name).numel() for name in opened.keys())  # noqa: SIM118
    return count


def exported(label, cut, folder, **options):
    model = build(label)
    small = solpath.extract(model, stock_plan(model, label, cut))
    return small, export(small, folder, "stock", batch=inputs(model), **options)


@pytest.mark.parametrize(("label", "cut"), CUTS)
def test_a_stock_class_holds_the_cut(label, cut, tmp_path):
    small, result = exported(label, cut, tmp_path / "stock")
    assert {row.inputs for row in result.parity} == {"random", "given"}
    assert max(row.difference for row in result.parity) <= 2e-6
    state = {t.data_ptr() or name: t.numel() for name, t in small.state_dict().items()}
    norms = any(pair.norms for pair in small.solpath_plan.pairs)
    assert norms or numbers(tmp_path / "stock") == sum(state.values())
