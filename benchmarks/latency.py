"""Does half the arithmetic take half the time? Latency ratio against MACs ratio.

    python benchmarks/latency.py --path PATH_FOLDER

Dense and small models are timed in one run, interleaved. Without ``--path`` a short search makes
the path: the widths are what matters here.
"""

from pathlib import Path
from typing import Annotated

import torch
import typer

from record import RESULTS, save, show
from solpath.config import SearchConfig
from solpath.measuring.measurement import measure
from solpath.model.extraction import extract
from solpath.planning.path import SolutionPath
from solpath.searching.search import search
from workloads import random_tokens, workload


def main(
    path: Annotated[Path | None, typer.Option(help="Folder of a saved MiniLM path.")] = None,
    keep: Annotated[float, typer.Option(help="Share of prunable parameters kept.")] = 0.5,
    multiples: Annotated[str, typer.Option(help="multiple_of, comma-separated.")] = "1,8",
    size: Annotated[int, typer.Option(help="Samples per batch.")] = 8,
    length: Annotated[int, typer.Option(help="Tokens per sample.")] = 128,
    repeats: Annotated[int, typer.Option(help="Timed passes of each model.")] = 60,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
    steps: Annotated[int, typer.Option(help="Search steps without --path.")] = 60,
    out: Annotated[Path, typer.Option(help="JSON to write.")] = RESULTS / "latency.json",
) -> None:
    """Time dense and small all-MiniLM-L6-v2 side by side."""
    torch.set_num_threads(threads)
    work = workload("minilm", heldout=1)
    if path is None:
        config = SearchConfig(steps=steps)
        found = search(work.model, work.batches(0, 64, 16), config, progress=False)
    else:
        found = SolutionPath.load(path)
    models = {"dense": work.model}
    sparsity = {"dense": 0.0}
    for step in (int(part) for part in multiples.split(",")):
        plan = found.plan(sparsity=1 - keep, multiple_of=step)
        name = f"keep {keep:g}, multiples of {step}"
        models[name] = extract(work.model, plan)
        sparsity[name] = plan.achieved.sparsity
    [batch] = random_tokens(work.model, size, length)
    measured = measure(models, batch, repeats=repeats)
    dense = measured["dense"]
    results, rows = {}, []
    for name, found_cost in measured.items():
        time, macs = found_cost.latency_ms / dense.latency_ms, found_cost.macs / dense.macs
        memory = found_cost.peak_memory / dense.peak_memory
        results[name] = {
            **found_cost.to_dict(),
            "sparsity": sparsity[name],
            "latency_ratio": time,
            "macs_ratio": macs,
            "latency_over_macs": time / macs,
        }
        latency = f"{found_cost.latency_ms:.2f} ±{found_cost.latency_iqr_ms / 2:.2f}"
        rows.append([name, f"{found_cost.macs:,}", latency, macs, time, time / macs, memory])
    columns = ["", "MACs", "ms (±IQR/2)", "MACs ratio", "latency ratio", "quotient", "memory ratio"]
    show(f"all-MiniLM-L6-v2, {size} x {length} tokens, {threads} threads", columns, rows)
    settings = {
        "model": "minilm",
        "keep": keep,
        "size": size,
        "length": length,
        "threads": threads,
        "path": {"method": found.method, "config": dict(found.config)},
    }
    save(out, settings, results)


if __name__ == "__main__":
    typer.run(main)
