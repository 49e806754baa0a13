"""What all recipes share: one search, several sizes, tuned, scored and saved, in one folder.

The folder gets `path/` (the order), `s20/`, `s40/`, ... (the models, for `solpath.load`),
`family.json` and `family.md`. Interrupted and started again with the same settings, it goes on.
"""

import json
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from accelerate import PartialState
from torch import nn

import solpath
from solpath.errors import ConfigError, SolpathError
from solpath.files import write_file
from solpath.pretrained import from_pretrained, load_processor
from solpath.running.provenance import provenance

Out = Annotated[Path, typer.Option(help="Folder for the family.")]
Sparsity = Annotated[str, typer.Option(help="Shares of the prunable parameters to remove.")]
Steps = Annotated[int, typer.Option(help="Of the search.")]
TuneSteps = Annotated[int, typer.Option(help="Of tuning every size; 0 tunes none.", min=0)]
BatchSize = Annotated[int, typer.Option(help="Samples in a batch.", min=1)]
Samples = Annotated[int, typer.Option(help="Samples the search sees, again and again.", min=1)]
Heldout = Annotated[int, typer.Option(help="Held-out samples for fidelity.", min=1)]
Limit = Annotated[int | None, typer.Option(help="Held-out samples for the score; default all.")]
Seed = Annotated[int, typer.Option(help="Of the search and the order of the data.", min=0)]
Device = Annotated[str | None, typer.Option(help="Default: an accelerator if there is one.")]

SIZES = "0.2,0.3,0.4,0.5,0.6"
CHECKPOINT = "checkpoint"

Score = Callable[[nn.Module], Mapping[str, float]]


@dataclass(frozen=True)
class Data:
    """What a recipe gives.

    Attributes:
        search: unlabelled batches for the search.
        tune: unlabelled batches for tuning; may be the same.
        heldout: unlabelled batches for fidelity, no sample of which is in the others.
        score: the task's metrics of a model, on data the search has not seen.
    """

    search: Iterable[Any]
    tune: Iterable[Any]
    heldout: Iterable[Any]
    score: Score


def load(name: str, device: str | None) -> tuple[Any, Any, torch.device]:
    """Dense model, processor and device. A CPU searches in float32, whatever the checkpoint is."""
    place = PartialState().device if device is None else torch.device(device)
    dtype = torch.float32 if place.type == "cpu" else None
    return from_pretrained(name, device=place, dtype=dtype), load_processor(name), place


def make_family(
    dense: nn.Module,
    data: Data,
    out: Path,
    *,
    sparsity: str,
    steps: int,
    tune_steps: int,
    seed: int,
    processor: Any,
    about: Mapping[str, Any],
) -> dict[str, Any]:
    """Search, cut, tune, score and save every size; returns what `family.json` holds."""
    sizes = read_sizes(sparsity)
    first = PartialState().is_main_process
    start = time.perf_counter()
    config = solpath.SearchConfig(steps=steps, seed=seed)
    path = solpath.search(dense, data.search, config, checkpoint=out / CHECKPOINT, progress=first)
    seconds = time.perf_counter() - start
    if first:
        path.save(out / "path", overwrite=True)

    members = [member("dense", path.plan(sparsity=0), data.score(dense))]
    for size in sizes:
        name, plan = f"s{100 * size:g}", path.plan(sparsity=size)
        small = solpath.extract(dense, plan)
        if tune_steps:
            tuning = solpath.TuneConfig(steps=tune_steps)
            small = solpath.tune(
                small,
                dense,
                data.tune,
                tuning,
                heldout=data.heldout,
                checkpoint=out / CHECKPOINT / name,
            )
        fidelity = solpath.evaluate(small, dense, data.heldout).metrics
        members.append(member(name, plan, {**data.score(small), **fidelity}))
        if first:
            solpath.save(small, out / name, tokenizer=processor, overwrite=True)
    family = {
        "format": "solpath.recipe",
        "version": 1,
        **about,
        "class": type(dense).__name__,
        "search": {"method": path.method, "seconds": seconds, "config": dict(path.config)},
        "tune_steps": tune_steps,
        "members": members,
        "provenance": provenance(next(dense.parameters()).device),
    }
    if first:
        write_file(out / "family.json", (json.dumps(family, indent=1) + "\n").encode())
        write_file(out / "family.md", table(members).encode())
        shutil.rmtree(out / CHECKPOINT, ignore_errors=True)
        print(table(members))
    return family


def read_sizes(text: str) -> list[float]:
    """``"0.2,0.4"`` as numbers in (0, 1), smallest first."""
    try:
        sizes = sorted({float(part) for part in text.split(",")})
    except ValueError as error:
        raise ConfigError(f"sparsity must be numbers such as {SIZES}, got {text!r}.") from error
    if not all(0 < size < 1 for size in sizes):
        raise ConfigError(f"sparsity must be above 0 and below 1, got {text!r}.")
    return sizes


def member(name: str, plan: solpath.Plan, metrics: Mapping[str, float]) -> dict[str, Any]:
    """One row of the family."""
    cost = plan.achieved
    return {
        "name": name,
        "sparsity": cost.sparsity,
        "params": cost.params,
        "macs": cost.macs,
        "metrics": dict(metrics),
    }


def table(members: list[dict[str, Any]]) -> str:
    """The family as a Markdown table."""
    names = list(dict.fromkeys(name for row in members for name in row["metrics"]))
    lines = [
        "| " + " | ".join(["model", "removed", "parameters", "MACs", *names]) + " |",
        "|---" * (4 + len(names)) + "|",
    ]
    for row in members:
        values = [row["metrics"].get(name) for name in names]
        cells = [row["name"], f"{row['sparsity']:.1%}", f"{row['params']:,}", f"{row['macs']:,}"]
        cells += ["" if value is None else f"{value:.4f}" for value in values]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def start(main: Callable[..., None]) -> None:
    """Run a recipe from the command line; an expected error is one line."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    try:
        app()
    except SolpathError as error:
        sys.exit(f"error: {error}")
