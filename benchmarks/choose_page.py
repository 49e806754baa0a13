"""Tables about choosing a size: how often the bounds are too low, and what samples they need."""

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from record import RESULTS

Rows = Iterator[tuple[str, ...]]
MODELS = {"minilm": "MiniLM", "digits": "ViT on digits", "gemma": "Gemma 3 270M"}
SHOWN = {"exact": "exact", "betting": "betting", "bernstein": "empirical Bernstein"}


def bounds() -> Rows:
    """The most that a bound was too low, and its mean distance over that of the normal one."""
    yield "bound at 95 %", "too low, at most", "above the truth ÷ normal approximation"
    rows = _results()["coverage"]
    base = {(row["values"], row["samples"]): row["above"] for row in rows if _is(row, "normal")}
    for name, words in (SHOWN | {"normal": "normal approximation"}).items():
        own = [row for row in rows if _is(row, name)]
        ratios = [row["above"] / base[row["values"], row["samples"]] for row in own]
        yield (
            words,
            f"{max(row['too_low'] for row in own):.1%}",
            f"{min(ratios):.2f} to {max(ratios):.2f}",
        )


def groups() -> Rows:
    """How often a bound is too low by rows of documents, and by the documents."""
    yield "rows that lose what their document loses", "rows as draws", "documents as draws"
    found: dict[float, dict[str, float]] = {}
    for row in _results()["grouped"]:
        found.setdefault(row["alike"], {})[row["draws"]] = row["too_low"]
    for alike, low in found.items():
        yield f"{alike:.0%}", f"too low {low['rows']:.1%}", f"{low['groups']:.1%}"


def real() -> Rows:
    """What choices on real models came to, a row for every limit."""
    yield "model", "metric", "`max_loss`", "broken", "mean sparsity chosen", "largest true one"
    found = json.loads((RESULTS / "choose_real.json").read_text())["results"]
    for name, words in MODELS.items():
        for metric in ("accuracy", "divergence"):
            for limit in found.get(name, {}).get(metric, {}).get("limits", []):
                shares = (f"{limit[key]:.1%}" for key in ("broken", "sparsity", "most"))
                yield words, metric, f"{limit['max_loss']:.4f}", *shares


def needed() -> Rows:
    """Samples for every second choice to pass."""
    yield "true loss (points)", "`max_loss` (points)", *SHOWN.values(), "normal approximation"
    found: dict[tuple[float, float], dict[str, int]] = {}
    for row in _results()["needed"]:
        cells = found.setdefault((row["loss"], row["max_loss"]), {})
        cells |= {row["bound"]: row["samples"], "normal": row["approximation"]}
    for (loss, limit), cells in found.items():
        counts = (f"{cells[name]:,}" for name in (*SHOWN, "normal"))
        yield f"{100 * loss:g}", f"{100 * limit:g}", *counts


TABLES: Mapping[str, Callable[[], Rows]] = {
    "choose_bounds": bounds,
    "choose_groups": groups,
    "choose_needed": needed,
    "choose_real": real,
}
"""Name to the rows of a table, its header first."""


def _is(row: dict[str, Any], bound: str) -> bool:
    return bool(row["bound"] == bound)


def _results() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / "choose_coverage.json").read_text())["results"]
    return found
