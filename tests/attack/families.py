"""Random plans for random families: masked and cut models must compute the same.

`run` draws until its time is over.
"""

import copy
import random
import time
from collections import Counter
from dataclasses import dataclass, field

import torch
from torch import nn

import solpath
from conftest import CASES, build, inputs
from plans import plan_of
from solpath.model.discovery import find_pairs
from solpath.running.forward import forward

BOUNDS = {torch.float32: 1e-5, torch.float64: 1e-12}  # those of tests/test_exactness.py
PLANS_PER_MODEL = 16


@dataclass
class Found:
    """What an attack tried, and what did not hold.

    Attributes:
        plans: Plans that were compared.
        families: Plans of every family.
        zeros: Pairs that lost all units, in all plans.
        worst: The largest difference, as a share of its bound, and where.
        rounded: Comparisons that failed in float32 and held in float64.
        faults: Family, seed, dtype, widths and difference of every comparison that failed.
    """

    plans: int = 0
    families: Counter = field(default_factory=Counter)
    zeros: int = 0
    worst: tuple[float, str] = (0.0, "")
    rounded: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)


def run(seconds: float, seed: int, labels: list[str] | None = None) -> Found:
    """Compare masked with cut on random plans and inputs for some seconds.

    Args:
        seconds: How long to draw.
        seed: Where to start; the same seed tries the same plans in the same order.
        labels: Families to draw from; None for all of tests/conftest.py.
    """
    chance, found, end = random.Random(seed), Found(), time.monotonic() + seconds
    while time.monotonic() < end:
        label = chance.choice(labels or sorted(CASES))
        dtype = chance.choice(list(BOUNDS))
        number = chance.randrange(10**6)
        model = build(label, seed=number).to(dtype)
        if model._supports_sdpa:
            # Eager attention takes the softmax in float32, where a mask of float64 is infinite.
            kinds = ["eager", "sdpa"] if dtype is torch.float32 else ["sdpa"]
            model.set_attn_implementation(chance.choice(kinds))
        if any(pair.kind == "experts" for pair in find_pairs(model)):
            kinds = ["eager", "batched_mm"] + ["grouped_mm"] * (dtype is torch.float32)
            model.set_experts_implementation(chance.choice(kinds))
        for _ in range(PLANS_PER_MODEL):
            if time.monotonic() < end:
                _try(model, f"{label} {number}", chance.randrange(10**6), found)
    return found


def _try(model: nn.Module, name: str, seed: int, found: Found) -> None:
    chance = random.Random(seed)
    widths = [_width(chance, pair.width) for pair in find_pairs(model)]
    samples = chance.choice([1, 2, 4])
    share = _difference(model, widths, samples, seed)
    found.plans += 1
    found.families[name.rpartition(" ")[0]] += 1
    found.zeros += widths.count(0)
    case = f"{name}, plan {seed}: {widths} {model.dtype}, {share:.3g} of the bound"
    found.worst = max(found.worst, (share, case))
    if share <= 1:
        return
    exact = copy.deepcopy(model).double()
    if model.dtype is torch.float32 and _difference(exact, widths, samples, seed) <= 1:
        found.rounded.append(case)
    else:
        found.faults.append(case)


def _difference(model: nn.Module, widths: list[int], samples: int, seed: int) -> float:
    """Return how far masked and cut are apart, as a share of what is allowed; NaN if one is NaN."""
    plan, batch = plan_of(model, widths, seed), inputs(model, samples=samples, seed=seed)
    with torch.no_grad():
        small = forward(solpath.extract(model, plan), batch)
        with solpath.masked(model, plan):
            masked = forward(model, batch)
    return float((masked - small).abs().max() / masked.abs().max()) / BOUNDS[model.dtype]


def _width(chance: random.Random, width: int) -> int:
    """None, one, all but one or all units more often than chance alone would."""
    return chance.choice([0, 1, width - 1, width, *(chance.randint(0, width) for _ in range(4))])
