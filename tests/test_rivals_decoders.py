"""The rivals on decoders: rotary couples, normed heads, grouped queries; those for decoders."""

import copy

import pytest
import torch
from torch import nn

from conftest import batches, build
from rivals import DECODERS, METHODS, shortgpt, slicegpt
from rivals.allocation import best, uniform
from rivals.llm_pruner import importance
from rivals.moments import Calibration, block_of, calibrate
from rivals.osscar import eliminate, eliminate_groups
from rivals.weights import (
    alive_units,
    inner_weight,
    keep_units_,
    remaining,
    set_gains_,
    set_inner_,
)
from solpath.measuring.evaluation import evaluate
from solpath.model.masks import mask_hooks
from solpath.running.forward import forward

OWN = {name: prune for name, prune in METHODS.items() if not name.startswith("torch_pruning")}
OWN |= DECODERS
WHOLE = {"flap", "shortgpt", "slicegpt"}  # do not leave equal widths of units


def dense(label: str) -> tuple[nn.Module, Calibration]:
    model = build(label)
    return model, calibrate(model, batches(model))


@pytest.fixture(scope="module")
def gemma() -> tuple[nn.Module, Calibration]:
    return dense("gemma3_text")


def error(model: nn.Module, pruned: nn.Module) -> float:
    return evaluate(pruned, model, batches(model)).metrics["relative_error"]


@pytest.mark.parametrize("name", OWN)
def test_normed_heads_and_grouped_queries(gemma, name):
    model, calibration = gemma
    before = copy.deepcopy(model.state_dict())
    whole = OWN[name](model, calibration, 1.0)
    assert remaining(model, whole, calibration.pairs) == 1
    for batch in calibration.batches:
        torch.testing.assert_close(forward(whole, batch), forward(model, batch))
    pruned = OWN[name](model, calibration, 0.5)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert remaining(model, pruned, calibration.pairs) == pytest.approx(
        0.5, abs=0.07
    )  # a head of two
    assert 0 < error(model, pruned) < 3
    if name in WHOLE:
        return
    for pair in calibration.pairs:
        for side in pair.sides:
            alive = inner_weight(pruned, pair, side).abs().amax(3) > 0
            units = alive.unflatten(2, (pair.channels, pair.width))
            assert torch.equal(units, units[:, :1, :1].expand_as(units))
        assert len(alive_units(pruned, pair).sum(1).unique()) == 1


def test_gains_are_those_of_a_plan(gemma):
    model, calibration = gemma
    generator = torch.Generator().manual_seed(0)
    pairs = [pair for pair in calibration.pairs if pair.norms]
    assert pairs
    score = {p.name: torch.rand(p.heads, p.width, generator=generator) for p in pairs}
    kept = best(pairs, score, uniform(pairs, 0.5))
    pruned = copy.deepcopy(model)
    keep_units_(pruned, pairs, kept)
    without = error(model, pruned)
    set_gains_(pruned, pairs, calibration.energy)
    assert error(model, pruned) != without
    with mask_hooks(model, pairs) as masks:
        masks.units.update({name: mask.float().flatten() for name, mask in kept.items()})
        masks.energy.update(calibration.energy)
        wanted = [forward(model, batch) for batch in calibration.batches]
    for batch, target in zip(calibration.batches, wanted, strict=True):
        torch.testing.assert_close(forward(pruned, batch), target)


@pytest.mark.parametrize("name", ["llm_pruner", "corp", "wpac", "osscar", "modegpt_uniform"])
def test_dead_units_leave_first(name):
    model = build("gemma3_text")
    pairs = calibrate(model, batches(model)).pairs
    for pair in pairs:
        for side in pair.sides:
            weight = inner_weight(model, pair, side)
            weight.unflatten(2, (pair.channels, pair.width))[..., ::2, :] = 0
            set_inner_(model, pair, side, weight)
    keep = sum(p.cost * p.heads * (p.width // 2) for p in pairs)
    keep /= sum(p.cost * p.units for p in pairs)
    pruned = OWN[name](model, calibrate(model, batches(model)), keep)
    assert error(model, pruned) < (1e-4 if name == "osscar" else 1e-6)


def test_taylor_importance_is_weight_times_gradient(gemma):
    model, calibration = gemma
    one = Calibration(calibration.pairs, calibration.batches[:1])
    found = importance(model, one)
    assert not any(p.grad is not None for p in model.parameters())
    copied = copy.deepcopy(model).requires_grad_(True)
    batch = one.batches[0]
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    copied(**{**batch, "labels": labels}).loss.backward()
    pair = next(pair for pair in one.pairs if pair.kind == "mlp")
    rows = [copied.get_submodule(side.module).weight for side in pair.sides]
    products = [(weight * weight.grad).abs() for weight in rows]
    wanted = products[0].sum(1) + products[1].sum(1) + products[2].sum(0)
    torch.testing.assert_close(found[pair.name][0].float(), wanted.detach())


def test_grouped_elimination_is_least_squares():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 12, generator=generator).double()
    x = x @ torch.randn(12, 12, generator=generator).double()
    weight, gram = torch.randn(12, 3, generator=generator).double(), x.mT @ x / len(x)
    for one, other in zip(
        eliminate(gram, weight, heads=3), eliminate_groups(gram, weight, 3, 1), strict=True
    ):
        torch.testing.assert_close(one, other)
    added, order = eliminate_groups(gram, weight, 1, 2)  # units i and 6 + i
    stay, total, target = set(range(6)), 0.0, x @ weight
    for step in range(1, 6):
        options = {}
        for unit in stay:
            columns = [i + j for i in stay - {unit} for j in (0, 6)]
            fit = torch.linalg.lstsq(x[:, columns], target).solution
            options[unit] = float((x[:, columns] @ fit - target).square().sum() / len(x))
        unit = int((order == step).nonzero())
        total += float(added[unit])
        assert options[unit] == pytest.approx(min(options.values()))
        assert options[unit] == pytest.approx(total)
        stay.remove(unit)


def test_shortgpt_drops_the_block_that_does_least():
    model = build("llama")
    before = model.model.layers[0]
    for layer in (before.self_attn.o_proj, before.mlp.down_proj):
        nn.init.zeros_(layer.weight)
    calibration = calibrate(model, batches(model))
    assert shortgpt.dropped(calibration, 0.5) == {"model.layers.0"}
    assert shortgpt.dropped(calibration, 0.9) == set()
    pruned = shortgpt.prune(model, calibration, 0.5)
    assert remaining(model, pruned, calibration.pairs) == pytest.approx(0.5)
    assert error(model, pruned) < 1e-12


def test_shortgpt_is_the_model_without_the_block(gemma):
    model, calibration = gemma
    (gone,) = shortgpt.dropped(calibration, 0.5)
    pruned, fewer = shortgpt.prune(model, calibration, 0.5), copy.deepcopy(model)

    def skip(module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        return args[0]

    fewer.get_submodule(gone).register_forward_hook(skip)
    for batch in calibration.batches:
        torch.testing.assert_close(forward(pruned, batch), forward(fewer, batch))


def test_slicegpt_loses_nothing_of_a_narrow_stream():
    """A stream that lies in half of all directions is cut to that half without loss."""
    model = build("llama")
    width = model.config.hidden_size
    generator = torch.Generator().manual_seed(0)
    axes = torch.linalg.qr(torch.randn(width, width // 2, generator=generator)).Q
    flat = axes @ axes.mT
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(model.model.embed_tokens.weight @ flat)
        for block in model.model.layers:
            for layer in (block.self_attn.o_proj, block.mlp.down_proj):
                layer.weight.copy_(flat @ layer.weight)
    calibration = calibrate(model, batches(model))
    dense = sum(pair.cost * pair.units for pair in calibration.pairs)
    turns = 2 * len({block_of(pair) for pair in calibration.pairs})
    for rank, loses in ((width // 2, False), (width // 2 - 2, True)):
        keep = (dense * rank / width + turns * rank**2) / dense
        assert slicegpt.stream_rank(width, dense, turns, keep) == rank
        pruned = slicegpt.prune(model, calibration, keep)
        assert remaining(model, pruned, calibration.pairs) == pytest.approx(keep)
        assert (error(model, pruned) > 1e-4) == loses


def test_slicegpt_says_what_it_cannot_slice():
    with pytest.raises(ValueError, match="SliceGPT is here for decoders"):
        slicegpt.prune(*dense("bert"), 0.5)
