"""Folders of stock classes: families and cuts that plain transformers holds exactly, or refuses.

All families and cuts are in benchmarks/stock_cuts.py.
"""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import solpath
from conftest import build, inputs
from plans import HEADS, heads_plan, plan_of, random_plan, stock_plan
from solpath.errors import ConfigError, ExportError
from solpath.exporting.card import Facts, model_card
from solpath.exporting.export import export
from solpath.exporting.formats import Load
from solpath.exporting.origin import Origin
from solpath.exporting.stock import open_folder
from solpath.exporting.stock_rotary import longrope_factors
from solpath.model.discovery import find_pairs

NAMED = ["bert", "dinov2", "gemma2", "gemma3_text", "gpt2", "granite", "llama", "mixtral", "qwen3"]
NAMED += ["swin", "t5", "vit", "whisper"]
GENERATE = ["gemma3_text", "gpt2", "llama", "qwen3", "t5"]


def small_of(label, cut="both", **changes):
    model = build(label, **changes)
    return solpath.extract(model, stock_plan(model, label, cut))


def numbers(folder):
    """How many numbers the weight files of a folder hold."""
    count = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            count += sum(opened.get_tensor(name).numel() for name in opened.keys())  # noqa: SIM118
    return count


@pytest.mark.parametrize("label", NAMED)
def test_a_stock_class_holds_the_cut(label, tmp_path):
    small = small_of(label, "both" if label in HEADS else "mlp")
    result = export(small, tmp_path / "x", "stock", batch=inputs(small))
    assert {row.inputs for row in result.parity} == {"random", "given"}
    assert max(row.difference for row in result.parity) <= 2e-6
    state = {t.data_ptr() or name: t.numel() for name, t in small.state_dict().items()}
    norms = any(pair.norms for pair in small.solpath_plan.pairs)  # they become narrower as well
    assert norms or numbers(tmp_path / "x") == sum(state.values())
    assert "zeros" not in (tmp_path / "x" / "README.md").read_text()
    if label in GENERATE:
        check_generation(small, type(small).from_pretrained(tmp_path / "x"))


COUNTS = {"num_key_value_heads": 4, "num_attention_heads": 8}
ONE_NUMBER = {
    "dinov2": {},
    "gemma": {},
    "llama": {},
    "mistral": {},
    "qwen2": {},
    "qwen3": {},
    "vit": {},
}  # families whose class has a field for the number of heads
ONE_NUMBER |= dict.fromkeys(("gemma", "llama", "mistral", "qwen2", "qwen3"), COUNTS)


def headless_of(label, left, mlps=(1.0,), **changes):
    """A model whose attentions keep some whole heads."""
    model = build(label, **(ONE_NUMBER.get(label, {}) | changes))
    plan = heads_plan(model, left, mlps)
    assert plan.heads
    return solpath.extract(model, plan)


@pytest.mark.parametrize("label", ONE_NUMBER)
def test_a_stock_class_holds_one_number_of_heads(label, tmp_path):
    small = headless_of(label, (3,), (0.5,))
    result = export(small, tmp_path / "x", "stock", batch=inputs(small))
    assert max(row.difference for row in result.parity) <= 2e-6
    state = {t.data_ptr() or name: t.numel() for name, t in small.state_dict().items()}
    assert numbers(tmp_path / "x") == sum(state.values())
    config = json.loads((tmp_path / "x" / "config.json").read_text())
    assert config["num_attention_heads"] == (6 if ONE_NUMBER[label] else 3)
    assert "zeros" not in (tmp_path / "x" / "README.md").read_text()
    if small.can_generate():
        stock = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "x")
        check_generation(small, stock)


@pytest.mark.parametrize("label", [*ONE_NUMBER, "bert", "gemma3_text", "gpt2", "t5", "whisper"])
def test_heads_that_differ_between_layers_are_padded_on_request_alone(label, tmp_path):
    changes = COUNTS | {"num_attention_heads": 4} if label == "gemma3_text" else {}
    small = headless_of(label, (1, 2, 3), (1.0, 0.5), **changes)
    fields = label in ONE_NUMBER or label == "gemma3_text"
    words = "plan with the constraint uniform" if fields else "plan without whole_groups"
    with pytest.raises(ExportError, match=rf"{words}.* With pad=True .* pads [\d,]+ parameters"):
        export(small, tmp_path / "x", "stock", batch=inputs(small))
    assert not (tmp_path / "x").exists()
    result = export(small, tmp_path / "x", "stock", batch=inputs(small), pad=True)
    assert max(row.difference for row in result.parity) <= 2e-6
    card = (tmp_path / "x" / "README.md").read_text()
    [zeros] = [line for line in card.splitlines() if line.endswith("up to one width.")]
    padded = int(zeros.split("here, ")[1].split(" parameters")[0].replace(",", ""))
    state = {t.data_ptr() or name: t.numel() for name, t in small.state_dict().items()}
    assert padded == numbers(tmp_path / "x") - sum(state.values()) > 0


def test_a_number_of_heads_that_llama_refuses_is_held_by_mistral(tmp_path):
    small = headless_of("llama", (3,), **COUNTS, sliding_window=None)
    assert small.config.hidden_size % 6
    export(small, tmp_path / "x", "stock", batch=inputs(small))
    config = json.loads((tmp_path / "x" / "config.json").read_text())
    assert config["architectures"] == ["MistralForCausalLM"]
    assert config["sliding_window"] is None
    four = headless_of("llama", (2,), **COUNTS)
    export(four, tmp_path / "four", "stock", batch=inputs(four))
    config = json.loads((tmp_path / "four" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]


@pytest.mark.parametrize(
    ("label", "changes"),
    [("llama", {"attention_bias": True}), ("llama", {"mlp_bias": True}),
     ("gemma3_text", COUNTS | {"hidden_size": 32}), ("eurobert", COUNTS)],
)  # fmt: skip
def test_a_number_of_heads_that_a_class_refuses_is_padded(label, changes, tmp_path):
    small = headless_of(label, (3,), **changes)
    with pytest.raises(ExportError, match=r"must divide the hidden size of 32, .* 4 .* it keeps 3"):
        export(small, tmp_path / "x", "stock", batch=inputs(small))
    result = export(small, tmp_path / "x", "stock", batch=inputs(small), pad=True)
    assert max(row.difference for row in result.parity) <= 2e-6


def test_heads_may_be_fewer_and_narrower(tmp_path):
    model = build("llama", **COUNTS)
    narrow, few = stock_plan(model, "llama", "heads"), heads_plan(model, (2,))
    kept = {n: index[: len(few.kept[n])] for n, index in narrow.kept.items()}
    small = solpath.extract(model, replace(few, kept=kept))
    result = export(small, tmp_path / "x", "stock", batch=inputs(small))
    assert max(row.difference for row in result.parity) <= 2e-6


def check_generation(small, stock):
    """Texts are padded on their left, and caches have the widths of both models."""
    batch = {name: value.flip(1) for name, value in inputs(small).items() if "decoder" not in name}
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    assert torch.equal(small.generate(**batch, **options), stock.generate(**batch, **options))


@pytest.mark.parametrize("label", ["bert", "gpt2", "phi3", "t5"])
def test_uneven_widths_are_padded_on_request_alone(label, tmp_path):
    model = build(label)
    small = solpath.extract(model, random_plan(model, (0.5, 0.25, 0.75, 0.6)))
    with pytest.raises(ExportError, match=r"pad=True .* pads [\d,]+ parameters"):
        export(small, tmp_path / "x", "stock", batch=inputs(small))
    assert not (tmp_path / "x").exists()
    result = export(small, tmp_path / "x", "stock", batch=inputs(small), pad=True)
    assert max(row.difference for row in result.parity) <= 2e-6
    card = (tmp_path / "x" / "README.md").read_text()
    [zeros] = [line for line in card.splitlines() if line.endswith("up to one width.")]
    padded = int(zeros.split("here, ")[1].split(" parameters")[0].replace(",", ""))
    state = {t.data_ptr() or name: t.numel() for name, t in small.state_dict().items()}
    assert padded == numbers(tmp_path / "x") - sum(state.values()) > 0


def test_what_is_in_the_way_is_named(tmp_path):
    model = build("llama")
    plan = stock_plan(model, "llama", "both")
    name = next(pair.name for pair in find_pairs(model) if pair.kind == "qk")
    other = torch.tensor([[0, 1], [2, 3]])
    for changes, message in (
        ({name: other}, "shared_couples"),
        ({name: plan.kept[name][:, :1]}, "uniform"),
    ):
        small = solpath.extract(model, replace(plan, kept={**plan.kept, **changes}))
        with pytest.raises(ExportError, match=message):
            export(small, tmp_path / "x", "stock", batch=inputs(small))
    small = small_of("bert", "uneven")
    with pytest.raises(ExportError, match=r"no field for the width of its heads.*protect"):
        export(small, tmp_path / "x", "stock", batch=inputs(small))
    mixture = build("mixtral")
    widths = [12 if pair.kind == "experts" else pair.width for pair in find_pairs(mixture)]
    small = solpath.extract(mixture, plan_of(mixture, widths))
    with pytest.raises(ExportError, match=r"no value for the 12 units.*multiple_of=8"):
        export(small, tmp_path / "x", "stock", batch=inputs(small))


def test_gains_that_differ_between_heads_are_refused(tmp_path):
    model = build("gemma3_text")
    plan = stock_plan(model, "gemma3_text", "heads")
    gains = {name: gain + torch.arange(gain.numel()).view(gain.shape) for name, gain in
             plan.gains.items()}  # fmt: skip
    small = solpath.extract(model, replace(plan, gains=gains))
    for pad in (False, True):
        with pytest.raises(ExportError, match=r"gains of 0\.70\d to .*protect"):
            export(small, tmp_path / "x", "stock", batch=inputs(small), pad=pad)


ROPES = {
    "linear": {"factor": 4.0},
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 16},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 10},
}  # fmt: skip


@pytest.mark.parametrize("kind", ROPES)
def test_other_rotary_tables_are_held(kind, tmp_path):
    rope = {"rope_type": kind, "rope_theta": 100.0, **ROPES[kind]}
    small = small_of("llama", "heads", rope_parameters=rope)
    result = export(small, tmp_path / "x", "stock", batch=inputs(small))
    assert max(row.difference for row in result.parity) <= 2e-6


def test_a_rotary_table_that_changes_with_the_length_is_refused(tmp_path):
    rope = {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 2.0}
    small = small_of("llama", "heads", rope_parameters=rope)
    with pytest.raises(ExportError, match="'dynamic', which changes with the length"):
        export(small, tmp_path / "x", "stock", batch=inputs(small))


def test_frequencies_agree_at_long_distances():
    inverse = 1.0 / 500000.0 ** (torch.arange(0, 128, 2).float() / 128)
    kept = inverse[torch.randperm(64, generator=torch.Generator().manual_seed(0))[:40]]
    factors = torch.tensor(longrope_factors(kept, 500000.0))
    exponents = torch.arange(0, 80, 2, dtype=torch.int64).float() / 80  # as transformers does it
    found = 1.0 / (factors * 500000.0**exponents)
    assert ((found - kept).abs() / kept).max() <= 2.0**-23


def test_folders_load_where_solpath_is_absent(tmp_path):
    expected = {}
    for label, cut in (("llama", "both"), ("vit", "heads"), ("t5", "both"), ("bert", "dropped"),
                       ("mistral", "count"), ("qwen2", "count")):  # fmt: skip
        small = headless_of(label, (3,)) if cut == "count" else small_of(label, cut)
        home = tmp_path / label
        home.mkdir()
        save_file(inputs(small), home / "inputs.safetensors")
        export(small, home / "x", "stock", batch=inputs(small))
        with torch.no_grad():
            expected[home] = next(iter(small(**inputs(small)).values()))
    script = Path(__file__).with_name("bare.py")
    command = [sys.executable, "-I", str(script), *(str(home / "x") for home in expected)]
    subprocess.run(command, check=True, capture_output=True)
    for home, value in expected.items():
        found = load_file(home / "outputs.safetensors")
        name = "logits" if "logits" in found else "last_hidden_state"
        assert (found[name] - value).abs().max() <= 2e-6 * value.abs().max()


def test_a_loaded_model_leaves_no_mark_of_solpath(tmp_path):
    small = small_of("llama")
    solpath.save(small, tmp_path / "saved")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    export(loaded, tmp_path / "x", "stock", batch=inputs(small))
    names = {file.name for file in (tmp_path / "x").iterdir()}
    assert names == {"README.md", "config.json", "generation_config.json", "model.safetensors",
                     "solpath_export.json"}  # fmt: skip
    config = json.loads((tmp_path / "x" / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["head_dim"] == 4
    assert config["rope_parameters"]["rope_type"] == "longrope"


def test_a_model_without_a_part_is_refused(tmp_path):
    torch.manual_seed(0)
    config = build("bert").config
    model = transformers.BertModel(config, add_pooling_layer=False).eval()
    with pytest.raises(ExportError, match=r"missing_keys.*pooler"):
        export(model, tmp_path / "x", "stock", batch=inputs(model))


def test_a_damaged_folder_is_refused(tmp_path):
    small = small_of("vit", "mlp")
    export(small, tmp_path / "x", "stock")
    file = tmp_path / "x" / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("fc1.bias") or "intermediate" in name)
    save_file({k: v for k, v in tensors.items() if k != name}, file, {"format": "pt"})
    with pytest.raises(ExportError, match="loads another model"):
        open_folder(tmp_path / "x")


def test_models_that_no_stock_class_holds_are_refused(tmp_path):
    class Own(transformers.BertModel):
        pass

    own = Own(build("bert").config).eval()
    for model, message in ((own, "no class that transformers has"),
                           (build("bert").half(), r"model\.float\(\)"),
                           (torch.nn.Linear(2, 2), "not a model of transformers")):  # fmt: skip
        with pytest.raises(ExportError, match=message):
            export(model, tmp_path / "x", "stock", batch={"input_ids": torch.ones(1, 3).long()})
    with pytest.raises(ConfigError, match="not 'padding'"):
        export(build("bert"), tmp_path / "x", "stock", padding=True)


def test_the_card_says_what_is_known(tmp_path):
    home = tmp_path / "dense"
    model = build("llama")
    model.save_pretrained(home)
    (home / "README.md").write_text("---\nlicense: apache-2.0\n---\nA model.")
    model = transformers.AutoModelForCausalLM.from_pretrained(home)
    small = solpath.extract(model, stock_plan(model, "llama", "both"))
    result = export(small, tmp_path / "x", "stock", batch=inputs(model))
    card = (result.folder / "README.md").read_text()
    assert "license: apache-2.0" in card
    assert "base_model" not in card  # a folder says nothing to others
    assert str(tmp_path) not in card
    assert "AutoModelForCausalLM.from_pretrained(folder)" in card
    assert "| query and key | 8 | 4 |" in card


def test_a_card_of_plain_facts():
    load = Load("onnxruntime", "onnx run", "bash")
    card = model_card(Facts("BertModel", "ONNX", [load], sizes={"parameters": (200, 150)}))
    title = "# BertModel with 75.0 % of its parameters\n"
    assert card.startswith(f"---\ntags:\n- pruned\n---\n\n{title}")
    assert "```bash\nonnx run\n```" in card
    origin = Origin("google/bert", (), {"license": "mit"})
    base = model_card(Facts("BertModel", "ONNX", origin=origin, library="onnx"))
    for line in ("base_model: google/bert", "library_name: onnx", "license: mit"):
        assert f"{line}\n" in base
    assert "pruned" not in base  # it is dense
