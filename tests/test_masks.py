"""Masks of the model that is searched: one per sample, and around norms over the heads."""

import pytest
import torch

import solpath
from conftest import CASES, build, inputs
from plans import random_plan
from solpath.errors import FingerprintError
from solpath.model.discovery import find_pairs
from solpath.model.masks import energy_hooks, mask_hooks
from solpath.planning.plan import norm_gain
from solpath.running.forward import activation_mask, forward, output_mask, run

NORMED = ["qwen3", "gemma3_text", "gemma3"]


def draw(pairs, samples, seed=0):
    """Masks in [0, 1], an eighth of them 0 and an eighth 1, one per sample."""
    generator = torch.Generator().manual_seed(seed)
    return {
        pair.name: (torch.rand(samples, pair.units, generator=generator) * 4 / 3 - 1 / 6)
        .clamp(0, 1)
        .double()
        for pair in pairs
    }


def energies(pairs, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        p.name: torch.rand(p.heads, p.left[0].repeat + 1, p.width, generator=generator).double()
        for p in pairs
        if p.norms
    }


def test_a_mask_per_sample_is_that_of_the_sample_alone(model):
    model = model.double()
    pairs, batch = find_pairs(model), inputs(model, samples=3)
    masks = draw(pairs, 3)
    with torch.no_grad(), mask_hooks(model, pairs) as hooked:
        hooked.energy.update(energies(pairs))
        hooked.units.update(masks)
        together = forward(model, batch)
        for i in range(3):
            sample = {name: value[i : i + 1] for name, value in batch.items()}
            for owner in (i, i - 1):
                hooked.units.update({name: mask[owner] for name, mask in masks.items()})
                gap = (together[i] - forward(model, sample)[0]).abs().max() / together.abs().max()
                # Some modules go through float32 whatever the precision.
                assert gap <= 1e-7 if owner == i else gap > 1e-3
    hooks = [{**m._forward_hooks, **m._forward_pre_hooks} for m in model.modules()]
    # transformers leaves hooks of its own on towers of LLaVA.
    assert not any(h.__module__.startswith("solpath") for found in hooks for h in found.values())


def test_every_pair_matters(model):
    """The comparisons of masked and extracted could not fail where a mask does nothing."""
    model = model.double()
    pairs, batch = find_pairs(model), inputs(model)
    masks = random_plan(model, (0.5,)).masks()
    with torch.no_grad(), mask_hooks(model, pairs) as hooked:
        hooked.energy.update(energies(pairs))
        dense = forward(model, batch)
        for pair in pairs:
            hooked.units.clear()
            hooked.units[pair.name] = masks[pair.name]
            change = (forward(model, batch) - dense).abs().max() / dense.abs().max()
            assert change > 1e-5, pair.name  # and that is compared to 1e-12


@pytest.mark.parametrize("label", NORMED)
def test_masks_with_gradient_give_what_those_without_give(label):
    model = build(label).double()
    pairs, batch = find_pairs(model), inputs(model)
    outputs = []
    for gradient in (False, True):
        with mask_hooks(model, pairs) as hooked:
            hooked.energy.update(energies(pairs))
            masks = {name: mask.round() for name, mask in draw(pairs, 4).items()}
            hooked.units.update({n: m.requires_grad_(gradient) for n, m in masks.items()})
            with torch.set_grad_enabled(gradient):
                outputs.append(forward(model, batch).detach())
    assert (outputs[0] - outputs[1]).abs().max() <= 1e-4 * outputs[0].abs().max()


@pytest.mark.parametrize("label", NORMED)
def test_gradients_of_masks_are_slopes(label):
    """Central differences of the loss, also at masks of 0 and 1."""
    model = build(label).double()
    pairs, batch = find_pairs(model), inputs(model)
    model.set_attn_implementation("sdpa")
    pairs = [pair for pair in pairs if pair.norms]
    base = {name: mask.mean(0) for name, mask in draw(pairs, 4).items()}
    for mask in base.values():
        mask[:2], mask[2:4] = 0, 1

    with mask_hooks(model, pairs) as hooked:
        hooked.energy.update(energies(pairs))

        def loss(masks):
            hooked.units.update(masks)
            return forward(model, batch).square().mean()

        leaves = {name: mask.clone().requires_grad_() for name, mask in base.items()}
        loss(leaves).backward()
        step = 1e-3  # norms are in float32
        for name, mask in base.items():
            for unit in range(5):
                sides = []
                for sign in (1, -1):
                    moved = {n: m.clone().requires_grad_() for n, m in base.items()}
                    moved[name].data[unit] = mask[unit] + sign * step
                    sides.append(loss(moved).item())
                slope = (sides[0] - sides[1]) / (2 * step)
                scale = leaves[name].grad.abs().max().item()
                assert abs(slope - leaves[name].grad[unit].item()) <= 1e-2 * scale


def test_norm_gain_is_the_root_of_the_shares_of_energy():
    generator = torch.Generator().manual_seed(0)
    energy = torch.rand(2, 4, 5, generator=generator, dtype=torch.float64)  # 3 query heads, a key
    mask = (torch.rand(2, 5, generator=generator) < 0.6).double()
    gain = norm_gain(mask, energy)
    assert gain.shape == (2, 3)
    for head in range(2):
        kept = [unit for unit in range(5) if mask[head, unit]]
        roots = [
            (sum(row[unit] for unit in kept) / sum(row)) ** 0.5 for row in energy[head].tolist()
        ]
        for query in range(3):
            assert gain[head, query].item() == pytest.approx(roots[query] * roots[3])
    torch.testing.assert_close(norm_gain(torch.ones(2, 5), energy), torch.ones(2, 3))


@pytest.mark.parametrize("label", ["qwen3", "gemma3_text"])
def test_gain_keeps_the_size_of_queries_and_keys(label):
    """With the energy of the very tokens, the masked norm times gain is as large as the dense."""
    model = build(label).double()
    pair = find_pairs(model)[0]
    energy = energy_by_hand(model, pair, inputs(model))
    mask = draw([pair], 1)[pair.name].round().view(pair.heads, pair.width)
    share = (mask[:, None] * energy).sum(-1) / energy.sum(-1)
    expected = (share[:, :-1] * share[:, -1:]).sqrt()
    torch.testing.assert_close(norm_gain(mask, energy), expected)


def energy_by_hand(model, pair, batch):
    """From the input of the block, in loops over heads and units."""
    block = model.get_submodule(pair.name.removesuffix(".attention.qk"))
    seen = []
    handle = block.self_attn.q_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        run(model, batch, labels=False)
    handle.remove()
    hidden = seen[0][batch["attention_mask"].bool()].double()  # [tokens, features]
    weights = block.self_attn.q_proj.weight.double(), block.self_attn.k_proj.weight.double()
    query, key = (hidden @ weight.T for weight in weights)
    size, repeat = 2 * pair.width, pair.left[0].repeat
    energy = torch.zeros(pair.heads, repeat + 1, pair.width, dtype=torch.float64)
    for head in range(pair.heads):
        for slot in range(repeat + 1):
            source, number = (query, head * repeat + slot) if slot < repeat else (key, head)
            for unit in range(pair.width):
                for channel in (unit, unit + pair.width):
                    energy[head, slot, unit] += source[:, number * size + channel].square().sum()
    return energy


@pytest.mark.parametrize("label", ["qwen3", "gemma3_text"])
def test_energy_is_the_sum_of_squares_over_tokens_that_count(label):
    model = build(label).double()
    pairs = [pair for pair in find_pairs(model) if pair.norms]
    batch = inputs(model)
    with torch.no_grad(), energy_hooks(model, pairs, batch) as energy:
        run(model, batch, labels=False)
    for pair in pairs:
        torch.testing.assert_close(energy[pair.name], energy_by_hand(model, pair, batch))


def test_padding_of_two_sides_is_told_apart_or_not_used():
    """Encoder and decoder of equal length: whose activation it is cannot be seen."""
    states, other = torch.zeros(2, 3, 5), torch.zeros(2, 4, 5)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    batch = {"input_ids": mask, "attention_mask": mask}
    assert torch.equal(activation_mask(batch, states, "fc"), mask.bool())
    assert activation_mask(batch, other, "fc") is None
    assert activation_mask(batch | {"decoder_input_ids": mask}, states, "fc") is None
    assert activation_mask(batch | {"decoder_attention_mask": mask.flip(1)}, states, "fc") is None
    assert torch.equal(
        activation_mask(batch | {"decoder_attention_mask": mask}, states, "fc"), mask.bool()
    )
    longer = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
    assert torch.equal(
        activation_mask(batch | {"decoder_attention_mask": longer}, other, "fc"), longer.bool()
    )
    assert activation_mask(mask, states, "fc") is None
    # Pooled, of as many features as tokens; and tokens of all texts in one row after the other.
    assert activation_mask(batch, torch.zeros(2, 3), "fc") is None
    rows = activation_mask(batch, torch.zeros(6, 5), "fc")
    assert torch.equal(rows, mask.bool().flatten())


def test_padding_of_patches_does_not_count():
    patches, text = torch.tensor([[1, 1, 0], [1, 0, 0]]), torch.ones(2, 4)
    states = torch.zeros(2, 3, 5)
    alone = {"pixel_attention_mask": patches}
    for batch in (alone, alone | {"attention_mask": text}):
        for name in ("encoder.layers.0.fc", "vision_model.encoder.layers.0.fc"):
            assert torch.equal(activation_mask(batch, states, name), patches.bool())
    assert torch.equal(output_mask(alone, states), patches.bool())
    assert output_mask(alone | {"attention_mask": text}, torch.zeros(2, 8)) is None


@pytest.mark.parametrize(
    "tower", ["vision_model", "model.vision_tower.vision_model", "model.visual"]
)
def test_padding_of_the_text_says_nothing_about_as_many_patches(tower):
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    batch = {"input_ids": mask, "attention_mask": mask, "pixel_values": torch.zeros(2, 3, 8, 8)}
    states = torch.zeros(2, 3, 5)
    assert activation_mask(batch, states, f"{tower}.layers.0.fc1") is None
    text = activation_mask(batch, states, "text_model.layers.0.fc1")
    assert torch.equal(text, mask.bool())


def test_a_plan_of_another_class_is_refused(bert):
    block = solpath.masked(bert, random_plan(build("vit"), [0.5]))
    with pytest.raises(FingerprintError, match="the class is BertModel, not ViT"):
        block.__enter__()


def test_cases_are_awkward():
    """The shapes that tables get wrong are among the cases."""
    models = {label: build(label) for label in CASES}
    pairs = {label: find_pairs(model) for label, model in models.items()}
    widths = {pair.width % 2 for found in pairs.values() for pair in found if pair.kind != "mlp"}
    assert widths == {0, 1}
    assert any(p.kind == "mlp" and p.width % 2 for found in pairs.values() for p in found)
    assert any(p.heads * p.left[0].repeat == 1 for f in pairs.values() for p in f if p.kind == "qk")
    assert any(sum(p.kind == "mlp" for p in found) == 1 for found in pairs.values())
    assert {p.left[0].repeat for f in pairs.values() for p in f} >= {1, 2, 6}
    apart = {
        label
        for label, model in models.items()
        for pair in pairs[label]
        if pair.kind == "vo"
        and model.get_submodule(pair.right.module).__class__ is torch.nn.Linear
        and pair.units * pair.right.repeat != model.get_submodule(pair.right.module).out_features
    }
    assert apart >= {"llama 1:6", "qwen3", "gemma3_text", "t5", "t5 gated"}
