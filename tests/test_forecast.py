"""What a search would need, from shapes alone, beside what it measures when it runs."""

import pytest
import torch

from conftest import build
from solpath.errors import UnsupportedModelError
from solpath.model.discovery import find_pairs
from solpath.searching.engine import open_engine
from solpath.searching.forecast import Forecast, forecast


@pytest.mark.parametrize("label", ["bert", "llama", "vit", "clip"])
def test_a_forecast_is_near_what_is_measured(label):
    model = build(label)
    config = getattr(model.config, "vision_config", model.config)
    batch = {}
    if label in ("vit", "clip"):
        shape = 4, config.num_channels, config.image_size, config.image_size
        batch["pixel_values"] = torch.randn(shape)
    if label != "vit":
        batch["input_ids"] = torch.randint(1, 59, (4, 8))
    with open_engine(model, [batch], loss=None, seed=0) as engine:
        measured = engine.estimate(1, 200)
    found = forecast(model.to("meta"), find_pairs(model), tokens=8, samples=4)
    step = found.passes[0] + 3 * (found.passes[1] - found.passes[0])
    assert found.weights == pytest.approx(measured.weights, rel=0.1)
    assert 0.6 < step / measured.step < 1.7
    assert found.recomputed[1] <= found.passes[1]


def test_experts_have_no_forecast():
    model = build("mixtral").to("meta")
    with pytest.raises(UnsupportedModelError, match="no forecast for MixtralForCausalLM"):
        forecast(model, find_pairs(model), tokens=8, samples=2)


def test_what_is_done_for_less_memory():
    found = Forecast(10**9, (10**8, 2 * 10**8), (10**7, 2 * 10**7), 0, 16)
    assert found.on(8 * 10**9, disk=False) == (10**9 + 16 * 10**8, "as it is")
    assert found.on(2 * 10**9, disk=False) == (10**9 + 16 * 10**7, "recompute")
    more = found._replace(recomputed=(3 * 10**7, 6 * 10**7))
    eight = 10**9 + 8 * 3 * 10**7, "recompute, --micro-batch 8"
    assert more.on(1_310_000_000, disk=False) == eight
    assert found.on(10**9, disk=False)[0] is None
    assert found.on(10**9, disk=True) == (16 * 10**7, "weights stay on disk, recompute")
