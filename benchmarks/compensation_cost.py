"""What the best family costs: search, then compensation of five sizes together, and of one alone.

    python benchmarks/compensation_cost.py --threads 2

The floor of compensation is one forward pass of the dense and of each cut model over the batches,
which is timed beside it.
"""

import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn

from record import RESULTS, save, show
from solpath.model.extraction import extract
from solpath.refining.compensation import compensate
from solpath.running.forward import forward
from solpath.searching.search import search
from workloads import Batch, best_search, workload


def main(
    model: Annotated[str, typer.Option(help="minilm, digits, llama, ...")] = "minilm",
    keeps: Annotated[str, typer.Option(help="Shares kept.")] = "0.8,0.6,0.4,0.25,0.15",
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 2,
    seed: Annotated[int, typer.Option(help="Of the batches and the search.")] = 0,
    checkpoint: Annotated[Path | None, typer.Option(help="Folder of the dense model.")] = None,
    out: Annotated[Path, typer.Option(help="JSON to write.")] = RESULTS / "compensation_cost.json",
    smoke: Annotated[bool, typer.Option(help="Tiny settings: does it run?")] = False,
) -> None:
    """Time the search, all sizes together, one alone, and plain forward passes."""
    torch.set_num_threads(threads)
    work = workload(model, checkpoint, heldout=1)
    batches = work.batches(seed, 4 if smoke else 256, work.batch_size)
    start = time.perf_counter()
    path = search(work.model, batches, best_search(seed, smoke=smoke))
    searched = time.perf_counter() - start
    sizes = [float(keep) for keep in keeps.split(",")]
    cut = [extract(work.model, path.plan(sparsity=1 - keep)) for keep in sizes]
    batches = batches[: 4 if smoke else work.calibration]

    dense_pass = _passes(work.model, batches)
    start = time.perf_counter()
    compensate(cut, work.model, batches)
    together = time.perf_counter() - start
    start = time.perf_counter()
    compensate(cut[len(cut) // 2], work.model, batches)
    alone = time.perf_counter() - start
    passes = [_passes(small, batches) for small in cut]
    floors = {"together": dense_pass + sum(passes), "alone": dense_pass + passes[len(cut) // 2]}
    results = {
        "search": searched,
        "together": together,
        "alone": alone,
        "further_size": (together - alone) / (len(sizes) - 1),
        "family": searched + together,
        "over_forward_passes": {
            "together": together / floors["together"],
            "alone": alone / floors["alone"],
        },
    }
    rows: list[list[Any]] = [
        [name, value] for name, value in results.items() if isinstance(value, float)
    ]
    rows += [
        [f"{name}, x forward passes", ratio]
        for name, ratio in results["over_forward_passes"].items()
    ]
    show(f"{model}, {threads} threads", ["", "s"], rows)
    settings = {"model": model, "seed": seed, "threads": threads, "smoke": smoke}
    save(out, settings | {"batches": len(batches)}, results)


def _passes(model: nn.Module, batches: list[Batch]) -> float:
    """Seconds of a forward pass over all batches."""
    start = time.perf_counter()
    with torch.no_grad():
        for batch in batches:
            forward(model, batch)
    return time.perf_counter() - start


if __name__ == "__main__":
    typer.run(main)
