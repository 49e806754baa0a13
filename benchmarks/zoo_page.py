"""The zoo in one page: plots of task and fidelity against size, and two tables.

python benchmarks/zoo_page.py          # reads results/quality_*.json, writes docs/zoo.svg
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from quality_runs import NAMES, Runs, fidelity, headline, keeps, means, read_runs, shown
from record import RESULTS

# Workload, what the panel says, and the task's axis.
PANELS = {
    "digits": ("ViT, digits", "accuracy"),
    "deit": ("DeiT, digits", "accuracy"),
    "swin": ("Swin, digits", "accuracy"),
    "clip": ("CLIP, digits and words", "zero-shot accuracy"),
    "llama": ("LLaMA, bytes", "bits per byte"),
    "opt": ("OPT, bytes", "bits per byte"),
    "t5": ("T5, cut bytes", "bits per byte"),
}
COMMON = (0.8, 0.6, 0.4, 0.25)  # sizes that all of them have
COLUMNS = 4
STRONG = "#0b6e99"
# Rivals are grey; dashes and markers tell them apart.
STYLES = {
    "iterative": ("#5b646c", "-", "s"),
    "iterative_curvature": ("#5b646c", "--", "D"),
    "gauss_newton": ("#7a838b", "-", "^"),
    "taylor": ("#7a838b", ":", "v"),
    "magnitude": ("#9aa3ab", "--", "x"),
    "random": ("#9aa3ab", ":", "+"),
    "released": ("#9aa3ab", "-.", "1"),
}
# What the tables call their methods.
COMPENSATED = {
    "spp_principal": "as cut, principal axes",
    "spp_principal_refit": "weights compensated",
    "spp_best": "**order and weights compensated**",
    "gauss_newton_refit": "one-shot Gauss-Newton, same axes and compensation",
}
RELEASED = {"spp": "**solpath, without labels**", "released": "released rule, with labels"}


def zoo_page(file: Path) -> None:
    """Draw every model that has results; the legend takes the place after the last one."""
    matplotlib.rcParams["svg.hashsalt"] = "solpath"
    measured = {model: read_runs(model) for model in PANELS}
    measured = {model: runs for model, runs in measured.items() if "spp" in runs}
    bands = len(measured) // COLUMNS + 1
    figure = Figure(figsize=(11.0, 4.9 * bands), layout="constrained")
    grid = figure.subplots(2 * bands, COLUMNS, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for i, (model, runs) in enumerate(measured.items()):
        band, column = divmod(i, COLUMNS)
        title, label = PANELS[model]
        _task(grid[2 * band, column], runs, label)
        _fidelity(grid[2 * band + 1, column], runs)
        grid[2 * band, column].set_title(title, fontsize=10, loc="left", fontweight="bold")
    band, column = divmod(len(measured), COLUMNS)
    lines = grid[0, 0].get_lines()
    grid[2 * band, column].legend(
        handles=lines[::-1], loc="upper left", frameon=False, fontsize=9, handlelength=3
    )
    figure.patch.set_facecolor("white")
    figure.savefig(file, metadata={"Date": None})


def zoo_table(compared: str) -> str:
    """A markdown row per model: solpath, and the best of the others at each size.

    Args:
        compared: ``task``, or ``fidelity`` for the distance to the dense model.
    """
    rows = [["model", "metric", *(f"{keep:.0%}" for keep in COMMON)], ["---"] * (2 + len(COMMON))]
    for model, (title, label) in PANELS.items():
        runs = read_runs(model)
        if "spp" not in runs:
            continue
        metric = headline(runs) if compared == "task" else fidelity(runs)
        best = min if metric == "kl" or label.startswith("bits") else max
        if compared == "fidelity":
            label, best = metric, min if metric == "kl" else max
        columns = {method: means(runs[method], metric) for method in runs}
        cells = []
        for index in (keeps(runs).index(keep) for keep in COMMON):
            rivals = [column[index] for method, column in columns.items() if method != "spp"]
            ours = columns["spp"][index]
            cells.append(f"**{ours:#.3g}** / {best(rivals):#.3g}" if rivals else f"**{ours:#.3g}**")
        if compared == "task":
            label += f", dense {runs['spp'][0]['dense'][metric]:#.3g}"
        rows.append([title, label, *cells])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def methods_table(kind: str, labels: Mapping[str, str], compared: str) -> str:
    """A markdown row per model and method.

    Args:
        kind: of the files ``<kind>_<model>.json``.
        labels: the methods, by the names that the table gives them.
        compared: ``task``, or ``fidelity`` for the distance to the dense model.
    """
    shares = [f"{keep:.0%}" for keep in COMMON]
    rows = [["model", "metric, seeds", "members", *shares], ["---"] * (3 + len(COMMON))]
    for model, (title, task) in {"minilm": ("MiniLM", ""), **PANELS}.items():
        runs = read_runs(model, kind)
        first = True
        for method, label in labels.items():
            if method in runs:
                metric = headline(runs) if compared == "task" else fidelity(runs)
                column = means(runs[method], metric)
                where = keeps(runs)
                cells = [shown(column[where.index(keep)], metric) for keep in COMMON]
                said = task if metric == "task" else metric
                seeds = f"{said}, {len(runs[method])}"
                rows.append([title if first else "", seeds if first else "", label, *cells])
                first = False
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _task(axes: Axes, runs: Runs, label: str) -> None:
    """The metric of the task, from the dense model on."""
    metric = headline(runs)
    dense = runs["spp"][0]["dense"][metric]
    x = [100.0] + [100 * keep for keep in keeps(runs)]
    for method in _order(runs):
        axes.plot(x, [dense, *means(runs[method], metric)], **_style(method))
    _finish(axes, x, label)


def _fidelity(axes: Axes, runs: Runs) -> None:
    """Distance to the dense model on a log scale; it is 0 at 100 %."""
    metric = fidelity(runs)
    for method in _order(runs):
        y = means(runs[method], metric)
        if metric == "cosine":
            y = [1 - value for value in y]
        axes.plot([100 * keep for keep in keeps(runs)], y, **_style(method))
    axes.set_yscale("log")
    ticks = [100.0] + [100 * keep for keep in keeps(runs)]
    _finish(axes, ticks, "KL to dense (nats)" if metric == "kl" else "1 − cosine to dense")
    axes.set_xlabel("prunable parameters kept (%)", fontsize=8)


def _order(runs: Runs) -> list[str]:
    """Methods with results, solpath last, so that it lies on top."""
    return [method for method in reversed(NAMES) if method in runs]


def _style(method: str) -> dict[str, Any]:
    label = NAMES[method].strip("*")
    if method == "spp":
        look = {"color": STRONG, "linewidth": 2.4, "marker": "o", "markersize": 4.5}
        return look | {"label": label, "zorder": 3}
    color, dashes, marker = STYLES[method]
    look = {"color": color, "linestyle": dashes, "marker": marker}
    return look | {"linewidth": 1.0, "markersize": 3.5, "label": label}


def _finish(axes: Axes, ticks: list[float], label: str) -> None:
    axes.set_axis_on()
    axes.set_xlim(103, min(ticks) - 3)
    axes.set_xticks(ticks, [f"{tick:.0f}" for tick in ticks])
    axes.tick_params(labelsize=8)
    axes.set_ylabel(label, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    zoo_page(RESULTS.parents[1] / "docs" / "zoo.svg")
