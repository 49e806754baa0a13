"""Quality against size of rivals with published closed forms, on the data that the search has.

    python benchmarks/rival_quality.py --model minilm --seeds 0,1,2

As in quality.py: same batches, same held-out scores, same form of the JSON; a run is added when it
ends and not repeated. A rival has its own way to every size, so its seconds are those of its
statistics and of all sizes. Torch-Pruning is not a dependency: pip install torch-pruning==1.6.1, or
leave its methods out.
"""

import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from gemma import Judge
from quality_runs import add_run, same_run, stored_runs
from record import RESULTS
from rivals import DECODERS, METHODS
from rivals.moments import Calibration, calibrate
from rivals.weights import remaining
from solpath.running.provenance import provenance
from workloads import WORKLOADS, Workload, workload


def main(
    model: Annotated[str, typer.Option(help=f"{', '.join(WORKLOADS)}.")],
    seeds: Annotated[str, typer.Option(help="Comma-separated.")] = "0,1,2",
    methods: Annotated[str, typer.Option(help="Comma-separated, or all.")] = "all",
    checkpoint: Annotated[Path | None, typer.Option(help="Folder of the dense model.")] = None,
    out: Annotated[Path | None, typer.Option(help="JSON to add to.")] = None,
    statistics: Annotated[int, typer.Option(help="Batches for statistics.")] = 128,
    batch_count: Annotated[int, typer.Option(help="Batches the statistics are drawn from.")] = 256,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
    smoke: Annotated[bool, typer.Option(help="Tiny settings: does it run?")] = False,
) -> None:
    """Run what is missing and print a row per run."""
    torch.set_num_threads(threads)
    out = out or RESULTS / f"rivals_{model}.json"
    names = list(METHODS) if methods == "all" else [n.strip() for n in methods.split(",")]
    if unknown := [name for name in names if name not in METHODS]:
        raise SystemExit(f"unknown method {unknown[0]!r}; choose from {', '.join(METHODS)}.")
    work = workload(model, checkpoint, heldout=32 if smoke else None)
    settings = {
        "model": model,
        "batch_size": work.batch_size,
        "batch_count": 4 if smoke else batch_count,
        "steps": None,
        "smoke": smoke,
        "data": work.data,
    }
    judge, dense = work.judge()
    for seed in (int(seed) for seed in seeds.split(",")):
        done = stored_runs(out)
        wanted = [{"method": name, "seed": seed, "settings": settings} for name in names]
        missing = [one["method"] for one in wanted if not any(same_run(run, one) for run in done)]
        if not missing:
            continue
        batches = work.batches(seed, settings["batch_count"], settings["batch_size"])[:statistics]
        start = time.perf_counter()
        calibration = calibrate(work.model, batches)
        shared = time.perf_counter() - start
        for name in missing:
            run = run_rival(work, name, seed, calibration, judge)
            run["seconds"] += shared
            run["config"]["batches"] = len(batches)
            add_run(out, {**run, "dense": dense, "settings": settings})
            row = "  ".join(f"{size['metrics'][work.headline]:.4f}" for size in run["sizes"])
            line = f"{model} {name} seed {seed}: {row}  ({run['seconds']:.1f} s)"
            Console().print(line, soft_wrap=True)


def run_rival(
    work: Workload,
    name: str,
    seed: int,
    calibration: Calibration,
    judge: Judge,
) -> dict[str, Any]:
    """One rival at every size; only the pruning is timed."""
    sizes, seconds = [], 0.0
    for keep in work.keeps:
        start = time.perf_counter()
        pruned = {**METHODS, **DECODERS}[name](work.model, calibration, keep)
        seconds += time.perf_counter() - start
        metrics = judge(pruned)
        sparsity = 1 - remaining(work.model, pruned, calibration.pairs)
        sizes.append({"keep": keep, "sparsity": sparsity, "metrics": metrics})
    return {
        "model": work.name,
        "method": name,
        "seed": seed,
        "seconds": seconds,
        "config": {},
        "sizes": sizes,
        "provenance": provenance(),
    }


if __name__ == "__main__":
    typer.run(main)
