"""How often a choice breaks its promise on real models, and what it costs.

    python examples/zoo/train.py vit
    python benchmarks/choose_real.py --model minilm --model digits
    python benchmarks/choose_real.py --model gemma --checkpoint FILE --pool 16  # adds to the JSON

Every member's loss is measured once on a pool of held-out samples, whose mean is the true loss of
the pool. Then small sets of samples are drawn from it, with replacement, and a size is chosen by
each, in the way of `solpath.choose`. A promise is broken if the true loss of what was chosen is
above the limit. Limits are those that are hardest to keep: just below the true loss of a size, so
that one step too far breaks them.
"""

import json
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from torch import nn

from record import RESULTS, save, show
from solpath.choosing.choose import SIZES, choose
from solpath.choosing.losses import Metric, metric_for
from solpath.config import SearchConfig
from solpath.data.preparation import Preparation
from solpath.measuring.evaluation import evaluate
from solpath.model.extraction import extract
from solpath.planning.path import SolutionPath
from solpath.running.modes import inferring
from solpath.searching.search import search
from workloads import workload

DELTA = 0.05
LIMITS = 4  # that are tried of every metric
GRIDS = {"digits": tuple(i / 50 for i in range(25, 49)), "gemma": (0.05, 0.1, 0.2, 0.3, 0.4)}
"""The sizes, where they are others than `solpath.choosing.choose.SIZES`."""


def main(
    model: Annotated[list[str], typer.Option(help="minilm, digits or gemma.")],
    steps: Annotated[int, typer.Option(help="Steps of the search.")] = 100,
    draws: Annotated[int, typer.Option(help="Small sets that are drawn.")] = 400,
    samples: Annotated[int, typer.Option(help="Samples of a small set.")] = 500,
    pool: Annotated[int | None, typer.Option(help="Samples of the pool; default: all.")] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="Where the dense model is.")] = None,
    order: Annotated[Path | None, typer.Option(help="Path to take in place of a search.")] = None,
    out: Annotated[Path, typer.Option(help="JSON to add to.")] = RESULTS / "choose_real.json",
) -> None:
    """Search, measure the losses of the members on the pool, draw small sets, choose by each."""
    results: dict[str, Any] = json.loads(out.read_text())["results"] if out.exists() else {}
    for name in model:
        work = workload(name, checkpoint, pool)
        size = work.batch_size
        if order is None:
            config = SearchConfig(steps=steps)
            path = search(work.model, work.batches(0, steps, size), config, progress=False)
        else:
            path = SolutionPath.load(order)
        batches, sizes = labelled(name, work.heldout), GRIDS.get(name, SIZES)
        results[name] = {
            kind: promises(work.model, path, batches, kind, sizes, draws, samples)
            for kind in (["accuracy"] if name == "digits" else []) + ["divergence"]
        }
        results[name]["steps"] = path.config["steps"]
        most = results[name]["divergence"]["limits"][-1]["max_loss"]
        results[name]["cost"] = cost(work.model, path, batches, sizes, most)
    rows = [
        [name, kind, limit["max_loss"], limit["broken"], limit["sparsity"], limit["most"]]
        for name, found in results.items()
        for kind in ("accuracy", "divergence")
        for limit in found.get(kind, {}).get("limits", [])
    ]
    columns = ["model", "metric", "limit", "broken", "mean sparsity", "largest true one"]
    show(f"promises at {1 - DELTA:.0%}, {samples} samples", columns, rows)
    save(out, {"draws": draws, "samples": samples, "delta": DELTA}, results)


def labelled(name: str, batches: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The held-out batches, those of the digits with their labels."""
    if name != "digits":
        return batches
    import digits

    _, _, _, labels = digits.load_split()
    parts = labels.split(len(batches[0]["pixel_values"]))
    return [{**batch, "labels": part} for batch, part in zip(batches, parts, strict=False)]


def promises(
    model: nn.Module,
    path: SolutionPath,
    batches: list[Any],
    kind: str,
    sizes: Sequence[float],
    draws: int,
    samples: int,
) -> dict[str, Any]:
    """True losses of all sizes, and for every limit what choices by small sets come to."""
    with inferring(model):
        judge = metric_for(kind, model, batches[0], 1.0)
        table = losses_of(judge, model, path, batches, sizes)
    truth, rng = table.mean(1), np.random.default_rng(0)
    sets = rng.integers(0, table.shape[1], (draws, samples))
    limits = hard_limits(truth, judge.upper(np.zeros(samples), DELTA))
    tested = table[: int(np.argmax(truth > max(limits))) + 1]  # no choice should come further
    bounds = np.array([[judge.upper(row[drawn], DELTA) for row in tested] for drawn in sets])
    sparsity = np.array([0.0, *sizes])
    found = []
    for limit in limits:
        passed = np.logical_and.accumulate(bounds <= limit, axis=1).sum(1)
        broken = [bool(count) and truth[count - 1] > limit for count in passed]
        good = int(np.logical_and.accumulate(truth <= limit).sum())
        found.append(
            {
                "max_loss": limit,
                "broken": float(np.mean(broken)),
                "sparsity": float(sparsity[passed].mean()),
                "most": float(sparsity[good]),
            }
        )
    true = dict(zip(map(str, sizes), truth.tolist(), strict=True))
    return {"pool": table.shape[1], "true_loss": true, "limits": found}


def hard_limits(truth: Any, least: float) -> list[float]:
    """Limits just below the true losses of some sizes, of all that so few samples could show."""
    rising = [t for i, t in enumerate(truth) if t > max(least, *truth[:i], 0)]
    if not rising:
        raise SystemExit("no size loses enough to break a promise; take smaller ones.")
    picked = np.unique(np.linspace(0, len(rising) - 1, LIMITS).round().astype(int))
    return [float(0.999 * rising[i]) for i in picked]


def losses_of(
    judge: Metric,
    model: nn.Module,
    path: SolutionPath,
    batches: list[Any],
    sizes: Sequence[float],
) -> Any:
    """The loss of every size on every sample, ``[sizes, samples]``."""
    prepare = Preparation(model)
    for i, batch in enumerate(batches):
        judge.see_dense(i, batch, partial(prepare.place, i))
    rows = []
    for sparsity in sizes:
        small = extract(model, path.plan(sparsity=sparsity), check=False)
        with inferring(small):
            rows.append(
                np.concatenate(
                    [
                        judge.losses(small, i, batch, partial(prepare.place, i))
                        for i, batch in enumerate(batches)
                    ]
                )
            )
    return np.stack(rows)


def cost(
    model: nn.Module,
    path: SolutionPath,
    batches: list[Any],
    sizes: Sequence[float],
    max_loss: float,
) -> dict[str, float]:
    """Seconds of a choice, and of evaluating the same sizes one by one."""
    start = time.perf_counter()
    choice = choose(
        model, path, batches, max_loss, metric="divergence", sizes=sizes, progress=False
    )
    chosen = time.perf_counter() - start
    start = time.perf_counter()
    for test in choice.tests:
        evaluate(extract(model, path.plan(sparsity=test.sparsity)), model, batches)
    evaluated = time.perf_counter() - start
    return {
        "sizes": len(choice.tests),
        "choice_s": chosen,
        "evaluations_s": evaluated,
        "ratio": chosen / evaluated,
    }


if __name__ == "__main__":
    typer.run(main)
