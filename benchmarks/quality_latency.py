"""Quality against measured latency: members of one size, and members of one speed.

    python benchmarks/quality_latency.py --model minilm --threads 2

Each path is cut once by parameters and once by latency, by a table that is measured first. All
members are compensated, scored, and timed in turns with the dense model.
"""

import statistics
import time
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from quality_runs import BEST
from record import RESULTS, save, show
from rivals.gauss_newton import turned_gauss_newton
from solpath.measuring.evaluation import evaluate, reference_outputs
from solpath.measuring.latency import measure_latency
from solpath.measuring.timing import interquartile_range, latencies
from solpath.model.extraction import extract
from solpath.planning.path import SolutionPath
from solpath.planning.plan import Plan
from solpath.refining.compensation import compensate
from solpath.running.forward import forward
from solpath.searching.search import search
from workloads import Batch, Workload, best_search, random_tokens, workload

METHODS = ("spp_best", "gauss_newton_refit")


def main(
    model: Annotated[str, typer.Option(help="minilm, llama or opt.")] = "minilm",
    shares: Annotated[str, typer.Option(help="Of the dense model, kept.")] = ".8,.6,.4,.25",
    size: Annotated[int, typer.Option(help="Samples of the timed batch.")] = 8,
    length: Annotated[int, typer.Option(help="Its tokens per sample.")] = 128,
    multiple_of: Annotated[int, typer.Option(help="Units every head keeps.")] = 8,
    repeats: Annotated[int, typer.Option(help="Timed passes of each model.")] = 40,
    seed: Annotated[int, typer.Option(help="Of searches and batches.")] = 0,
    checkpoint: Annotated[Path | None, typer.Option(help="Folder of the dense model.")] = None,
    out: Annotated[Path | None, typer.Option(help="JSON to write.")] = None,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 2,
    smoke: Annotated[bool, typer.Option(help="Tiny settings: does it run?")] = False,
) -> None:
    """Cut, compensate, score and time; print the table."""
    torch.set_num_threads(threads)
    work = workload(model, checkpoint, heldout=32 if smoke else None)
    batches = work.batches(seed, 4 if smoke else 256, work.batch_size)
    [timed] = random_tokens(work.model, size, length)
    table = measure_latency(work.model, timed, repeats=1 if smoke else 7)
    targets = reference_outputs(work.model, work.heldout)
    results: dict[str, Any] = {}
    for method in METHODS:
        path = _path(method, work, batches, seed, smoke)
        plans: dict[str, Plan] = {}
        for share in (float(part) for part in shares.split(",")):
            plans[f"parameters {share:g}"] = path.plan(sparsity=1 - share, multiple_of=multiple_of)
            plans[f"latency {share:g}"] = path.plan(
                latency_ms=share * table.dense_ms, latency=table, multiple_of=multiple_of
            )
        start = time.perf_counter()
        members = compensate(
            [extract(work.model, plan) for plan in plans.values()],
            work.model,
            batches[: 4 if smoke else work.calibration],
        )
        seconds = time.perf_counter() - start
        passes = {"dense": partial(forward, work.model, timed)}
        passes |= {
            name: partial(forward, small, timed) for name, small in zip(plans, members, strict=True)
        }
        with torch.no_grad():
            times = latencies(passes, repeats=2 if smoke else repeats)
        results[method] = {"compensation_seconds": seconds, "members": {}}
        for (name, plan), small in zip(plans.items(), members, strict=True):
            ratio = [a / b for a, b in zip(times[name], times["dense"], strict=True)]
            results[method]["members"][name] = {
                "metrics": dict(evaluate(small, targets, work.heldout, task=work.task).metrics),
                "keep": 1 - plan.achieved.sparsity,
                "macs_share": plan.achieved.macs_share,
                "latency": statistics.median(ratio),
                "latency_iqr": interquartile_range(ratio),
            }
    rows = [
        [
            name,
            BEST[method],
            f"{member['keep']:.2f}",
            f"{member['latency']:.2f}",
            f"{member['metrics'][work.headline]:.4f}",
        ]
        for method, result in results.items()
        for name, member in result["members"].items()
    ]
    title = f"{model}, {size} x {length} tokens, {threads} threads"
    show(title, ["cut to", "method", "kept", "measured latency", work.headline], rows)
    settings = {
        "model": model,
        "size": size,
        "length": length,
        "threads": threads,
        "multiple_of": multiple_of,
        "seed": seed,
        "smoke": smoke,
        "data": work.data,
    }
    save(out or RESULTS / f"quality_latency_{model}.json", settings, results)


def _path(
    method: str, work: Workload, batches: list[Batch], seed: int, smoke: bool
) -> SolutionPath:
    if method == "gauss_newton_refit":
        return turned_gauss_newton(work.model, batches, seed=seed)
    return search(work.model, batches, best_search(seed, smoke=smoke))


if __name__ == "__main__":
    typer.run(main)
