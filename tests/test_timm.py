"""timm's models, bare and wrapped; skipped without timm and a torchvision that fits torch."""

import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
    TimmWrapperModel,
)

import solpath
from conftest import TIMM_CASES, batches, inputs, randomise_
from solpath.arch import known_model_types
from solpath.arch.timm import check_settings
from solpath.errors import ConfigError, SolpathError, UnsupportedModelError
from solpath.model.discovery import find_pairs
from solpath.model.masks import mask_hooks
from solpath.running.forward import forward

# These run here on the `model` of this module.
from test_basis import test_the_dense_model_is_the_same_function  # noqa: F401
from test_exactness import (  # noqa: F401
    FRACTIONS,
    both,
    random_plan,
    test_cost_of_a_plan_is_what_extraction_counts,
    test_family_from_a_real_search_is_nested_and_exact,
    test_gradients_flow_as_in_the_masked_model,
    test_nothing_removed_is_bit_identical,
    test_removing_units_changes_the_output,
    test_the_model_shares_nothing_with_its_extract,
    with_fingerprint,
)
from test_pairs import (  # noqa: F401
    test_channels_of_units_partition_every_layer,
    test_every_linear_layer_of_the_blocks_is_in_a_pair,
    test_macs_of_the_dense_model_fall_by_the_cost_of_units,
    test_units_account_for_every_parameter_but_the_outer_biases,
)

try:
    import timm
    from timm.layers import AttentionRope, SwiGLUPacked
    from timm.models.vision_transformer import (
        ParallelScalingBlock,
        ParallelThingsBlock,
        VisionTransformer,
    )
except (ImportError, RuntimeError) as error:  # the latter from a torchvision that does not fit
    pytest.skip(f"timm: {error}", allow_module_level=True)


def bare(label: str, **changes: object) -> nn.Module:
    """A tiny random model of timm."""
    name, sizes = TIMM_CASES[label]
    model = timm.create_model(name, **sizes | changes).eval()
    torch.manual_seed(0)
    return randomise_(model)


def wrapped(label: str, cls=TimmWrapperForImageClassification) -> nn.Module:
    """The same model in transformers."""
    name, sizes = TIMM_CASES[label]
    sizes = dict(sizes)
    classes = sizes.pop("num_classes")
    model = cls(TimmWrapperConfig(architecture=name, model_args=sizes, num_labels=classes)).eval()
    torch.manual_seed(0)
    return randomise_(model)


MODELS = {label: (bare, label) for label in TIMM_CASES}
MODELS["wrapped"] = wrapped, "timm/SwinTransformer"
MODELS["hidden"] = wrapped, "timm/VisionTransformer", TimmWrapperModel


@pytest.fixture(params=MODELS)
def model(request) -> nn.Module:
    make, *arguments = MODELS[request.param]
    return make(*arguments)


@pytest.fixture(params=TIMM_CASES)
def label(request) -> str:
    return request.param


def set_fused_(model: nn.Module, fused: bool) -> None:
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = fused


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("fractions", FRACTIONS)
def test_masked_equals_extracted(model, fractions, fused):
    set_fused_(model, fused)
    plan = random_plan(model, fractions)
    for dtype, bound in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        masked, small = both(model.to(dtype), with_fingerprint(plan, model), inputs(model))
        assert (masked - small).abs().max() <= bound * masked.abs().max()


def test_the_projection_stays_fused(label):
    model = bare(label)
    plan = random_plan(model, (0.5, 0.25))
    small = solpath.extract(model, plan)
    for qk, vo, _ in zip(*[iter(plan.pairs)] * 3, strict=True):
        width = 2 * plan.widths[qk.name] + plan.widths[vo.name]
        assert small.get_submodule(qk.right.module).out_features == qk.heads * width


def test_heads_and_widths():
    expected = {
        "timm/VisionTransformer": [("qk", 3, 8), ("vo", 3, 8), ("mlp", 1, 43)] * 2,
        "timm/SwinTransformer": [("qk", 2, 6), ("vo", 2, 6), ("mlp", 1, 20)] * 2
        + [("qk", 3, 8), ("vo", 3, 8), ("mlp", 1, 40)] * 2,
    }
    for label, pairs in expected.items():
        for model in (bare(label), wrapped(label)):
            assert [(p.kind, p.heads, p.width) for p in find_pairs(model)] == pairs


def test_a_mask_per_sample_is_each_sample_alone(model):
    """Windows of a sample are rows next to each other."""
    model = model.double()
    pairs, batch = find_pairs(model), inputs(model, samples=3)
    generator = torch.Generator().manual_seed(0)
    rows = {p.name: torch.rand(3, p.units, generator=generator).round() for p in pairs}
    with torch.no_grad(), mask_hooks(model, pairs) as masks:
        masks.units.update(rows)
        together = forward(model, batch)
        for i in range(3):
            masks.units.update({name: mask[i] for name, mask in rows.items()})
            one = (
                batch[i : i + 1]
                if isinstance(batch, torch.Tensor)
                else {name: value[i : i + 1] for name, value in batch.items()}
            )
            alone = forward(model, one)[0]
            assert (alone - together[i]).abs().max() <= 1e-12 * alone.abs().max()


def test_dropout_is_that_of_the_dense_model(label):
    """With whole MLPs both draw the same noise."""
    model = bare(label, attn_drop_rate=0.3, proj_drop_rate=0.2, drop_rate=0.1, drop_path_rate=0.1)
    set_fused_(model, True)
    plan = random_plan(model, (0.5, 0.75, 1.0))
    small = solpath.extract(model, plan)
    quiet = forward(small, inputs(model))
    torch.manual_seed(1)
    noisy = forward(small.train(), inputs(model))
    torch.manual_seed(1)
    with solpath.masked(model.train(), plan):
        expected = forward(model, inputs(model))
    torch.testing.assert_close(noisy, expected)
    assert (noisy - quiet).abs().max() > 1e-2 * quiet.abs().max()


def test_a_training_step_changes_every_parameter(model):
    small = solpath.extract(model, random_plan(model, (0.5, 0.25, 0.75))).train()
    before = {name: value.clone() for name, value in small.named_parameters()}
    optimiser = torch.optim.SGD(small.parameters(), lr=0.1)
    forward(small, inputs(model)).square().sum().backward()
    optimiser.step()
    assert not [n for n, p in small.named_parameters() if torch.equal(p, before[n])]


FRESH = """
import sys
import torch, solpath
from safetensors.torch import load_file, save_file
for name in sys.argv[1:]:
    x = load_file(name + ".safetensors")["x"]
    with torch.no_grad():
        y = solpath.load(name)(x)[0]
    save_file({"y": y}, name + ".safetensors")
"""


def test_save_and_load_bit_for_bit_in_a_fresh_process(tmp_path):
    made = {}
    models = [wrapped(label) for label in TIMM_CASES]
    models.append(wrapped("timm/VisionTransformer", TimmWrapperModel))
    for i, model in enumerate(models):
        model.to((torch.float32, torch.bfloat16, torch.float64)[i % 3])
        small = solpath.extract(model, random_plan(model, ((0.5, 0.25), (0.0, 0.4, 0.7))[i % 2]))
        solpath.save(small, tmp_path / str(i))
        loaded = solpath.load(tmp_path / str(i))
        state = dict(loaded.named_buffers()) | loaded.state_dict()
        for name, value in (dict(small.named_buffers()) | small.state_dict()).items():
            assert torch.equal(state.pop(name), value)
        assert not state
        assert loaded.config.to_dict() == small.config.to_dict()
        x = inputs(model)["pixel_values"]
        save_file({"x": x}, tmp_path / f"{i}.safetensors")
        with torch.no_grad():
            made[i] = small(x)[0]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", FRESH, *map(str, made)]
    subprocess.run(command, check=True, env=environment, cwd=tmp_path)
    for i, y in made.items():
        assert torch.equal(load_file(tmp_path / f"{i}.safetensors")["y"], y)


def test_saving_a_bare_model_says_to_wrap_it(tmp_path):
    model = bare("timm/VisionTransformer")
    with pytest.raises(SolpathError, match="Wrap a timm model in TimmWrapperForImage"):
        solpath.save(solpath.extract(model, random_plan(model, (0.5,))), tmp_path / "model")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("cls", [TimmWrapperModel, TimmWrapperForImageClassification])
def test_other_models_of_timm_are_refused(cls):
    config = TimmWrapperConfig(architecture="test_resnet", num_labels=3)
    known = ", ".join(name for name in known_model_types() if name.startswith("timm/"))
    for model in (cls(config), timm.create_model("test_resnet")):
        with pytest.raises(UnsupportedModelError, match=f"'timm/ResNet' is not known; .*{known}"):
            find_pairs(model)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"qk_norm": True}, r"blocks\.0\.attn\.q_norm is a LayerNorm"),
        ({"scale_attn_norm": True}, r"blocks\.0\.attn\.norm is a LayerNorm"),
        ({"scale_mlp_norm": True}, r"blocks\.0\.mlp\.norm is a LayerNorm"),
        ({"mlp_layer": SwiGLUPacked, "mlp_ratio": 2}, r"mlp\.fc1 has 48 outputs for the 24 inputs"),
        ({"attn_layer": AttentionRope}, r"blocks\.0\.attn is a AttentionRope, not a Attention"),
        ({"block_fn": ParallelScalingBlock}, r"blocks\.0 is a ParallelScalingBlock without attn"),
        ({"block_fn": ParallelThingsBlock}, r"blocks\.0 is a ParallelThingsBlock without attn"),
    ],
)
def test_other_blocks_are_refused(changes, message):
    model = VisionTransformer(**TIMM_CASES["timm/VisionTransformer"][1] | changes)
    with pytest.raises(UnsupportedModelError, match=message):
        find_pairs(model)


def test_a_gate_is_refused():
    """`Attention` of later versions can have one."""
    model = bare("timm/VisionTransformer")
    model.blocks[1].attn.gate = nn.Linear(24, 24)
    with pytest.raises(UnsupportedModelError, match=r"blocks\.1\.attn\.gate is a Linear"):
        find_pairs(model)


@pytest.mark.parametrize(
    ("architecture", "options", "message"),
    [
        ("hf-hub:someone/model", {}, "architecture is 'hf-hub:someone/model'"),
        ("local-dir:/tmp", {}, "architecture is 'local-dir:/tmp'"),
        ("no_such_model", {}, "architecture is 'no_such_model'"),
        (None, {}, "architecture is None"),
        ("vit_tiny_patch16_224", {"checkpoint_path": "weights.pt"}, "has 'checkpoint_path'"),
        ("vit_tiny_patch16_224", {"pretrained_cfg": {"file": "/x"}}, "has 'pretrained_cfg'"),
        ("vit_tiny_patch16_224", {"depth": 2, "device": "cpu"}, "has 'device'"),
    ],
)
def test_settings_of_a_file_only_build(architecture, options, message):
    with pytest.raises(ConfigError, match=message):
        check_settings({"architecture": architecture, "model_args": options})


def test_search_of_a_bare_model_with_a_loss_is_that_of_its_wrapper():
    """The same order, whoever calls the model."""

    def loss(outputs, batch):
        logits = outputs if isinstance(outputs, torch.Tensor) else outputs.logits
        return logits.square().sum(-1).mean()

    config = solpath.SearchConfig(steps=4)
    paths = [
        solpath.search(m, batches(m), config, loss=loss, progress=False)
        for m in (bare("timm/SwinTransformer"), wrapped("timm/SwinTransformer"))
    ]
    kept = [list(path.plan(sparsity=0.5).kept.values()) for path in paths]
    assert all(torch.equal(a, b) for a, b in zip(*kept, strict=True))
