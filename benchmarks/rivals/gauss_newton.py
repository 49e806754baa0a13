"""One-shot Gauss-Newton along solpath's principal axes: what the search adds to these axes.

The score is that of `solpath.baselines.gauss_newton`, per parameter, in the turned model.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from solpath.baselines import gauss_newton
from solpath.basis import turned
from solpath.discover import find_pairs
from solpath.path import SolutionPath, unflatten
from solpath.probe import probing

SCALE_BATCHES = 16


def turned_gauss_newton(model: nn.Module, batches: Sequence[Any], *, seed: int) -> SolutionPath:
    """Its path, with the axes, so that members are cut and compensated as those of the search."""
    path = gauss_newton(model, batches, seed=seed, scale_batches=SCALE_BATCHES)
    pairs = find_pairs(model)
    with probing(model, pairs, batches, loss=None, seed=seed) as probe:
        basis = probe.measure_basis(SCALE_BATCHES)
        with turned(model, pairs, basis):
            diagonal, slope = probe.curvature(SCALE_BATCHES)
        score = unflatten(pairs, (diagonal / 2 - slope) / probe.cost)
    return replace(path, score=score, entry_time=score, basis=basis, method="gauss_newton_refit")
