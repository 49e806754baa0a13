"""A family of five sizes: one search against one run of `iterative` for every size.

    python benchmarks/family_cost.py

`iterative` is the strongest rival and is given its usual settings, with its last linearisation at
the size that is wanted, as somebody would run it who needs that one size. Seconds are those of the
processor, so that other work on the machine does not count.
"""

from pathlib import Path
from time import process_time
from typing import Annotated, Any

import torch
import typer

from record import RESULTS, save, show
from solpath.baselines import METHODS
from solpath.config import SearchConfig
from solpath.model.extraction import extract
from solpath.searching.search import search
from workloads import workload


def main(
    model: Annotated[str, typer.Option(help="minilm, digits or llama.")] = "minilm",
    checkpoint: Annotated[Path | None, typer.Option(help="Folder of the dense model.")] = None,
    keeps: Annotated[str, typer.Option(help="Shares kept.")] = "0.8,0.65,0.5,0.35,0.2",
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
    batch_count: Annotated[int, typer.Option(help="Different batches.")] = 256,
    seed: Annotated[int, typer.Option(help="Of the batches and the methods.")] = 0,
    out: Annotated[Path, typer.Option(help="JSON to write.")] = RESULTS / "family_cost.json",
    smoke: Annotated[bool, typer.Option(help="Tiny settings: does it run?")] = False,
) -> None:
    """Time the whole family both ways, side by side."""
    torch.set_num_threads(threads)
    work = workload(model, checkpoint, heldout=1)
    sizes = [float(keep) for keep in keeps.split(",")]
    batches = work.batches(seed, 4 if smoke else batch_count, work.batch_size)
    config = SearchConfig(seed=seed, **({"steps": 4, "scale_batches": 1} if smoke else {}))
    options: dict[str, Any] = {"stages": 2, "scale_batches": 1} if smoke else {}

    runs: list[dict[str, Any]] = []
    # Half of the rival's runs before the search, half after it: a slower machine slows both.
    half = len(sizes) // 2
    for keep in sizes[:half]:
        runs.append(_iterative(work.model, batches, keep, seed, options))
    start = process_time()
    path = search(work.model, batches, config, progress=False)
    searched = process_time() - start
    start = process_time()
    for keep in sizes:
        extract(work.model, path.plan(sparsity=1 - keep))
    extracted = process_time() - start
    for keep in sizes[half:]:
        runs.append(_iterative(work.model, batches, keep, seed, options))

    family, rival = searched + extracted, sum(run["seconds"] for run in runs)
    show(
        f"{model}: {len(sizes)} sizes",
        ["", "seconds", "share of the rival"],
        [
            ["search", searched, searched / rival],
            [f"{len(sizes)} plans and extractions", extracted, extracted / rival],
            ["whole family", family, family / rival],
            *([f"iterative, keep {run['keep']:.2f}", run["seconds"], ""] for run in runs),
            [f"iterative, {len(sizes)} runs", rival, 1.0],
        ],
    )
    save(
        out,
        {
            "model": model,
            "keeps": sizes,
            "threads": threads,
            "batch_size": work.batch_size,
            "batch_count": len(batches),
            "config": config.to_dict(),
            "smoke": smoke,
        },
        {
            "search_seconds": searched,
            "extract_seconds": extracted,
            "family_seconds": family,
            "iterative": runs,
            "iterative_seconds": rival,
            "ratio": family / rival,
        },
    )


def _iterative(
    model: torch.nn.Module, batches: list[Any], keep: float, seed: int, options: dict[str, Any]
) -> dict[str, Any]:
    """One size by the rival: search, plan, extraction."""
    start = process_time()
    path = METHODS["iterative"](model, batches, seed=seed, keep=keep, **options)
    extract(model, path.plan(sparsity=1 - keep))
    return {"keep": keep, "seconds": process_time() - start, "config": dict(path.config)}


if __name__ == "__main__":
    typer.run(main)
