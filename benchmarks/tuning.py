"""What tuning wins back of a compensated member's fidelity in 1, 3 and 10 minutes.

    python benchmarks/tuning.py --model minilm

The time of a step is measured first, for every member; each run then has as many steps as fit in
its minutes, so that its schedule ends with its time. Members are those of quality.py's best method.
Every run is added to the JSON as soon as it ends; runs that are there already are not repeated.
Runs of a dense model that scores otherwise (weights trained on another machine) are replaced.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn

from gemma import Judge
from quality_runs import add_run, fidelity_of, same_dense, same_run, shown, stored_runs
from record import RESULTS, show
from solpath.config import TuneConfig
from solpath.model.extraction import extract
from solpath.planning.path import SolutionPath
from solpath.refining.compensation import compensate
from solpath.refining.tuning import tune
from solpath.running.provenance import provenance
from solpath.searching.search import search
from workloads import WORKLOADS, Batch, Workload, best_search, workload


def main(
    model: Annotated[str, typer.Option(help=f"{', '.join(WORKLOADS)}.")],
    keeps: Annotated[str, typer.Option(help="Comma-separated shares.")] = "0.4,0.25",
    minutes: Annotated[str, typer.Option(help="Comma-separated.")] = "1,3,10",
    seed: Annotated[int, typer.Option(help="Of search, batches and tuning.")] = 0,
    learning_rate: Annotated[float | None, typer.Option(help="Default of the library.")] = None,
    lora_rank: Annotated[int | None, typer.Option(help="Default: all weights.")] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="Folder of the dense model.")] = None,
    out: Annotated[Path | None, typer.Option(help="JSON to add to.")] = None,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 2,
    smoke: Annotated[bool, typer.Option(help="Tiny settings: does it run?")] = False,
) -> None:
    """Run what is missing and print the table of one model."""
    torch.set_num_threads(threads)
    out = out or RESULTS / f"tuning_{model}.json"
    work = workload(model, checkpoint, heldout=32 if smoke else None)
    config = best_search(seed, smoke=smoke)
    settings = {
        "model": model,
        "seed": seed,
        "batches": 24 if smoke else 2048,
        "threads": threads,
        "learning_rate": learning_rate,
        "lora_rank": lora_rank,
        "smoke": smoke,
        "data": work.data,
    }
    batches = work.batches(seed, 24 if smoke else 256, work.batch_size)
    judge, dense = work.judge()
    members = Members(
        work, judge, dense, batches, lambda: search(work.model, batches, config, progress=False)
    )
    members.tune(settings, keeps, minutes, out)


@dataclass
class Members:
    """Compensated members of one path that are tuned.

    Attributes:
        judge: what gives the metrics of a model, of which `dense` are those of the dense one.
        batches: of the search, by which members are compensated.
        path: called at most once.
    """

    work: Workload
    judge: Judge
    dense: dict[str, float]
    batches: list[Batch]
    path: Callable[[], SolutionPath]

    def tune(self, settings: dict[str, Any], keeps: str, minutes: str, out: Path) -> None:
        """Add a run for every size and time that is missing, and print the table."""
        work, dense = self.work, self.dense
        train, judges = work.tuning(settings["seed"], settings["batches"])
        options = {key: settings[key] for key in ("seed", "learning_rate", "lora_rank")}
        limits = [0.02] if settings["smoke"] else [float(value) for value in minutes.split(",")]
        path = None
        for keep in (float(keep) for keep in keeps.split(",")):
            small = None
            for limit in limits:
                wanted = {"settings": {**settings, "keep": keep, "minutes": limit}}
                known = [run for run in stored_runs(out) if same_run(run, wanted)]
                if any(same_dense(run, dense, work.headline) for run in known):
                    continue
                path = path or self.path()
                if small is None:
                    small = extract(work.model, path.plan(sparsity=1 - keep))
                    calibration = self.batches[: work.calibration]
                    small = compensate(small, work.model, calibration, progress=False)
                    config = TuneConfig(**options)
                    pace = measured_pace(small, work.model, config, train, judges)
                run = run_tuning(work, small, config, train, judges, self.judge, limit, pace)
                run |= {**wanted, "dense": dense, "search": dict(path.config)}
                run |= {"share_won_back": _share_won_back(run, fidelity_of(dense), dense)}
                add_run(out, run)
        _table(work, settings, stored_runs(out))


def measured_pace(
    small: nn.Module,
    dense: nn.Module,
    config: TuneConfig,
    train: list[Batch],
    judges: list[Batch],
) -> tuple[float, float]:
    """Seconds of a step, and of all that does not grow with the steps."""
    seconds = []
    for steps in (8, 24):  # two runs of different length: start and checks cancel
        start = time.perf_counter()
        probe = replace(config, steps=steps, evaluate_every=steps)
        tune(small, dense, train, probe, heldout=judges, progress=False)
        seconds.append(time.perf_counter() - start)
    step = (seconds[1] - seconds[0]) / 16
    return step, seconds[0] - 8 * step


def run_tuning(
    work: Workload,
    small: nn.Module,
    config: TuneConfig,
    train: list[Batch],
    judges: list[Batch],
    judge: Judge,
    minutes: float,
    pace: tuple[float, float],
) -> dict[str, Any]:
    """Tune for about so many minutes; metrics on the test batches before and after."""
    step, fixed = pace
    steps = max(8, round((60 * minutes - fixed) / (step + fixed / 2 / config.evaluate_every)))
    start = time.perf_counter()
    tuned = tune(
        small, work.model, train, replace(config, steps=steps), heldout=judges, progress=False
    )
    spent = time.perf_counter() - start
    before, after = judge(small), judge(tuned)
    return {
        "before": before,
        "after": after,
        "seconds": spent,
        "config": replace(config, steps=steps).to_dict(),
        "provenance": provenance(),
    }


def _share_won_back(run: dict[str, Any], metric: str, dense: dict[str, float]) -> float:
    """1: as good as the dense model; 0: as before."""
    before, after = run["before"][metric], run["after"][metric]
    return (after - before) / (dense[metric] - before) + 0.0  # no minus before a zero


def _table(work: Workload, settings: dict[str, Any], runs: list[dict[str, Any]]) -> None:
    metric = fidelity_of(runs[0]["dense"])
    rows = [
        (
            f"keep {run['settings']['keep']:.2f}",
            f"{run['settings']['minutes']:g}",
            run["config"]["steps"],
            shown(run["before"][metric], metric),
            shown(run["after"][metric], metric),
            f"{run['share_won_back']:.1%}",
            f"{run['seconds']:.0f}",
        )
        for run in runs
        if {k: v for k, v in run["settings"].items() if k not in ("keep", "minutes")} == settings
    ]
    title = f"{work.name}: {metric}"
    show(title, ["size", "minutes", "steps", "before", "after", "won back", "seconds"], rows)


if __name__ == "__main__":
    typer.run(main)
