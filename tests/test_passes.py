"""The forward passes of compensation: what they hold, and that running blocks in parts changes
nothing but that."""

import gc

import pytest
import torch
from torch import nn

import solpath
from conftest import COMMON, batches, build
from plans import random_plan
from solpath.errors import BatchError
from solpath.model.discovery import find_pairs
from solpath.refining import compensation
from solpath.refining.layerwise import lockstep
from solpath.refining.passes import held_bytes, input_groups, waits_of
from solpath.running.memory import peak_memory

IN_PLACE = ["falcon"]  # adds to what goes into a block


def two_sizes(dense):
    return [solpath.extract(dense, random_plan(dense, kept, seed=1)) for kept in ([0.7], [0.4])]


def hooks(*models):
    modules = [module for model in models for module in model.modules()]
    return [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in modules]


@pytest.mark.parametrize("label", COMMON + IN_PLACE)
def test_blocks_in_parts_give_the_same_bits(label, monkeypatch):
    dense = build(label)
    models, data = two_sizes(dense), batches(dense, 9)
    pairs = [pair for pair in find_pairs(dense) if pair.kind != "experts"]
    assert waits_of(dense, models, pairs, data[0]).blocks
    whole = solpath.compensate(models, dense, data, progress=False)
    monkeypatch.setattr(compensation, "fits", lambda size, device: False)
    before = hooks(dense, *models)
    parts = solpath.compensate(models, dense, data, progress=False)
    assert hooks(dense, *models) == before
    for one, other in zip(whole, parts, strict=True):
        there = other.state_dict()
        assert all(torch.equal(there[name], value) for name, value in one.state_dict().items())


def test_blocks_run_in_parts_where_the_forecast_is_more_than_what_is_free(monkeypatch):
    dense = build("llama", num_hidden_layers=3)
    models, data = two_sizes(dense), batches(dense, 24)
    waits = waits_of(dense, models, find_pairs(dense), data[0])
    asked: list[int] = []

    def peak(count: int, fits: bool) -> int:
        monkeypatch.setattr(compensation, "fits", lambda size, device: asked.append(size) or fits)
        gc.collect()
        some = data[:count]
        return peak_memory(lambda: solpath.compensate(models, dense, some, progress=False))[0]

    whole, parts = (peak(24, fits) - peak(12, fits) for fits in (True, False))
    with torch.no_grad():
        forecast = [held_bytes(waits, dense, models, data[0], data[:count]) for count in (24, 12)]
    assert asked == forecast * 2
    assert whole == pytest.approx(forecast[0] - forecast[1], rel=0.2)
    assert parts < 0.6 * whole


class Block(nn.Module):
    """Two layers; what goes in is changed in place, and the second has no use for large numbers."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(2, 2), nn.Linear(2, 2)

    def forward(self, x):
        x += self.left(x)
        return x if x.min() < -9 else self.right(2 * x)


@pytest.fixture
def pair_of_blocks():
    torch.manual_seed(0)
    model = nn.Sequential(Block(), Block())
    groups = input_groups(model, ["0.left", "0.right", "1.left", "1.right"], torch.ones(1, 2))
    assert len(groups) == 4
    return model, groups


@torch.no_grad()
def test_a_part_of_a_block_finds_the_inputs_as_they_were(pair_of_blocks):
    model, groups = pair_of_blocks

    def calls(blocks):
        data = [torch.ones(3, 2), torch.full((3, 2), 0.5)]
        found = lockstep(model, data, groups, {}, blocks=blocks)
        return {group: [call.value.clone() for call in calls] for group, calls in found}

    whole, parts = calls(()), calls(("0", "1"))
    assert list(whole) == list(parts) == groups
    for group in groups:
        assert all(map(torch.equal, whole[group], parts[group]))


@torch.no_grad()
def test_a_batch_that_leaves_a_layer_out_is_refused(pair_of_blocks):
    model, groups = pair_of_blocks
    data = [torch.ones(1, 2), torch.full((1, 2), -100.0)]
    for blocks, words in (((), "runs"), (("0", "1"), "does not run")):
        found = lockstep(model, data, groups, {}, blocks=blocks)
        with pytest.raises(BatchError, match=rf"one batch {words} 0\.right"):
            [list(calls) for _, calls in found]
        found.close()
    assert not any(sum(found) for found in hooks(model))
