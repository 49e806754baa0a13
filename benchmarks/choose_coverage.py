"""How often the bounds behind `solpath.choose` are too low, how far off they are, what they need.

    python benchmarks/choose_coverage.py

Worlds are drawn; nothing is run. Beside the two bounds of the library stand two that would hold as
well (Hoeffding, and empirical Bernstein: Maurer & Pontil, COLT 2009, theorem 4) and the normal
approximation, which need not.
"""

import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from record import RESULTS, save, show
from solpath.choosing.bounds import Array, mean_upper, paired_upper

DELTA, Z = 0.05, 1.6448536269514722
PAIRS = [(200, 0.05, 0.02), (500, 0.03, 0.03), (1000, 0.02, 0.0), (1350, 0.02, 0.01)]
VALUES: dict[str, tuple[Callable[[Any, Any], Array], float]] = {
    "rare 1s": (lambda rng, shape: (rng.random(shape) < 0.01).astype(float), 0.01),
    "1s, seldom seen": (lambda rng, shape: (rng.random(shape) < 0.003).astype(float), 0.003),
    "skew": (lambda rng, shape: rng.beta(0.2, 3.8, shape), 0.05),
    "small": (lambda rng, shape: rng.beta(1, 99, shape), 0.01),
    "halves": (lambda rng, shape: rng.integers(0, 2, shape).astype(float), 0.5),
}
GROUPS, ROWS = 100, 10  # of documents in a world, and of rows in each
SHARE = 0.05  # of pairs that differ, in the table of samples that are needed


def normal(values: Array, width: float = 1.0) -> Array:
    """The mean and 1.64 standard errors."""
    del width
    return values.mean(-1) + Z * values.std(-1, ddof=1) / math.sqrt(values.shape[-1])


def hoeffding(values: Array, width: float = 1.0) -> Array:
    """By the width of the range alone."""
    return values.mean(-1) + width * math.sqrt(-math.log(DELTA) / (2 * values.shape[-1]))


def bernstein(values: Array, width: float = 1.0) -> Array:
    """By the variance that was seen; the last term pays for not knowing it."""
    count, cost = values.shape[-1], math.log(2 / DELTA)
    spread = np.sqrt(2 * values.var(-1, ddof=1) * cost / count)
    return values.mean(-1) + spread + width * 7 * cost / (3 * (count - 1))


def betting(values: Array, width: float = 1.0) -> Array:
    """`mean_upper`, of values in [0, 1], or of those in [-1, 1] where the width is 2."""
    low = 1 - width
    return low + width * mean_upper((values - low) / width, DELTA)


def exact(values: Array, width: float = 2.0) -> Array:
    """`paired_upper`, once for every outcome."""
    del width
    outcomes = np.stack([(values > 0).sum(-1), (values < 0).sum(-1)], -1)
    known = {
        (a, b): paired_upper(int(a), int(b), values.shape[-1], DELTA)
        for a, b in Counter(map(tuple, outcomes.tolist()))
    }
    return np.array([known[tuple(row)] for row in outcomes.tolist()])


BOUNDS = {"exact": exact, "betting": betting, "bernstein": bernstein, "hoeffding": hoeffding,
          "normal": normal}  # fmt: skip


def main(
    worlds: Annotated[int, typer.Option(help="Drawn worlds of each kind.")] = 2000,
    samples: Annotated[int, typer.Option(help="Samples of bounded values in a world.")] = 500,
    out: Annotated[Path, typer.Option(help="JSON to write.")] = RESULTS / "choose_coverage.json",
) -> None:
    """Draw worlds, bound their means, and count how often a bound is too low."""
    rng, coverage = np.random.default_rng(0), []
    for count, worse, better in PAIRS:
        values = paired(rng, worlds, count, worse, better)
        for name, bound in BOUNDS.items():
            coverage.append(
                {"values": f"{worse:.0%} worse, {better:.0%} better", "samples": count}
                | judged(name, bound(values, 2.0), worse - better)
            )
    for kind, (draw, mean) in VALUES.items():
        values = draw(rng, (worlds, samples))
        coverage += [
            {"values": kind, "samples": samples} | judged(name, bound(values, 1.0), mean)
            for name, bound in BOUNDS.items()
            if name != "exact"
        ]
    grouped = []
    for alike in (0.0, 0.3, 1.0):
        rows, mean = documents(np.random.default_rng(0), worlds, alike)
        for name, values in (("rows", rows.reshape(worlds, -1)), ("groups", rows.mean(-1))):
            grouped.append(
                {"alike": alike, "draws": name} | judged("betting", betting(values), mean)
            )
    needed = [
        {
            "max_loss": limit,
            "loss": loss,
            "bound": name,
            "samples": samples_for(name, limit, loss, rng),
            "approximation": math.ceil(Z**2 * (SHARE - loss**2) / (limit - loss) ** 2),
        }
        for limit, loss in [(0.01, 0.0), (0.01, 0.005), (0.005, 0.0)]
        for name in ("exact", "betting", "bernstein")
    ]
    rows = [[*row.values()] for row in coverage]
    show(f"bounds at {1 - DELTA:.0%}", ["values", "samples", "bound", "too low", "above"], rows)
    rows = [[*row.values()] for row in grouped]
    show("rows of documents", [*grouped[0]], rows)
    rows = [[*row.values()] for row in needed]
    show("samples for every second choice to pass", [*needed[0]], rows)
    settings = {"worlds": worlds, "delta": DELTA, "share_of_pairs_that_differ": SHARE}
    settings |= {"groups": GROUPS, "rows_of_a_group": ROWS}
    save(out, settings, {"coverage": coverage, "grouped": grouped, "needed": needed})


def paired(rng: Any, worlds: int, samples: int, worse: float, better: float) -> Array:
    """1 where a pair is worse, -1 where it is better, otherwise 0: ``[worlds, samples]``."""
    chance = rng.random((worlds, samples))
    return (chance < worse).astype(float) - (chance > 1 - better)


def documents(rng: Any, worlds: int, alike: float) -> tuple[Array, float]:
    """Losses of rows in documents, ``[worlds, GROUPS, ROWS]``, and their expectation.

    A row loses what its document loses with the probability `alike`, otherwise what another would.
    """
    shape = (worlds, GROUPS, ROWS)
    own = rng.beta(0.2, 3.8, (worlds, GROUPS, 1))
    return np.where(rng.random(shape) < alike, own, rng.beta(0.2, 3.8, shape)), 0.05


def judged(name: str, bounds: Array, mean: float) -> dict[str, Any]:
    """How often bounds are below the mean, and how far above it they are."""
    return {
        "bound": name,
        "too_low": float((bounds < mean).mean()),
        "above": float((bounds - mean).mean()),
    }


def samples_for(name: str, limit: float, loss: float, rng: Any, worlds: int = 201) -> int:
    """The least number of samples, within 5 %, at which half of the bounds are below a limit.

    For the exact bound, which is slower, the outcome that is expected stands for the middle one.
    """
    worse, better = (SHARE + loss) / 2, (SHARE - loss) / 2

    def passes(count: int) -> bool:
        if name == "exact":
            expected = round(count * worse), round(count * better)
            return paired_upper(*expected, count, DELTA) <= limit
        values = paired(rng, worlds, count, worse, better)
        return bool(np.median(BOUNDS[name](values, 2.0)) <= limit)

    low, high = 100, 200
    while not passes(high):
        low, high = high, 2 * high
    while high > 1.05 * low:
        middle = (low + high) // 2
        low, high = (low, middle) if passes(middle) else (middle, high)
    return high


if __name__ == "__main__":
    typer.run(main)
