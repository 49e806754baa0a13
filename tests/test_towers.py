"""Models of image and text: each tower may be cut alone, or both under one budget."""

import pytest
import torch

import solpath
from conftest import batches, build, inputs
from solpath.model.discovery import find_pairs
from solpath.running.forward import forward

TOWERS = ("text_model", "vision_model")


@pytest.fixture(scope="module", params=["clip", "siglip"])
def searched(request):
    """A model and one search of both its towers."""
    model = build(request.param)
    config = solpath.SearchConfig(steps=6)
    return model, solpath.search(model, batches(model), config, progress=False)


def text_of(model):
    batch = inputs(model)
    with torch.no_grad():
        return model.get_text_features(batch["input_ids"], batch["attention_mask"])


def image_of(model):
    with torch.no_grad():
        return model.get_image_features(inputs(model)["pixel_values"])


@pytest.mark.parametrize("kept", TOWERS)
def test_a_protected_tower_stays_bit_for_bit(searched, kept):
    model, path = searched
    [cut] = set(TOWERS) - {kept}
    plan = path.plan(sparsity=0.3, protect=[f"{kept}*"])
    small = solpath.extract(model, plan)
    before = model.state_dict()
    for name, value in small.state_dict().items():
        if name.startswith(kept):
            assert torch.equal(value, before[name])
    assert {p.name.split(".")[0] for p in plan.pairs if plan.widths[p.name] < p.width} == {cut}
    same, other = (text_of, image_of) if kept == "text_model" else (image_of, text_of)
    assert torch.equal(same(small).pooler_output, same(model).pooler_output)
    assert not torch.equal(other(small).pooler_output, other(model).pooler_output)


def test_both_towers_share_a_budget_and_nest(searched):
    model, path = searched
    larger = None
    for sparsity in (0.2, 0.5, 0.8):
        plan = path.plan(sparsity=sparsity)
        cut = {p.name.split(".")[0] for p in plan.pairs if plan.widths[p.name] < p.width}
        assert cut == set(TOWERS)
        assert plan.achieved.sparsity == pytest.approx(sparsity, abs=0.02)
        small = solpath.extract(model, plan)
        with torch.no_grad(), solpath.masked(model, plan):
            expected = forward(model, inputs(model))
        with torch.no_grad():
            torch.testing.assert_close(forward(small, inputs(model)), expected)
        for name, kept in plan.kept.items():
            for row, wide in zip(kept.tolist(), (larger or plan).kept[name].tolist(), strict=True):
                assert set(row) <= set(wide)
        larger = plan


@pytest.mark.parametrize(
    ("label", "tower"), [("clip", t) for t in TOWERS] + [("siglip", TOWERS[0])]
)
def test_a_tower_alone_has_the_pairs_it_has_in_the_whole(label, tower):
    whole, alone = build(label), build(f"{label}_{tower}")
    expected = [p for p in find_pairs(whole) if p.name.startswith(tower)]
    names = [pair.name.partition("encoder")[2] for pair in find_pairs(alone)]
    assert names == [pair.name.partition("encoder")[2] for pair in expected]
    shapes = [(p.kind, p.heads, p.width, p.cost) for p in expected]
    assert shapes == [(p.kind, p.heads, p.width, p.cost) for p in find_pairs(alone)]
