"""How often a choice breaks its promise on real models, and what it costs.

    python benchmarks/choose_real.py --model minilm --model digits

Every member's loss is measured once on a large pool of held-out samples, whose mean is the true
loss. Then small sets of samples are drawn from the pool, with replacement, and a size is chosen by
each, in the way of `solpath.choose`. A promise is broken if the true loss of what was chosen is
above the limit.
"""

import time
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

LIMITS = {"accuracy": (0.01, 0.02), "divergence": (0.05, 0.1)}
DELTA = 0.05


def main(
    model: Annotated[list[str], typer.Option(help="minilm, digits or gemma.")],
    steps: Annotated[int, typer.Option(help="Steps of the search.")] = 100,
    draws: Annotated[int, typer.Option(help="Small sets that are drawn.")] = 400,
    samples: Annotated[int, typer.Option(help="Samples of a small set.")] = 500,
    pool: Annotated[int | None, typer.Option(help="Samples of the pool; default: all.")] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="Where the dense model is.")] = None,
    out: Annotated[Path, typer.Option(help="JSON to write.")] = RESULTS / "choose_real.json",
) -> None:
    """Search, measure the losses of the members on the pool, draw small sets, choose by each."""
    results: dict[str, Any] = {}
    for name in model:
        work = workload(name, checkpoint, pool)
        size = work.batch_size
        path = search(
            work.model,
            work.batches(0, steps, size),
            SearchConfig(steps=steps),
            progress=False,
        )
        batches = labelled(name, work.heldout)
        results[name] = {
            kind: promises(work.model, path, batches, kind, draws, samples)
            for kind in (["accuracy"] if name == "digits" else []) + ["divergence"]
        }
        results[name]["cost"] = cost(work.model, path, batches)
    rows = [
        [name, kind, f"{limit}", row["broken"], row["mean_sparsity"], row["best_sparsity"]]
        for name, found in results.items()
        for kind in LIMITS
        for limit, row in found.get(kind, {}).get("limits", {}).items()
    ]
    columns = ["model", "metric", "limit", "broken", "mean sparsity", "largest true one"]
    show(f"promises at {1 - DELTA:.0%}, {samples} samples", columns, rows)
    save(out, {"steps": steps, "draws": draws, "samples": samples, "delta": DELTA}, results)


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
    draws: int,
    samples: int,
) -> dict[str, Any]:
    """True losses of all sizes, and for every limit what choices by small sets come to."""
    with inferring(model):
        judge = metric_for(kind, model, batches[0], 1.0)
        table = losses_of(judge, model, path, batches)
    truth, rng = table.mean(1), np.random.default_rng(0)
    sets = rng.integers(0, table.shape[1], (draws, samples))
    bounds = np.array(
        [[judge.upper(row[drawn], DELTA) for row in walk(table, truth, kind)] for drawn in sets]
    )
    found: dict[str, Any] = {}
    for limit in LIMITS[kind]:
        passed = np.logical_and.accumulate(bounds <= limit, axis=1).sum(1)
        broken = [bool(count) and truth[count - 1] > limit for count in passed]
        good = np.logical_and.accumulate(truth <= limit).sum()
        sparsity = [0.0, *SIZES]
        found[str(limit)] = {
            "broken": float(np.mean(broken)),
            "mean_sparsity": float(np.mean([sparsity[count] for count in passed])),
            "best_sparsity": float(sparsity[good]),
        }
    true = dict(zip(map(str, SIZES), truth.tolist(), strict=True))
    return {"pool": table.shape[1], "true_loss": true, "limits": found}


def walk(table: Any, truth: Any, kind: str) -> Any:
    """The losses of the sizes that any limit lets a choice come to, within reason."""
    last = int((truth <= 2 * max(LIMITS[kind])).sum()) + 1
    return table[:last]


def losses_of(judge: Metric, model: nn.Module, path: SolutionPath, batches: list[Any]) -> Any:
    """The loss of every size on every sample, ``[sizes, samples]``."""
    prepare = Preparation(model)
    for i, batch in enumerate(batches):
        judge.see_dense(i, batch, partial(prepare.place, i))
    rows = []
    for sparsity in SIZES:
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


def cost(model: nn.Module, path: SolutionPath, batches: list[Any]) -> dict[str, float]:
    """Seconds of a choice, and of evaluating the same sizes one by one."""
    start = time.perf_counter()
    choice = choose(model, path, batches, 0.1, metric="divergence", progress=False)
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
