"""Confidence intervals of `evaluate`: they hold as often as they say, over texts of any length."""

import numpy as np
import pytest
import torch
from scipy.stats import t

import solpath
from conftest import batches, build
from solpath.measuring.intervals import mean_interval, share_interval


def worlds(rng: np.random.Generator, samples: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Texts of 1 to 40 tokens; those of one text are right together, more or less often."""
    counts = rng.integers(1, 41, samples)
    rate = rng.beta(4.5, 0.5, samples)  # mean 0.9
    return torch.tensor(rng.binomial(counts, rate)).double(), torch.tensor(counts).double()


@pytest.mark.parametrize("interval", [mean_interval, share_interval])
def test_the_truth_is_inside_as_often_as_it_says(interval):
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(1000):
        low, high = interval(*worlds(rng, 120))
        inside += low <= 0.9 <= high
    assert 0.92 <= inside / 1000 <= 0.98


def test_tokens_of_a_text_are_not_independent():
    sums, counts = worlds(np.random.default_rng(1), 200)
    low, high = mean_interval(sums, counts)
    one = torch.cat([torch.arange(int(n)) < s for s, n in zip(sums, counts, strict=True)]).double()
    naive = mean_interval(one, torch.ones_like(one))
    assert high - low > 1.5 * (naive[1] - naive[0])


def test_a_mean_of_equal_counts_has_students_interval():
    values = torch.tensor([0.3, 0.9, 0.5, 0.4], dtype=torch.float64)
    low, high = mean_interval(values, torch.ones(4))
    half = t.ppf(0.975, 3) * values.std().item() / 2
    assert (low, high) == pytest.approx((0.525 - half, 0.525 + half))


def test_one_sample_has_no_interval():
    assert mean_interval(torch.ones(1), torch.ones(1)) is None
    assert share_interval(torch.ones(1), torch.ones(1)) is None


def test_a_share_of_all_is_not_certain():
    low, high = share_interval(torch.full((20,), 7.0), torch.full((20,), 7.0))
    assert 0.8 < low < 0.9
    assert high == 1


def test_evaluate_gives_one_for_every_mean():
    model = build("llama")
    some = batches(model)
    path = solpath.baselines.random(model, some)
    small = solpath.extract(model, path.plan(sparsity=0.5))

    def loss(outputs, batch):
        return outputs.logits.square().mean()

    result = solpath.evaluate(small, model, some, loss=loss)
    assert set(result.intervals) == set(result.metrics)
    for name, (low, high) in result.intervals.items():
        assert low <= result.metrics[name] <= high
    alone = [{name: value[:1] for name, value in some[0].items()}]
    assert solpath.evaluate(small, model, alone).intervals == {}
