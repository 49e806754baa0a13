"""Quality against size: SPP and every baseline, on the same batches, without tuning weights.

    python benchmarks/quality.py --model minilm --seeds 0,1,2

Every run of one method with one seed is added to the JSON as soon as it ends; runs that are there
already are not repeated, so the command can be interrupted and started again. Runs of a dense model
that scores otherwise (weights trained on another machine) are replaced.
"""

import statistics
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from gemma import Judge
from quality_runs import add_run, fidelity_of, same_dense, same_run, stored_runs
from record import RESULTS, show
from rivals.gauss_newton import turned_gauss_newton
from solpath.baselines import METHODS
from solpath.config import InclusionConfig, SearchConfig
from solpath.model.extraction import extract
from solpath.model.masks import masked
from solpath.planning.path import SolutionPath
from solpath.refining.compensation import compensate
from solpath.running.provenance import provenance
from solpath.searching.search import search
from workloads import BEST_SETTINGS, WORKLOADS, Workload, workload

SEARCHES: dict[str, tuple[type, dict[str, Any]]] = {
    "spp": (SearchConfig, {}),
    "spp_principal": (SearchConfig, {"basis": "principal"}),
    "spp_principal_refit": (SearchConfig, {"basis": "principal"}),
    "spp_best": (SearchConfig, BEST_SETTINGS),
    "best_coordinate": (SearchConfig, {"compensated": True}),
    "best_unfitted": (SearchConfig, BEST_SETTINGS),
    "best_continuous": (SearchConfig, BEST_SETTINGS | {"binary": False}),
    "best_constant_pull": (SearchConfig, BEST_SETTINGS | {"growing_pull": False}),
    "spp_continuous": (SearchConfig, {"binary": False}),
    "spp_constant_pull": (SearchConfig, {"growing_pull": False}),
    "inclusion": (InclusionConfig, {}),
}
FAIREST = {"gauss_newton_refit": turned_gauss_newton}  # solpath's axes and compensation
COMPENSATED = {  # members are compensated, those of other methods are not
    "spp_principal_refit",
    "spp_best",
    "best_coordinate",
    "best_continuous",
    "best_constant_pull",
    *FAIREST,
}
Paths = dict[str, tuple[SolutionPath, float]]  # by search: its result and seconds
DEFAULT = ",".join(["spp", *METHODS])
SMOKE = {
    "iterative": {"stages": 2, "scale_batches": 1},
    "iterative_curvature": {"stages": 2, "scale_batches": 1},
    "taylor": {"scale_batches": 1},
    "gauss_newton": {"scale_batches": 1},
}


def main(
    model: Annotated[str, typer.Option(help=f"{', '.join(WORKLOADS)}.")],
    seeds: Annotated[str, typer.Option(help="Comma-separated.")] = "0,1,2",
    methods: Annotated[str, typer.Option(help="Comma-separated; also the ablations.")] = DEFAULT,
    checkpoint: Annotated[Path | None, typer.Option(help="Folder of the dense model.")] = None,
    out: Annotated[Path | None, typer.Option(help="JSON to add to.")] = None,
    steps: Annotated[int | None, typer.Option(help="Search steps; default of the library.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Samples per batch.")] = None,
    batch_count: Annotated[int, typer.Option(help="Different batches; then they repeat.")] = 256,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 2,
    force: Annotated[bool, typer.Option(help="Repeat runs that are in the JSON.")] = False,
    smoke: Annotated[bool, typer.Option(help="Tiny settings: does it run?")] = False,
) -> None:
    """Run what is missing and print the table of one model."""
    torch.set_num_threads(threads)
    out = out or RESULTS / f"quality_{model}.json"
    names = [name.strip() for name in methods.split(",")]
    unknown = [name for name in names if name not in {**SEARCHES, **METHODS, **FAIREST}]
    if unknown:
        known = ", ".join([*SEARCHES, *METHODS, *FAIREST])
        raise SystemExit(f"unknown method {unknown[0]!r}; choose from {known}.")
    work = workload(model, checkpoint, heldout=32 if smoke else None)
    settings = {
        "model": model,
        "batch_size": batch_size or work.batch_size,
        "batch_count": 4 if smoke else batch_count,
        "steps": 4 if smoke else steps,
        "smoke": smoke,
        "data": work.data,
    }
    judge, dense = work.judge()
    if work.loss is None and "released" in names:
        names.remove("released")
        print(f"{model} has no labels, and the released rule needs a loss of them: left out.")
    for seed in (int(seed) for seed in seeds.split(",")):
        batches = work.batches(seed, settings["batch_count"], settings["batch_size"])
        paths: Paths = {}
        for name in names:
            wanted = {"method": name, "seed": seed, "settings": settings}
            known = [run for run in stored_runs(out) if same_run(run, wanted)]
            if not force and any(current(run, work, dense) for run in known):
                continue
            run = run_method(work, name, seed, batches, judge, settings, paths)
            add_run(out, {**run, "dense": dense, "settings": settings})
            row = "  ".join(f"{size['metrics'][work.headline]:.4f}" for size in run["sizes"])
            line = f"{model} {name} seed {seed}: {row}  ({run['seconds']:.1f} s)"
            Console().print(line, soft_wrap=True)
    _table(work, settings, dense, stored_runs(out))


def run_method(
    work: Workload,
    name: str,
    seed: int,
    batches: list[Any],
    judge: Judge,
    settings: dict[str, Any],
    paths: Paths,
) -> dict[str, Any]:
    """One search and its scores at every size; without compensation inside `masked`.

    Methods that differ only in what is done with the order share the search in `paths`.
    """
    key = search_key(name)
    if key not in paths:
        start = time.perf_counter()
        path = find_path(work, name, seed, batches, settings)
        paths[key] = path, time.perf_counter() - start
    path, searched = paths[key]
    seconds = {"seconds": searched}
    plans = [path.plan(sparsity=1 - keep) for keep in work.keeps]
    scores = []
    if name in COMPENSATED:
        spent = 0.0
        calibration = batches[: 4 if settings["smoke"] else work.calibration]
        at_once = work.at_once or len(plans)
        for some in (plans[i : i + at_once] for i in range(0, len(plans), at_once)):
            start = time.perf_counter()
            small = [extract(work.model, plan) for plan in some]
            members = compensate(small, work.model, calibration, progress=False)
            spent += time.perf_counter() - start
            scores += [judge(model) for model in members]
        seconds["compensation_seconds"] = spent
    else:
        for plan in plans:
            with masked(work.model, plan):
                scores.append(judge(work.model))
    sizes = [
        {"keep": keep, "sparsity": plan.achieved.sparsity, "metrics": score}
        for keep, plan, score in zip(work.keeps, plans, scores, strict=True)
    ]
    return {
        "model": work.name,
        "method": name,
        "seed": seed,
        **seconds,
        "config": dict(path.config),
        "sizes": sizes,
        "provenance": provenance(),
    }


def search_key(name: str) -> str:
    """The same for methods that share a search."""
    return str(SEARCHES.get(name, name))


def find_path(
    work: Workload, name: str, seed: int, batches: list[Any], settings: dict[str, Any]
) -> SolutionPath:
    if name in METHODS:
        options: dict[str, Any] = SMOKE.get(name, {}) if settings["smoke"] else {}
        if name == "released":
            options = {"loss": work.loss}
            if settings["steps"] is not None:
                options["steps"] = settings["steps"]
            if work.labelled is not None:
                batches = work.labelled(seed, settings["batch_count"], settings["batch_size"])
        return METHODS[name](work.model, batches, seed=seed, **options)
    if name in FAIREST:
        return FAIREST[name](work.model, batches, seed=seed)
    kind, options = SEARCHES[name]
    if settings["steps"] is not None:
        options = options | {"steps": settings["steps"]}
    if settings["smoke"]:
        options = options | {"scale_batches": 1}
    return search(work.model, batches, kind(seed=seed, **options), progress=False)


def current(run: dict[str, Any], work: Workload, dense: Any) -> bool:
    """Whether a run has today's sizes and is of this dense model."""
    keeps = tuple(size["keep"] for size in run["sizes"])
    return keeps == work.keeps and same_dense(run, dense, work.headline)


def _table(
    work: Workload, settings: dict[str, Any], dense: Any, runs: list[dict[str, Any]]
) -> None:
    """Mean over seeds (and half the range) per method and size; SPP against the best rival."""
    runs = [r for r in runs if r["settings"] == settings and current(r, work, dense)]
    fidelity = fidelity_of(dense)
    for metric in dict.fromkeys([work.headline, fidelity]):
        higher = metric == "cosine" or (metric == work.headline and work.higher_is_better)
        means: dict[str, list[float]] = {}
        rows = []
        for name in dict.fromkeys(run["method"] for run in runs):
            chosen = [run for run in runs if run["method"] == name]
            values = [
                [run["sizes"][i]["metrics"][metric] for run in chosen]
                for i in range(len(work.keeps))
            ]
            means[name] = [statistics.fmean(value) for value in values]
            cells = [f"{statistics.fmean(v):.4f} ±{(max(v) - min(v)) / 2:.4f}" for v in values]
            seconds = statistics.median(run["seconds"] for run in chosen)
            rows.append([name, len(chosen), *cells, f"{seconds:.1f}"])
        rivals = [mean for name, mean in means.items() if name in METHODS]
        if "spp" in means and rivals:
            best = [(max if higher else min)(column) for column in zip(*rivals, strict=True)]
            pairs = list(zip(means["spp"], best, strict=True))
            rows.append(["spp - best rival", "", *(f"{a - b:+.4f}" for a, b in pairs), ""])
            ratios = [f"{a / b:.3f}" if b else "-" for a, b in pairs]
            rows.append(["spp / best rival", "", *ratios, ""])
        title = f"{work.name}: {work.data.get('task', metric) if metric == 'task' else metric}"
        title += f" (dense {dense[metric]:.4f}; {'higher' if higher else 'lower'} is better)"
        keeps = [f"keep {keep:.2f}" for keep in work.keeps]
        show(title, ["method", "seeds", *keeps, "search s"], rows)


if __name__ == "__main__":
    typer.run(main)
