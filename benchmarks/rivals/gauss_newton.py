"""One-shot Gauss-Newton along solpath's principal axes: what the search adds to these axes.

The score is that of `solpath.baselines.gauss_newton`, per parameter, in the turned model.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from solpath import baselines
from solpath.model.basis import rotated
from solpath.pair import unflatten
from solpath.planning.path import SolutionPath
from solpath.searching.probe import probing

SCALE_BATCHES = 16


def turned_gauss_newton(model: nn.Module, batches: Sequence[Any], *, seed: int) -> SolutionPath:
    """Its path, with the axes, so that members are cut and compensated as those of the search."""
    config = {"seed": seed, "scale_batches": SCALE_BATCHES}
    frame = baselines.random(model, batches, seed=seed)  # costs and fingerprint; reads no batch
    with probing(model, frame.pairs, batches, loss=None, seed=seed) as probe:
        basis = probe.measure_basis(SCALE_BATCHES)
        with rotated(model, frame.pairs, basis):
            diagonal, slope = probe.curvature(SCALE_BATCHES)
        score = unflatten(frame.pairs, (diagonal / 2 - slope) / probe.cost)
    return replace(
        frame,
        score=score,
        entry_time=score,
        basis=basis,
        method="gauss_newton_refit",
        config=config,
    )
