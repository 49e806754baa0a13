"""Extracted models in other precisions, kernels, compilers and processes, and in training."""

import copy
import inspect
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

import solpath
from conftest import CASES, COMMON, build, inputs
from plans import random_plan
from solpath.running.forward import forward, run

FRACTIONS = (0.5, 0.25, 0.75)


def pair_of(label, fractions=FRACTIONS, **changes):
    """A dense model and what is extracted from it."""
    model = build(label, **changes)
    return model, solpath.extract(model, random_plan(model, fractions))


def result(model):
    with torch.no_grad():
        return forward(model, inputs(model))


def distance(one, two):
    """Relative to the largest entry of `two`."""
    return ((one.double() - two.double()).abs().max() / two.double().abs().max()).item()


def tensors(outputs):
    """Every floating point tensor in the outputs of a model, nested or not."""
    if isinstance(outputs, torch.Tensor):
        return [outputs] if outputs.is_floating_point() else []
    if not hasattr(outputs, "to_tuple") and not isinstance(outputs, tuple | list):
        return []
    parts = outputs.to_tuple() if hasattr(outputs, "to_tuple") else outputs
    return [tensor for part in parts for tensor in tensors(part)]


@pytest.mark.parametrize("fractions", [FRACTIONS, (0.0, 0.5, 1.0)])
@pytest.mark.parametrize("label", COMMON)
def test_eager_is_sdpa(label, fractions):
    models = pair_of(label, fractions)
    if not models[0]._supports_sdpa:
        pytest.skip("transformers has no such kernel for this family")
    for dtype in (torch.float32, torch.float64):
        gaps = []
        for model in models:
            outputs = []
            for name in ("eager", "sdpa"):
                model.to(dtype).set_attn_implementation(name)
                outputs.append(result(model))
            gaps.append(distance(*outputs))
        # Some eager kernels take the softmax in float32, whatever the model's precision.
        exact = dtype is torch.float64 and gaps[0] <= 1e-12
        assert gaps[1] <= (1e-12 if exact else 1e-5)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 0.1), (torch.float16, 0.02)])
@pytest.mark.parametrize("label", COMMON)
def test_half_precision_is_near(label, dtype, bound):
    _, small = pair_of(label)
    expected = result(small)
    low = result(small.to(dtype))
    assert low.dtype == dtype
    assert low.isfinite().all()
    assert distance(low, expected) <= bound
    empty = pair_of(label, (0.0,))[1].to(dtype)
    assert result(empty).isfinite().all()


def idle(model):
    """Parameters that a backward pass of all outputs leaves without gradient."""
    sum(output.square().sum() for output in tensors(run(model, inputs(model), labels=False))
        if output.requires_grad).backward()  # fmt: skip
    return {
        name
        for name, parameter in model.named_parameters()
        if parameter.grad is None or not parameter.grad.any()
    }


@pytest.mark.parametrize("label", COMMON)
def test_one_training_step_changes_every_parameter(label):
    """But those that the dense model does not use either, see `UNUSED`."""
    dense, small = pair_of(label)
    before = copy.deepcopy(small.state_dict())
    optimizer = torch.optim.AdamW(small.parameters(), lr=1e-3, weight_decay=0)
    unused = idle(small)
    optimizer.step()
    assert unused == idle(dense)
    assert all(name.removeprefix("model.").startswith(UNUSED.get(label, "-")) for name in unused)
    for name, parameter in small.named_parameters():
        assert parameter.isfinite().all()
        assert torch.equal(parameter, before[name]) == (name in unused), name


UNUSED = {
    "dinov2": "dinov2.embeddings.mask_token",  # only with masked patches
    "dinov2 gated": "embeddings.mask_token",
    "esm": "esm.contact_head.",  # only in `predict_contacts`
    "esm absolute": "contact_head.",
    "gemma3": "vision_tower.head.",  # the language model reads the patches, not the pooled image
    "llava": "vision_tower.post_layernorm.",  # the language model reads the last block
    "marian": ("encoder.embed_positions", "decoder.embed_positions"),  # likewise sinusoids
    "pegasus": ("encoder.embed_positions", "decoder.embed_positions"),
    "dinov2_with_registers": "dinov2_with_registers.embeddings.mask_token",
    "dinov3_vit": "embeddings.mask_token",
    "dinov3_vit gated": ("embeddings.mask_token", "embeddings.register_tokens"),  # of 0 registers
    "vit_mae": "embeddings.position_embeddings",  # frozen sinusoids
    "whisper": "encoder.embed_positions",  # sinusoids, frozen by transformers
}


@pytest.mark.parametrize(
    ("label", "changes"),
    [
        ("bert one head", {}),
        ("gpt2", {"n_layer": 1}),
        ("llama 1:6", {}),
        ("qwen3", {"num_hidden_layers": 1}),
        ("swin", {}),
        ("t5 gated", {"num_decoder_layers": 1}),
    ],
)
def test_compiled_in_one_graph_is_equal(label, changes):
    _, small = pair_of(label, **changes)
    torch._dynamo.reset()
    compiled = torch.compile(small, backend="aot_eager", fullgraph=True)
    assert distance(result(compiled), result(small)) <= 1e-5


@pytest.mark.parametrize("label", [label for label in COMMON if " " not in label])
def test_exported_is_equal(label):
    _, small = pair_of(label)
    if label == "mixtral":  # the loop over experts depends on data, in the dense model too
        small.set_experts_implementation("batched_mm")
    batch = inputs(small)
    if label == "llava" or "use_cache" in inspect.signature(small.forward).parameters:
        batch["use_cache"] = False  # torch.export returns tensors only
    program = torch.export.export(small, (), batch, strict=False)
    with torch.no_grad():
        expected, found = small(**batch), program.module()(**batch)
    for one, two in zip(tensors(found), tensors(expected), strict=True):
        assert distance(one, two) <= 1e-6


FRESH = """
import sys
from pathlib import Path
import torch
from safetensors.torch import load_file
import solpath

torch.set_num_threads(1)
for folder in sorted(Path(sys.argv[1]).iterdir()):
    model = solpath.load(folder / "model")
    with torch.no_grad():
        outputs = model(**load_file(folder / "inputs.safetensors")).to_tuple()
    outputs = [value for value in outputs if isinstance(value, torch.Tensor)]
    expected = load_file(folder / "outputs.safetensors")
    assert len(outputs) == len(expected) > 0, folder
    for i, output in enumerate(outputs):
        assert torch.equal(output, expected[str(i)]), (folder, i)
    print(folder.name)
"""


def test_a_fresh_process_loads_what_was_saved(tmp_path):
    """Bit for bit, from the folders alone; every second model in bfloat16."""
    for i, label in enumerate(CASES):
        folder = tmp_path / label
        small = pair_of(label)[1].to((torch.float32, torch.bfloat16)[i % 2])
        solpath.save(small, folder / "model")
        batch = inputs(small)
        with torch.no_grad():
            outputs = small(**batch).to_tuple()
        outputs = [value for value in outputs if isinstance(value, torch.Tensor)]
        save_file(batch, folder / "inputs.safetensors")
        named = {str(i): value.clone().contiguous() for i, value in enumerate(outputs)}
        save_file(named, folder / "outputs.safetensors")
    done = subprocess.run(
        [sys.executable, "-c", FRESH, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines() == sorted(CASES)
