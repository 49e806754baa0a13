"""Write the result files into the docs: tables between markers, and the README's picture.

python benchmarks/render.py            # after any benchmark
python benchmarks/render.py --check    # fail if a page does not show what the files say
"""

import json
import re
from pathlib import Path
from typing import Annotated, Any

import typer

from quality_runs import NAMES, fidelity, headline, keeps, means, read_runs, values
from record import RESULTS
from zoo_page import zoo_page, zoo_table

ROOT = RESULTS.parents[1]
PAGES = [ROOT / "README.md", ROOT / "docs" / "benchmarks.md", ROOT / "docs" / "zoo.md"]


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
        zoo_page(ROOT / "docs" / "zoo.svg")


def _fill(match: re.Match[str]) -> str:
    return f"{match[1]}{table(match[2])}\n{match[3]}"


def table(name: str) -> str:
    """One markdown table: a row per method, the mean over seeds of every size.

    `name` is a model, for its headline metric, or ``<model>_fidelity``. ``zoo`` and
    ``zoo_fidelity`` have a row per model, ``costs`` a row per cost.
    """
    if name == "costs":
        return costs()
    if name in ("zoo", "zoo_fidelity"):
        return zoo_table("task" if name == "zoo" else "fidelity")
    model = name.removesuffix("_fidelity")
    runs = read_runs(model)
    if "spp" not in runs:
        return f"Not measured: `python benchmarks/quality.py --model {model}`."
    metric = headline(runs) if name == model else fidelity(runs)
    digits = 4 if metric == "kl" else 3
    lines = ["| kept | " + " | ".join(f"{keep:.0%}" for keep in keeps(runs)) + " |"]
    lines.append("|---|" + "---|" * len(keeps(runs)))
    for method, label in NAMES.items():
        if method not in runs:
            continue
        cells = [f"{mean:.{digits}f}" for mean in means(runs[method], metric)]
        if method == "spp":
            cells = [f"**{cell}**" for cell in cells]
            columns = [values(runs[method], metric, i) for i in range(len(cells))]
            spread = [f"{min(c):.{digits}f}-{max(c):.{digits}f}" for c in columns]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    lines.insert(3, "| … over seeds | " + " | ".join(spread) + " |")
    return "\n".join(lines)


def costs() -> str:
    """What the search, the files and the smaller models cost, as ratios."""
    rows = [("what", "measured", "against", "script")]
    for entry in _results("search_step"):
        shape = f"{entry['batch_size']} × {entry['length']} tokens"
        floor = "forward + backward to activations"
        for mode, time in entry["time"].items():
            rows.append(
                (f"search step, {shape}, {mode} targets", _x(time["ratio"]), floor, "search_step")
            )
        peak = entry["memory"]["resident"]
        for mode in ("cached", "fresh"):
            label = f"peak memory of the process, {shape}, {mode} targets"
            rows.append((label, _x(peak[mode] / peak["floor"]), floor, "search_step"))
        live = entry["memory"]["tensors"]["ratios_with_weights"]["step"]
        rows.append((f"live tensors with weights, {shape}", _x(live), floor, "search_step"))
    family = _results("family_cost")
    rows.append(
        ("5 sizes from one search", _x(family["ratio"]), "5 runs of iterative", "family_cost")
    )
    for name, entry in _results("latency").items():
        if name != "dense":
            ratio = entry["latency_ratio"]
            label = f"latency, {name}, 8 × 128 tokens"
            rows.append((label, _x(ratio), f"dense (MACs {entry['macs_ratio']:.2f} ×)", "latency"))
    store = json.loads((RESULTS / "store_speed.json").read_text())["ratios"]
    against = {"copy": "copying the same bytes, with fsync", "read": "reading the same bytes"}
    for name, spread in store.items():
        action, base = name.split("/")
        label = action.replace("_", " ")
        rows.append((label, _x(spread["median"]), against[base], "store_speed"))
    imports = _results("import_time")
    over = f"{imports['import_over_torch']:.2f} s"
    rows.append(("`import solpath`", over, "over `import torch`", "import_time"))
    rows.append(("`solpath --help`", f"{imports['help']:.2f} s", "", "import_time"))
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|---|---|---|---|", *lines[1:]])


def _results(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text())["results"]


def _x(ratio: float) -> str:
    return f"{ratio:.2f} ×"


def picture(file: Path) -> None:
    """Quality against size on the real model, all methods."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams["svg.hashsalt"] = "solpath"
    runs = read_runs("minilm")
    figure = Figure(figsize=(7.2, 3.8), layout="constrained")
    axes = figure.subplots()
    for method, label in reversed(NAMES.items()):
        if method not in runs:
            continue
        x = [100.0] + [100 * keep for keep in keeps(runs)]
        y = [1.0, *means(runs[method], "cosine")]
        strong = method == "spp"
        axes.plot(
            x,
            y,
            color="#0b6e99" if strong else "#9aa3ab",
            linewidth=2.6 if strong else 1.3,
            marker="o",
            markersize=5 if strong else 3,
        )
        axes.annotate(
            label.strip("*"),
            (x[-1], y[-1]),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            fontsize=10 if strong else 8,
            fontweight="bold" if strong else "normal",
            color="#0b6e99" if strong else "#5b646c",
        )
    axes.invert_xaxis()
    axes.set_xlim(101, 8)
    axes.set_xticks(x)
    axes.set(xlabel="prunable parameters kept (%)", ylabel="cosine to the dense embedding")
    axes.spines[["top", "right"]].set_visible(False)
    figure.patch.set_facecolor("white")
    figure.savefig(file, metadata={"Date": None})


if __name__ == "__main__":
    typer.run(main)
