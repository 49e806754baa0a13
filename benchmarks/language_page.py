"""The tables of language.py: quality of a pretrained decoder, transfer between texts, and samples.

Whatever runs there are is shown; a size or a method that is missing is left out.
"""

import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from quality_runs import BEST, NAMES, stored_runs
from record import RESULTS

LABELS = {
    "spp_best": "**solpath, order and weights compensated**",
    "best_unfitted": "… the same order, weights as they are",
    "gauss_newton_refit": BEST["gauss_newton_refit"],
    "spp": "solpath, default search",
    **{name: label for name, label in NAMES.items() if name != "spp"},
    **{name: label for name, label in BEST.items() if "torch_pruning" not in name},
    "corp_pooled": "CORP, layers pooled",
    "modegpt_uniform": "MoDeGPT, layers alike",
    "uniql_uniform": "UniQL, layers alike",
    "flap_channels": "FLAP, channels of heads",
    "llm_pruner": "LLM-Pruner",
    "slicegpt": "SliceGPT",
    "shortgpt": "ShortGPT",
}
SHORT = (
    "spp_best",
    "spp",
    "iterative_curvature",
    "corp",
    "modegpt",
    "flap",
    "llm_pruner",
    "slicegpt",
)
SEARCHED = {("code",): "code", ("english",): "English", ("code", "english"): "both, in turn"}
JUDGED = {"code": "code", "english": "English"}
SAMPLED = (0.8, 0.6)  # sizes whose continuations are shown
MISSING = "Not measured: `python benchmarks/language.py`."
Table = Iterator[Sequence[str]]


def language_table(name: str, file: Path | None = None) -> list[Sequence[str]] | str:
    """The rows of one table, the header first, or a text.

    Args:
        name: ``language``, ``language_agreement``, ``language_short`` (of the best methods, and
            of those that people use), ``language_transfer`` or ``language_written``.
    """
    runs = [run for run in stored_runs(file or RESULTS / "language.json") if run["sizes"]]
    runs = _fullest([run for run in runs if not run["settings"]["smoke"]])
    on_code = [run for run in runs if _searched(run) == ("code",)]
    if not (runs if name == "language_transfer" else on_code):
        return MISSING
    if name == "language_written":
        return _written(on_code)
    if name == "language_transfer":
        return [*_transfer(runs)]
    if name == "language_short":
        on_code = [run for run in on_code if run["method"] in SHORT]
    return [*_methods(on_code, "code_agreement" if name == "language_agreement" else "code")]


def _fullest(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One run of every method, seed and text searched on: of several, that with most metrics."""
    found: dict[Any, dict[str, Any]] = {}
    for run in sorted(runs, key=lambda run: len(run["dense"])):
        found[run["method"], run["seed"], _searched(run)] = run
    return [run for run in runs if any(run is kept for kept in found.values())]


def _methods(runs: list[dict[str, Any]], metric: str) -> Table:
    keeps = _keeps(runs)
    dense = runs[0]["dense"][metric]
    yield [f"kept (dense {_shown(dense, metric)})", *(f"{keep:.0%}" for keep in keeps), "seeds"]
    for method, label in LABELS.items():
        chosen = [run for run in runs if run["method"] == method]
        if chosen:
            yield [label, *(_mean(chosen, keep, metric) for keep in keeps), str(len(chosen))]


def _transfer(runs: list[dict[str, Any]]) -> Table:
    """What a search on one text costs on the other, and what a search on both does."""
    runs = [run for run in runs if "english" in run["dense"]]
    keeps = _keeps(runs)
    yield ["method", "searched on", "perplexity of", *(f"{keep:.0%}" for keep in keeps), "seeds"]
    for method, label in LABELS.items():
        texts = {_searched(run) for run in runs if run["method"] == method}
        for searched in SEARCHED:
            if searched not in texts or len(texts) < 2:
                continue
            chosen = [r for r in runs if r["method"] == method and _searched(r) == searched]
            for metric, judged in JUDGED.items():
                cells = [_mean(chosen, keep, metric) for keep in keeps]
                yield [label, SEARCHED[searched], judged, *cells, str(len(chosen))]


def _written(runs: list[dict[str, Any]]) -> str:
    """Greedy continuations of the dense model and of members of the best method, as text."""
    run = next((run for run in runs if run["method"] == "spp_best" and "prompts" in run), None)
    if run is None:
        return MISSING
    parts = []
    for i, prompt in enumerate(run["prompts"]):
        parts += [f">>> {prompt!r}", f"dense {run['dense_written'][i]!r}"]
        for size in run["sizes"]:
            if size["keep"] in SAMPLED:
                parts.append(f"{size['keep']:>5.0%} {size['written'][i]!r}")
        parts.append("")
    return "\n".join(["```text", *parts[:-1], "```"])


def _searched(run: dict[str, Any]) -> tuple[str, ...]:
    return tuple(run["settings"]["data"]["searched"])


def _keeps(runs: list[dict[str, Any]]) -> list[float]:
    return sorted({size["keep"] for run in runs for size in run["sizes"]}, reverse=True)


def _mean(runs: list[dict[str, Any]], keep: float, metric: str) -> str:
    """The mean over the runs that have this size."""
    sizes = [size for run in runs for size in run["sizes"] if size["keep"] == keep]
    values = [size["metrics"][metric] for size in sizes if metric in size["metrics"]]
    return _shown(statistics.fmean(values), metric) if values else ""


def _shown(value: float, metric: str) -> str:
    """Three digits of a perplexity, thousands by a comma; a share of tokens in per cent."""
    if metric.endswith("agreement"):
        return f"{value:.0%}"
    if value >= 1e6:
        return f"{value:.0e}"
    if round(value, 1) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if round(value, 2) >= 10 else f"{value:.2f}"
