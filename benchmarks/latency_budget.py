"""Is a model as fast as was asked? Latency asked, predicted and measured, in one run.

    python benchmarks/latency_budget.py --threads 2

Every asked latency is a share of the dense model's in the table. At the end all models are timed
once more in turns with the dense one: the median of the ratios to it, times what it took in the
table, is the figure which counts. The path is that of
the magnitude baseline without ``--path``: the widths are what matters here.
"""

import statistics
import time
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer

from record import RESULTS, save, show
from solpath import baselines
from solpath.measuring.latency import measure_latency, plan_for_latency
from solpath.measuring.timing import interquartile_range, latencies
from solpath.model.extraction import extract
from solpath.planning.path import SolutionPath
from solpath.running.forward import forward
from workloads import random_tokens, workload


def main(
    path: Annotated[Path | None, typer.Option(help="Folder of a saved MiniLM path.")] = None,
    shares: Annotated[
        str, typer.Option(help="Of the dense latency, comma-separated.")
    ] = ".8,.6,.4",
    multiple_of: Annotated[int, typer.Option(help="Units every head keeps.")] = 1,
    size: Annotated[int, typer.Option(help="Samples per batch.")] = 8,
    length: Annotated[int, typer.Option(help="Tokens per sample.")] = 128,
    table_repeats: Annotated[int, typer.Option(help="Timed passes for the table.")] = 7,
    repeats: Annotated[int, typer.Option(help="Timed passes at the end.")] = 60,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
    out: Annotated[Path, typer.Option(help="JSON to write.")] = RESULTS / "latency_budget.json",
) -> None:
    """Plan all-MiniLM-L6-v2 for latencies and check them with a stopwatch."""
    torch.set_num_threads(threads)
    work = workload("minilm", heldout=1)
    if path is None:
        found = baselines.magnitude(work.model, work.batches(0, 1, 16))
    else:
        found = SolutionPath.load(path)
    [batch] = random_tokens(work.model, size, length)
    start = time.perf_counter()
    table = measure_latency(work.model, batch, repeats=table_repeats)
    table_s = time.perf_counter() - start
    models, results = {"dense": work.model}, {}
    for share in (float(part) for part in shares.split(",")):
        asked = share * table.dense_ms
        first = found.plan(latency_ms=asked, latency=table, multiple_of=multiple_of)
        start = time.perf_counter()
        plan = plan_for_latency(
            work.model, found, batch, asked, latency=table, multiple_of=multiple_of
        )
        name = f"{share:g} of dense"
        results[name] = {
            "asked_ms": asked,
            "table_alone": {"sparsity": first.achieved.sparsity, **first.latency_ms},
            "verified": {"sparsity": plan.achieved.sparsity, **plan.latency_ms},
            "params": plan.achieved.params,
            "macs_share": plan.achieved.macs_share,
            "plan_s": time.perf_counter() - start,
        }
        models[name] = extract(work.model, plan)
        models[f"{name}, table alone"] = extract(work.model, first)
    with torch.no_grad():
        passes = {name: partial(forward, model, batch) for name, model in models.items()}
        times = latencies(passes, repeats=repeats)
    rows = []
    for name, result in results.items():
        asked = result["asked_ms"]
        for kind, suffix in (("verified", ""), ("table_alone", ", table alone")):
            own = times[f"{name}{suffix}"]
            ratio = [a / b for a, b in zip(own, times["dense"], strict=True)]
            measured = table.dense_ms * statistics.median(ratio)
            result[kind] |= {
                "side_by_side_ms": measured,
                "iqr_ms": table.dense_ms * interquartile_range(ratio),
                "wall_ms": 1e3 * statistics.median(own),
                "error": measured / asked - 1,
            }
            predicted, shown = result[kind]["predicted"], f"{measured / asked - 1:+.1%}"
            rows.append([f"{name}{suffix}", asked, predicted, measured, shown])
    title = f"all-MiniLM-L6-v2, {size} x {length} tokens, {threads} threads"
    show(title, ["", "asked ms", "predicted ms", "measured ms", "error"], rows)
    settings = {
        "model": "minilm",
        "size": size,
        "length": length,
        "threads": threads,
        "multiple_of": multiple_of,
        "table_repeats": table_repeats,
        "repeats": repeats,
        "path": {"method": found.method, "config": dict(found.config)},
    }
    dense = {
        "table_ms": table.dense_ms,
        "wall_ms": 1e3 * statistics.median(times["dense"]),
        "wall_iqr_ms": 1e3 * interquartile_range(times["dense"]),
    }
    save(out, settings, results, dense=dense, table_s=table_s)


if __name__ == "__main__":
    typer.run(main)
