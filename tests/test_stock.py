"""Folders of stock classes: every family and cut that plain transformers holds exactly."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import solpath
from conftest import CASES, build, inputs
from plans import plan_of
from solpath.errors import ExportError
from solpath.exporting.card import Facts, model_card
from solpath.exporting.export import export
from solpath.exporting.stock import auto_class, open_folder
from solpath.exporting.stock_rotary import longrope_factors
from solpath.model.discovery import find_pairs

PLAIN = ["audio-spectrogram-transformer", "beit", "deit", "dinov2", "dinov2 gated", "ijepa", "vit"]
PLAIN += ["dinov2_with_registers", "vit_mae", "vit_msn", "vivit"]
RELATIVE = ["mt5", "t5", "t5 gated", "umt5"]
ROTARY = ["cohere", "cohere2", "ernie4_5", "eurobert", "gemma", "gemma2", "gemma3", "gemma3_text"]
ROTARY += ["gpt_oss", "granite", "helium", "llama", "llama 1:6", "llava", "ministral", "mistral"]
ROTARY += ["mixtral", "olmo", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "seed_oss", "smollm3"]
ROTARY += ["starcoder2"]
HEADS = PLAIN + RELATIVE + ROTARY
NO_MLP = ["bloom", "siglip_vision_model", "siglip2_vision_model"]
CUTS = [(label, "mlp") for label in CASES if label not in NO_MLP]
CUTS += [(label, cut) for label in HEADS for cut in ("heads", "both")]


def narrow(pair, label):
    """A width that the field of the family has."""
    if pair.kind == "experts" or pair.kind == "mlp":
        if label.startswith("swin"):
            return int(0.85 * pair.width / 1.7 + 1e-9)
        if label.startswith("dinov2"):
            return pair.width // 2
        return 8 if pair.kind == "experts" else pair.width // 2
    return 2 if pair.channels == 2 else 4


def stock_plan(model, label, cut, dropped=()):
    """A plan that a stock class holds: one width of MLPs, of heads, equal couples everywhere."""
    pairs = find_pairs(model)
    generator = torch.Generator().manual_seed(1)
    tables = rotary_tables(model)
    order = {table: torch.randperm(64, generator=generator) for table in sorted(set(tables))}
    heads = any(label == name for name in HEADS) and cut != "mlp"
    kept = {}
    for pair in pairs:
        width = pair.width
        if (pair.kind in ("mlp", "experts")) == (cut != "heads") or (heads and cut == "both"):
            width = min(narrow(pair, label), pair.width)
        if pair.kind in ("qk", "vo") and (not heads or tower(pair)):
            width = pair.width
        if pair.name in dropped:
            width = 0
        units = torch.stack([torch.randperm(pair.width, generator=generator)[:width]
                             for _ in range(pair.heads)]).sort(1).values  # fmt: skip
        if pair.channels == 2 and 0 < width < pair.width:
            shared = order[tables[layer_of(pair) % len(tables)]]
            units = shared[shared < pair.width][:width].sort().values.expand(pair.heads, -1)
        kept[pair.name] = units
    plan = plan_of(model, [kept[pair.name].shape[1] for pair in pairs])
    gains = {
        p.name: torch.full((p.heads, p.left[0].repeat), 0.7 + 0.1 * layer_of(p)).double()
        for p in pairs if p.norms and kept[p.name].shape[1] < p.width
    }  # fmt: skip
    return replace(plan, kept=kept, gains={**ones(plan), **gains})


def ones(plan):
    return {name: torch.ones_like(gain) for name, gain in plan.gains.items()}


def tower(pair):
    """Whether a pair belongs to the vision tower of a language model, which has no such field."""
    return "vision_tower" in pair.name


def layer_of(pair):
    return next(int(part) for part in pair.name.split(".") if part.isdigit())


def rotary_tables(model):
    """The rotary table of every layer."""
    text = model.config.get_text_config()
    rope = getattr(text, "rope_parameters", None) or {}
    nested = any(isinstance(value, dict) for value in rope.values())
    return list(text.layer_types) if nested else [""]


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
