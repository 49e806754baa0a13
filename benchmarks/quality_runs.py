"""The results of quality.py, rival_quality.py and tuning.py: stored, and read back for the docs."""

import json
import math
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from record import RESULTS
from solpath.files import write_file

NAMES = {
    "spp": "**solpath**",
    "iterative": "iterative, with gradient",
    "iterative_curvature": "iterative",
    "gauss_newton": "one-shot Gauss-Newton",
    "taylor": "Taylor",
    "magnitude": "magnitude",
    "random": "random",
    "released": "released rule",
}
ABLATION = {
    "spp": "**default**",
    "spp_continuous": "continuous masks instead of binary ones",
    "spp_constant_pull": "constant pull instead of a growing one",
    "inclusion": "the paper's inclusion, V as the order",
}
NORMS = {
    "folded": "folded into the query",
    "plain": "norm over what is left, as the stock module has it",
    "dense_width": "sum over what is left, divided by the dense width",
    "dense_norm": "dense norm, not extractable",
}
BASES = {"spp": "channels as they are", "spp_principal": "principal axes"}
BEST = {
    "spp_best": "**solpath, order and weights compensated**",
    "spp_principal_refit": "solpath, weights compensated",
    "spp_principal": "solpath, principal axes alone",
    "gauss_newton_refit": "one-shot Gauss-Newton, with solpath's axes and compensation",
    "corp_pooled": "CORP, layers pooled",
    "osscar_pooled": "OSSCAR, layers pooled",
    "wpac_pooled": "WPAC, layers pooled",
    "corp": "CORP",
    "modegpt": "MoDeGPT",
    "osscar": "OSSCAR",
    "wpac": "WPAC",
    "uniql": "UniQL",
    "flap": "FLAP",
    "torch_pruning_taylor": "Torch-Pruning, Taylor",
    "torch_pruning_taylor_global": "Torch-Pruning, Taylor, global",
    "torch_pruning_magnitude": "Torch-Pruning, magnitude",
}
PARTS = {
    "spp_best": "**everything**",
    "best_coordinate": "channels as they are in place of principal axes",
    "spp_principal_refit": "order without compensation in view",
    "best_unfitted": "weights not compensated",
    "best_continuous": "continuous masks in place of binary ones",
    "best_constant_pull": "constant pull in place of a growing one",
}
SHORT = ("spp_best", "gauss_newton_refit", "corp_pooled", "osscar_pooled", "corp")
Runs = dict[str, list[dict[str, Any]]]


def stored_runs(file: Path) -> list[dict[str, Any]]:
    """Every run in a result file, in the order of their ends; none if there is no file."""
    runs: list[dict[str, Any]] = json.loads(file.read_text())["runs"] if file.exists() else []
    return runs


def same_run(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two runs are of one method with one seed (if they name them) and of one setting."""
    return all(one.get(key) == other.get(key) for key in ("method", "seed", "settings"))


def same_dense(run: Mapping[str, Any], dense: Mapping[str, float], metric: str) -> bool:
    """Whether a run is of this dense model, and not of one trained on another machine."""
    return math.isclose(run["dense"][metric], dense[metric], rel_tol=1e-5)


def add_run(file: Path, run: dict[str, Any]) -> None:
    """Add a run, atomically; one that is the same is replaced."""
    runs = [*(other for other in stored_runs(file) if not same_run(other, run)), run]
    write_file(file, (json.dumps({"runs": runs}, indent=1, allow_nan=False) + "\n").encode())


def read_runs(model: str, *kinds: str) -> Runs:
    """The runs of every method in result files, with the seeds that all of them have.

    Args:
        kinds: of files ``<kind>_<model>.json``, default ``quality``; those that do not exist are
            empty.
    """
    runs: Runs = {}
    for kind in kinds or ("quality",):
        for run in stored_runs(RESULTS / f"{kind}_{model}.json"):
            runs.setdefault(run["method"], []).append(run)
    seeds = [{run["seed"] for run in chosen} for chosen in runs.values()]
    common = set.intersection(*seeds) if seeds else set()
    return {m: [run for run in chosen if run["seed"] in common] for m, chosen in runs.items()}


def keeps(runs: Runs) -> list[float]:
    """The shares kept, largest first."""
    return [size["keep"] for size in next(iter(runs.values()))[0]["sizes"]]


def values(runs: list[dict[str, Any]], metric: str, index: int) -> list[float]:
    """One metric at one size, of every seed."""
    return [run["sizes"][index]["metrics"][metric] for run in runs]


def means(runs: list[dict[str, Any]], metric: str) -> list[float]:
    """One metric at every size, averaged over seeds."""
    return [statistics.fmean(values(runs, metric, i)) for i in range(len(runs[0]["sizes"]))]


def headline(runs: Runs) -> str:
    """The metric that judges a model: its task's, or cosine where it has none."""
    return "task" if "task" in next(iter(runs.values()))[0]["dense"] else "cosine"


def fidelity(runs: Runs) -> str:
    """The metric that compares with the dense model: ``kl`` with logits, else ``cosine``."""
    return fidelity_of(next(iter(runs.values()))[0]["dense"])


def fidelity_of(metrics: Mapping[str, float]) -> str:
    """The same, of the metrics of one model: its first, a perplexity, where it has neither."""
    return next(name for name in ("kl", "cosine", *metrics) if name in metrics)


def shown(value: float, metric: str) -> str:
    """A fidelity as text: four decimals of a cosine, three digits of a distance."""
    return f"{value:.4f}" if metric == "cosine" else f"{value:#.3g}"
