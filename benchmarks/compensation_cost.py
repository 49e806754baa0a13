"""What the best family costs: search, then compensation of five sizes, alone and together.

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
from solpath.compensation import compensate
from solpath.config import SearchConfig
from solpath.extraction import extract
from solpath.objective import forward
from solpath.searching import search
from workloads import Batch, workload


def main(
    model: Annotated[str, typer.Option(help="minilm, digits, llama, ...")] = "minilm",
    keeps: Annotated[str, typer.Option(help="Shares kept.")] = "0.8,0.6,0.4,0.25,0.15",
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 2,
    seed: Annotated[int, typer.Option(help="Of the batches and the search.")] = 0,
    checkpoint: Annotated[Path | None, typer.Option(help="Folder of the dense model.")] = None,
    out: Annotated[Path, typer.Option(help="JSON to write.")] = RESULTS / "compensation_cost.json",
    smoke: Annotated[bool, typer.Option(help="Tiny settings: does it run?")] = False,
) -> None:
    """Time the search, each size alone, all sizes together, and plain forward passes."""
    torch.set_num_threads(threads)
    work = workload(model, checkpoint, heldout=1)
    batches = work.batches(seed, 4 if smoke else 256, work.batch_size)
    config = SearchConfig(
        seed=seed,
        basis="principal",
        compensated=True,
        **({"steps": 4, "scale_batches": 1} if smoke else {}),
    )
    start = time.perf_counter()
    path = search(work.model, batches, config)
    searched = time.perf_counter() - start
    sizes = [float(keep) for keep in keeps.split(",")]
    cut = [extract(work.model, path.plan(sparsity=1 - keep)) for keep in sizes]
    batches = batches[: 4 if smoke else work.calibration]

    dense_pass = _passes(work.model, batches)
    start = time.perf_counter()
    compensate(cut, work.model, batches)
    together = time.perf_counter() - start
    alone: dict[str, Any] = {}
    for keep, small in zip(sizes, cut, strict=True):
        start = time.perf_counter()
        compensate(small, work.model, batches)
        seconds = time.perf_counter() - start
        floor = dense_pass + _passes(small, batches)
        alone[f"{keep:g}"] = {"seconds": seconds, "floor": floor, "ratio": seconds / floor}
    floor = sum(size["floor"] for size in alone.values()) - (len(sizes) - 1) * dense_pass
    results = {
        "search": searched,
        "together": {"seconds": together, "floor": floor, "ratio": together / floor},
        "per_further_size": (together - max(s["seconds"] for s in alone.values()))
        / (len(sizes) - 1),
        "alone": alone,
        "family": searched + together,
    }
    rows = [[f"keep {keep}", size["seconds"], size["ratio"]] for keep, size in alone.items()]
    rows.append(["all together", together, together / floor])
    rows.append(["each further size", results["per_further_size"], "-"])
    rows.append(["search and all sizes", results["family"], "-"])
    show(f"{model}, {threads} threads", ["compensation", "s", "x forward passes"], rows)
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
