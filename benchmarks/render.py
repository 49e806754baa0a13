"""Write the result files into the docs: tables between markers, and the README's picture.

python benchmarks/render.py            # after any benchmark
python benchmarks/render.py --check    # fail if a page does not show what the files say
"""

import json
import re
import statistics
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from record import RESULTS
from solpath.figures import spread

ROOT = RESULTS.parents[1]
PAGES = [ROOT / "README.md", ROOT / "docs" / "benchmarks.md"]
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
STRONG = {"color": "#0b6e99", "linewidth": 2.6, "markersize": 5}
WEAK = {"color": "#68727b", "linewidth": 1.2, "markersize": 3}
# name of a table: result file, metric, rows
TABLES = {
    "minilm": ("quality_minilm", "cosine", NAMES),
    "digits": ("quality_digits", "task", NAMES),
    "digits_kl": ("quality_digits", "kl", NAMES),
    "llama": ("quality_llama", "task", NAMES),
    "ablation": ("ablation_digits", "kl", ABLATION),
}


def main(
    check: Annotated[bool, typer.Option(help="Change nothing; fail on a difference.")] = False,
):
    """Render every page."""
    for page in PAGES:
        text = page.read_text()
        new = re.sub(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", _fill, text, flags=re.S)
        if check and new != text:
            raise SystemExit(
                f"{page.name} does not show what benchmarks/results says; run render.py"
            )
        page.write_text(new)
    if not check:
        picture(ROOT / "docs" / "quality.svg")


def _fill(match: re.Match[str]) -> str:
    return f"{match[1]}{table(match[2])}\n{match[3]}"


def table(name: str) -> str:
    """One markdown table: a row per method, the mean over seeds of every size; or the costs."""
    if name == "costs":
        return _markdown([("what", "measured", "against", "aim", "script"), *costs()])
    file, metric, labels = TABLES[name]
    digits = 4 if metric == "kl" else 3
    runs = _runs(file, labels)
    keeps = [size["keep"] for size in runs["spp"][0]["sizes"]]
    rows = [["kept", *(f"{keep:.0%}" for keep in keeps)]]
    for method, label in labels.items():
        if method not in runs:
            continue
        columns = [_values(runs[method], metric, i) for i in range(len(keeps))]
        cells = [f"{statistics.fmean(column):.{digits}f}" for column in columns]
        if method == "spp":
            rows.append([label, *(f"**{cell}**" for cell in cells)])
            if len(columns[0]) > 1:
                extent = [
                    f"{min(column):.{digits}f}-{max(column):.{digits}f}" for column in columns
                ]
                rows.append(["… over seeds", *extent])
        else:
            rows.append([label, *cells])
    return _markdown(rows)


def costs() -> Iterator[tuple[str, str, str, str, str]]:
    """What the search, the files and the smaller models cost, mostly as ratios."""
    floor = "forward + backward to activations"
    for entry in _results("search_step"):
        shape = f"{entry['size']} × {entry['length']} tokens"
        time, memory = entry["time"], entry["memory"]
        peak, live = memory["resident"], memory["tensors"]["ratios_with_weights"]
        ratios = {
            f"search step, {shape}, cached targets": (time["cached"]["ratio"], "≤ 1.10 ×"),
            "… fresh targets": (time["fresh"]["ratio"], ""),
            "… peak memory of the process": (peak["cached"] / peak["floor"], "≤ 1.15 ×"),
            "… peak of live tensors and weights": (live["step"], ""),
        }
        for label, (ratio, aim) in ratios.items():
            yield label, _x(ratio), floor, aim, "search_step"
    family = _results("family_cost")
    rival = f"{len(family['iterative'])} runs of iterative"
    yield "5 sizes from one search", _x(family["ratio"]), rival, "≤ 0.30 ×", "family_cost"
    for name, entry in _results("latency").items():
        if name != "dense":
            macs = entry["macs_ratio"]
            against, aim = f"dense, with {macs:.2f} × its MACs", f"≤ {_x(1.15 * macs)}"
            label = f"latency of 8 × 128 tokens, {name}"
            yield label, _x(entry["latency_ratio"]), against, aim, "latency"
    ratios = _results("store_speed")["ratios"]
    for name, label, against, aim in (
        ("extract_save/copy", "extract and save", "copying the files, with fsync", "≤ 2.0 ×"),
        ("save/copy", "save", "copying the files, with fsync", ""),
        ("load/read", "load", "reading the files", "≤ 1.5 ×"),
        ("load_verified/read", "`load(verify=True)`", "reading the files", ""),
    ):
        yield label, _x(ratios[name]["median"]), against, aim, "store_speed"
    imports = _results("import_time")
    over, help_ = (f"{imports[key]:.2f} s" for key in ("import_over_torch", "help"))
    yield "`import solpath`", over, "`import torch`", "≤ 0.3 s", "import_time"
    yield "`solpath --help`", help_, "", "≤ 0.5 s", "import_time"


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    """The first row is the header."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])


def _results(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text())["results"]


def _x(ratio: float) -> str:
    return f"{ratio:.2f} ×"


def _runs(file: str, methods: Collection[str]) -> dict[str, list[dict[str, Any]]]:
    """Runs of every method there is, with the seeds that all of them have."""
    runs = json.loads((RESULTS / f"{file}.json").read_text())["runs"]
    found = {m: [run for run in runs if run["method"] == m] for m in methods}
    found = {method: chosen for method, chosen in found.items() if chosen}
    seeds = set.intersection(*({run["seed"] for run in chosen} for chosen in found.values()))
    return {m: [run for run in chosen if run["seed"] in seeds] for m, chosen in found.items()}


def _values(runs: list[dict[str, Any]], metric: str, index: int) -> list[float]:
    return [run["sizes"][index]["metrics"][metric] for run in runs]


def picture(file: Path) -> None:
    """Quality against size on the real model, all methods, as SVG."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams["svg.hashsalt"] = "solpath"
    figure = Figure(figsize=(7.2, 3.9), layout="constrained", facecolor="white")
    axes = figure.subplots()
    ends = []
    runs = _runs("quality_minilm", NAMES)
    keeps = [size["keep"] for size in runs["spp"][0]["sizes"]]
    for method, chosen in reversed(runs.items()):
        means = [statistics.fmean(_values(chosen, "cosine", i)) for i in range(len(keeps))]
        style = STRONG if method == "spp" else WEAK
        axes.plot([100, *(100 * keep for keep in keeps)], [1, *means], marker="o", **style)
        ends.append((means[-1], NAMES[method].strip("*"), style["color"]))
    axes.set(xlabel="prunable parameters kept (%)", ylabel="cosine to the dense embedding")
    axes.set(xlim=(101, 1), ylim=(0.15, 1.02), xticks=[100 * keep for keep in (1, *keeps)])
    ends.sort()
    places = spread([end for end, _, _ in ends], 0.047, *axes.get_ylim())
    for (end, label, colour), place in zip(ends, places, strict=True):
        axes.plot([100 * keeps[-1], 22], [end, place], color=colour, linewidth=0.4)
        weight = "bold" if colour == STRONG["color"] else "normal"
        axes.text(21.5, place, label, color=colour, va="center", fontsize=8.5, fontweight=weight)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, metadata={"Date": None})


if __name__ == "__main__":
    typer.run(main)
