"""Searches in bfloat16 beside those in float32: do they find the same order, and as good members?

    python benchmarks/half_precision.py --model minilm
    python benchmarks/half_precision.py --model gemma --method gauss_newton --checkpoint FILE.gguf

The noise of a search is the difference between two seeds, so a float32 search with another seed
stands beside. Orders are compared by the rank correlation of all units; members are judged as
masked float32 models.
"""

from copy import deepcopy
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor

import quality
from quality_runs import shown
from record import RESULTS, save, show
from solpath.model.masks import masked
from solpath.pair import flatten
from workloads import WORKLOADS, workload


def main(
    model: Annotated[str, typer.Option(help=f"{', '.join(WORKLOADS)}.")] = "minilm",
    method: Annotated[str, typer.Option(help="A method of quality.py.")] = "spp",
    steps: Annotated[int | None, typer.Option(help="Search steps.")] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="Folder of the dense model.")] = None,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
    out: Annotated[Path | None, typer.Option(help="JSON to write.")] = None,
    smoke: Annotated[bool, typer.Option(help="Tiny settings: does it run?")] = False,
) -> None:
    """Search three times, and compare orders and members."""
    torch.set_num_threads(threads)
    work = workload(model, checkpoint, heldout=32 if smoke else None)
    judge, dense = work.judge()
    settings = {"steps": 4 if smoke else steps, "smoke": smoke}
    ranks: dict[str, Tensor] = {}
    scores: dict[str, list[dict[str, float]]] = {}
    for name, seed, dtype in (
        ("float32, seed 0", 0, torch.float32),
        ("float32, seed 1", 1, torch.float32),
        ("bfloat16, seed 0", 0, torch.bfloat16),
    ):
        batches = work.batches(seed, 4 if smoke else 96, work.batch_size)
        searched = replace(work, model=deepcopy(work.model).to(dtype))
        path = quality.find_path(searched, method, seed, batches, settings)
        ranks[name] = flatten(path.pairs, path.entry_time).argsort(stable=True).argsort()
        scores[name] = []
        for keep in work.keeps:
            with masked(work.model, path.plan(sparsity=1 - keep)):
                scores[name].append(judge(work.model))
    correlations = {}
    for one, other in combinations(ranks, 2):
        both = torch.stack([ranks[one], ranks[other]]).double()
        correlations[f"{one} / {other}"] = float(torch.corrcoef(both)[0, 1])
    rows = [
        [name, *(shown(size[work.headline], work.headline) for size in found)]
        for name, found in scores.items()
    ]
    show(f"{model}: {work.headline}", ["", *map(str, work.keeps)], rows)
    show("Rank correlation", ["", ""], [[name, value] for name, value in correlations.items()])
    results = {"correlations": correlations, "scores": scores, "dense": dense}
    asked = {"model": model, "method": method, "steps": steps, "keeps": work.keeps}
    save(out or RESULTS / f"half_precision_{model}.json", {**asked, "smoke": smoke}, results)


if __name__ == "__main__":
    typer.run(main)
