"""What the constraints of a plan cost in quality: one search, one order, several targets.

    python benchmarks/constraint_cost.py --model minilm

Members are judged as masked models, without compensation. A size that a target cannot reach, as it
leaves a part of the model whole, is left out. ``kept score`` is `Plan.constraint_cost`.
"""

from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from record import RESULTS, save, show
from solpath.config import SearchConfig
from solpath.errors import BudgetError
from solpath.model.masks import masked
from solpath.searching.search import search
from workloads import WORKLOADS, workload

KEEPS = (0.8, 0.6, 0.4)
CASES: dict[str, dict[str, Any]] = {
    "none": {},
    "multiples of 8, `onnx`": {"for_": "onnx"},
    "multiples of 32": {"multiple_of": 32, "min_width": 1},
    "one width in all layers": {"uniform": True},
    "equal widths of queries, keys and values": {"tied_widths": True},
    "whole heads": {"whole_groups": True},
    "`stock`": {"for_": "stock"},
}


def main(
    model: Annotated[str, typer.Option(help=f"{', '.join(WORKLOADS)}.")] = "minilm",
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 2,
    out: Annotated[Path | None, typer.Option(help="JSON to write.")] = None,
    smoke: Annotated[bool, typer.Option(help="Tiny settings: does it run?")] = False,
) -> None:
    """Search once, and judge the members of every case."""
    torch.set_num_threads(threads)
    work = workload(model, None, heldout=32 if smoke else None)
    judge, dense = work.judge()
    config = SearchConfig(steps=4, scale_batches=1) if smoke else SearchConfig()
    batches = work.batches(0, 4 if smoke else 256, work.batch_size)
    path = search(work.model, batches, config, progress=False)
    results: dict[str, dict[str, Any]] = {}
    for name, constraints in CASES.items():
        found = results.setdefault(name, {})
        for keep in KEEPS:
            try:
                plan = path.plan(sparsity=1 - keep, **constraints)
            except BudgetError as error:
                found[str(keep)] = {"refused": str(error)}
                continue
            with masked(work.model, plan):
                metrics = judge(work.model)
            cost = plan.constraint_cost
            found[str(keep)] = {
                "metrics": metrics,
                "sparsity": plan.achieved.sparsity,
                "kept_score": None if cost is None else cost.kept_score,
            }
    rows = [[name, *(_cell(found[str(keep)], work.headline) for keep in KEEPS)]
            for name, found in results.items()]  # fmt: skip
    show(f"{work.headline}, kept score", ["", *map(str, KEEPS)], rows)
    settings = {"model": model, "metric": work.headline, "keeps": KEEPS, "smoke": smoke}
    file = out or RESULTS / f"constraint_cost_{model}.json"
    save(file, settings | {"threads": threads}, results, dense=dense)


def _cell(found: dict[str, Any], metric: str) -> str:
    if "refused" in found:
        return "—"
    kept = found["kept_score"]
    return f"{found['metrics'][metric]:.4f}" + ("" if kept is None else f" ({kept:.1%})")


if __name__ == "__main__":
    typer.run(main)
