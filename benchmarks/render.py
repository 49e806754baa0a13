"""Write the result files into the docs: tables between markers, and the README's picture.

python benchmarks/render.py            # after any benchmark
python benchmarks/render.py --check    # fail if a page does not show what the files say
"""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from choose_page import TABLES as CHOOSE
from language_page import language_table
from quality_runs import (
    ABLATION,
    BASES,
    BEST,
    NAMES,
    NORMS,
    PARTS,
    SHORT,
    Runs,
    fidelity,
    fidelity_of,
    headline,
    keeps,
    means,
    read_runs,
    shown,
    stored_runs,
    values,
)
from record import RESULTS
from scale_page import TABLES as SCALE
from solpath.reporting.charts import spread
from zoo_page import COMPENSATED, RELEASED, methods_table, zoo_page, zoo_table

ROOT = RESULTS.parents[1]
DOCS = ("index", "first-family", "choosing-a-size", "benchmarks", "runtimes", "zoo")
PAGES = [ROOT / "README.md", *(ROOT / "docs" / f"{page}.md" for page in DOCS)]
STRONG = {"color": "#0b6e99", "linewidth": 2.6, "markersize": 5}
WEAK = {"color": "#68727b", "linewidth": 1.2, "markersize": 3}


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
    """One markdown table.

    `name` is a model, for its headline metric, or ``<model>_fidelity``: a row per method, the mean
    over seeds of every size. ``zoo`` and ``zoo_fidelity`` have a row per model, ``zoo_compensated``
    one per model and closed form, ``ablation`` one per part that is switched off, ``best_<model>``
    one per closed-form method (``short_<model>``: of the best), ``parts_<model>`` one per part of
    the best that is switched off, ``speed_<model>`` one per member that was timed. Those of a real
    decoder, ``language...``, are in language_page.py, and `TABLES` has the others. ``tutorial`` is
    what the tutorial prints about its sizes, as text.
    """
    if name == "tutorial":
        lines = [line for line in _results("tutorial") if "parameters" in line]
        return "\n".join(["```text", *lines, "```"])
    if name.startswith("language"):
        found = language_table(name)
        return found if isinstance(found, str) else _markdown(found)
    if name in TABLES:
        return _markdown([*TABLES[name]()])
    if name in ("zoo", "zoo_fidelity"):
        return zoo_table("task" if name == "zoo" else "fidelity")
    if name == "zoo_compensated":
        return methods_table("compensated", COMPENSATED, "fidelity")
    if name == "released":
        return methods_table("released", RELEASED, "task")
    if name == "ablation":
        return _quality(read_runs("digits", "ablation"), "kl", ABLATION)
    if name.startswith("basis_"):
        model = name.removeprefix("basis_")
        runs = read_runs(model, "basis")
        if "spp" not in runs:  # along channels it is among the results of all methods
            seeds = {run["seed"] for run in runs["spp_principal"]}
            known = read_runs(model)["spp"]
            runs = {"spp": [run for run in known if run["seed"] in seeds], **runs}
        return _quality(runs, fidelity(runs), BASES)
    if name.startswith(("best_", "short_")):
        model = name.partition("_")[2]
        runs = read_runs(model, "compensated") | read_runs(model, "rivals")
        labels = BEST if name.startswith("best_") else {key: BEST[key] for key in SHORT}
        return _quality(runs, fidelity(runs), labels)
    if name.startswith("parts_"):
        model = name.removeprefix("parts_").removesuffix("_fidelity")
        runs = read_runs(model, "compensated", "parts")
        metric = fidelity(runs) if name.endswith("_fidelity") else headline(runs)
        return _quality(runs, metric, PARTS, extents=True)
    if name.startswith("speed_"):
        return _markdown([*speed(name.removeprefix("speed_"))])
    model = name.removesuffix("_fidelity")
    runs = read_runs(model)
    if "spp" not in runs:
        return f"Not measured: `python benchmarks/quality.py --model {model}`."
    return _quality(runs, headline(runs) if name == model else fidelity(runs), NAMES)


def _quality(runs: Runs, metric: str, labels: dict[str, str], *, extents: bool = False) -> str:
    digits = 4 if metric == "kl" else 3
    rows = [["kept", *(f"{keep:.0%}" for keep in keeps(runs))]]
    for method, label in labels.items():
        if method not in runs:
            continue
        cells = [f"{mean:.{digits}f}" for mean in means(runs[method], metric)]
        if extents:
            columns = [values(runs[method], metric, i) for i in range(len(cells))]
            half = [f"±{(max(column) - min(column)) / 2:.{digits}f}" for column in columns]
            cells = [f"{cell} {extent}" for cell, extent in zip(cells, half, strict=True)]
        if method != "spp":
            rows.append([label, *cells])
            continue
        columns = [values(runs[method], metric, i) for i in range(len(cells))]
        extent = [f"{min(column):.{digits}f}-{max(column):.{digits}f}" for column in columns]
        rows += [[label, *(f"**{cell}**" for cell in cells)], ["… over seeds", *extent]]
    return _markdown(rows)


def exactness() -> Iterator[Sequence[str]]:
    """The largest difference of a masked and a cut model in every precision."""
    record = json.loads((RESULTS / "exactness.json").read_text())
    yield "precision", f"worst of {record['plans']:,} plans"
    for dtype, error in record["worst"].items():
        yield dtype, f"{error:.1e}"


def exports() -> Iterator[Sequence[str]]:
    """The largest difference of every family in every format; a dash where it is refused."""
    found = _results("exports")
    formats = list(dict.fromkeys(name for row in found.values() for name in row))
    yield "family", *(f"`{name}`" for name in formats)
    for label, row in found.items():
        cells = [row.get(name, {}).get("difference") for name in formats]
        yield label, *("—" if cell is None else f"{cell:.0e}" for cell in cells)


def real_exports() -> Iterator[Sequence[str]]:
    """The largest difference of every checkpoint in every format, and the size of all files."""
    found = _results("real_exports")
    formats = list(dict.fromkeys(name for row in found.values() for name in row["formats"]))
    yield "model", "weights", "dense, MB", *(f"`{name}`" for name in formats)
    for label, row in found.items():
        cells = [row["formats"].get(name, {}) for name in formats]
        yield (
            label, row["weights"], f"{row['dense_bytes'] / 1e6:.1f}",
            *(
                "—" if "refused" in cell or not cell
                else f"{cell['difference']:.0e}, {cell['bytes'] / 1e6:.1f} MB"
                for cell in cells
            ),
        )  # fmt: skip


def runtimes() -> Iterator[Sequence[str]]:
    """What members take in other runtimes, and how near they are there."""
    yield "", "time, ms", "÷ dense", "MACs ÷ dense", "quotient", "file, MB", "difference"
    for name, member in _results("runtimes").items():
        for runtime, row in member.items():
            if runtime != "macs":
                yield (
                    f"{name}, {runtime}", f"{row['ms']:.1f}", f"{row['ratio']:.2f}",
                    f"{row['macs_ratio']:.2f}", f"{row['over_macs']:.2f}",
                    f"{row['bytes'] / 1e6:.1f}", f"{max(row['difference'].values()):.0e}",
                )  # fmt: skip


def constraint_cost() -> Iterator[Sequence[str]]:
    """Quality under constraints, and the share of the score that a plan keeps beside none."""
    found = _results("constraint_cost_minilm")
    keeps = list(next(iter(found.values())))
    yield "constraint", *(f"{float(keep):.0%}" for keep in keeps)
    for name, row in found.items():
        cells = []
        for keep in keeps:
            kept = row[keep].get("kept_score")
            value = "—" if "metrics" not in row[keep] else f"{row[keep]['metrics']['cosine']:.3f}"
            cells.append(value if kept is None else f"{value} ({kept:.0%})")
        yield name, *cells


def quantized() -> Iterator[Sequence[str]]:
    """Quality, time and size of members in numbers of few bits."""
    found = _results("quantized")
    yield "cosine; ms; MB", *found
    for kind in next(iter(found.values())):
        rows = (member[kind] for member in found.values())
        yield (
            kind,
            *(
                f"{row['metrics']['cosine']:.3f}; {row['ms']:.0f}; {row['bytes'] / 1e6:.0f}"
                for row in rows
            ),
        )


def costs() -> Iterator[tuple[str, str, str, str, str]]:
    """What the search, the files and the smaller models cost, mostly as ratios."""
    yield "what", "measured", "against", "aim", "script"
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
    cost = _results("compensation_cost")
    passes, script = "one forward pass of every model", "compensation_cost"
    yield "compensation of 5 sizes", _x(cost["over_forward_passes"]["together"]), passes, "", script
    for label, seconds, aim in (
        ("… each further size", cost["further_size"], "≤ 15 s"),
        ("… one size alone, keep 40%", cost["alone"], "≤ 15 s"),
        ("search and 5 compensated sizes", cost["family"], "≤ 600 s"),
    ):
        yield label, f"{seconds:.0f} s", "", aim, script
    yield from _compensation_memory()
    imports = _results("import_time")
    over, help_ = (f"{imports[key]:.2f} s" for key in ("import_over_torch", "help"))
    yield "`import solpath`", over, "`import torch`", "≤ 0.3 s", "import_time"
    yield "`solpath --help`", help_, "", "≤ 0.5 s", "import_time"


def _compensation_memory() -> Iterator[tuple[str, str, str, str, str]]:
    """Bytes a token at every depth, and the peak of a real model."""
    memory, script = _results("compensation_memory"), "compensation_memory"
    for depth, value in memory["now"].items():
        before = f"{memory['before'][depth] / 1e3:.1f} kB of version 8fab11b"
        label = f"memory of compensation, {depth} layers of width 64"
        yield label, f"{value / 1e3:.1f} kB a token", before, "", script
    for name in (name for name in ("float32", "float32, limited") if name in memory):
        real = memory[name]
        label = f"… {real['tokens']:,} tokens, {real['parameters'] / 1e6:.0f} M parameters, {name}"
        peak, models = (f"{real[f'resident_{when}'] / 1e9:.1f} GB" for when in ("peak", "before"))
        aim = "≤ 4 GB" if "limited" in name else ""
        yield label, peak, f"{models} with both models", aim, script


def qk_norm() -> Iterator[list[str]]:
    """Ways to treat norms over the heads."""
    results = _results("qk_norm")
    dense = results.pop("dense")["1.0"]
    first = next(iter(results.values()))
    yield [f"kept (dense {dense:.3f})", *(f"{float(keep):.0%}" for keep in first)]
    for way, sizes in results.items():
        yield [NORMS[way], *(f"{bits:.3f}" for bits in sizes.values())]


def checkpoints() -> Iterator[list[str]]:
    """Sizes of well-known checkpoints: parameters, MACs and key-value cache at each."""
    record = json.loads((RESULTS / "checkpoints.json").read_text())
    removed = [f"{share:.0%} removed" for share in record["settings"]["sparsity"][1:]]
    yield ["checkpoint", "", "dense", *removed]
    for name, entry in record["results"].items():
        for measure, label, unit in (
            ("params", "parameters, M", 1e6),
            ("macs", "MACs, G", 1e9),
            ("cache", "cache, KiB a token", 1024),
        ):
            numbers = [size[measure] / unit for size in entry["sizes"]]
            if any(numbers):
                yield [name, label, *(f"{n:,.0f}" if n >= 100 else f"{n:.1f}" for n in numbers)]
                name = ""


def latency_budget() -> Iterator[list[str]]:
    """Latency asked for and measured, of plans that were verified and of those that were not."""
    yield ["asked", "asked, ms", "verified plan, ms", "error", "table alone, ms", "error"]
    for name, entry in _results("latency_budget").items():
        row = [name, f"{entry['asked_ms']:.1f}"]
        for kind in ("verified", "table_alone"):
            row += [f"{entry[kind]['side_by_side_ms']:.1f}", f"{entry[kind]['error']:+.1%}"]
        yield row


def decoding() -> Iterator[list[str]]:
    """What members of a decoder take to generate."""
    yield ["model", "parameters", "bytes, MB", "first token, ms", "tokens per second, with cache",
           "without cache", "cache per token, KiB", "cache at the end, KiB"]  # fmt: skip
    for name, found in _results("decoding").items():
        text = found["generation"]
        cached, uncached = text["cached"], text["uncached"]
        yield [
            name, f"{found['params'] / 1e6:,.1f} M", f"{found['bytes_on_disk'] / 1e6:,.0f}",
            f"{cached['ttft_ms']:,.0f} ± {cached['ttft_iqr_ms'] / 2:,.0f}",
            f"{cached['tokens_per_s']:.1f} ± {cached['tokens_per_s_iqr'] / 2:.1f}",
            f"{uncached['tokens_per_s']:.1f} ± {uncached['tokens_per_s_iqr'] / 2:.1f}",
            f"{found['cache_per_token'] / 1024:.1f}", f"{text['cache_bytes'] / 1024:,.0f}",
        ]  # fmt: skip


def gpu() -> Iterator[list[str]]:
    """Models on a GPU: a step of the search, and members, against the dense model."""
    shares = ("0.2", "0.4", "0.6")
    members = [f"{float(share):.0%} removed: latency, MACs" for share in shares]
    yield ["model", "step, ms", "÷ forward and backward", "memory ÷ theirs", *members]
    for name, parts in _results("gpu").items():
        found = parts["search"]["results"]
        row = [name, f"{found['step_ms']:.0f}", _x(found["ratio"]), _x(found["memory_ratio"])]
        latency = parts.get("latency", {}).get("results", {})
        for share in shares:
            member = latency.get(f"sparsity {share}, multiples of 16")
            times = member and f"{_x(member['latency_ratio'])}, {_x(member['macs_ratio'])}"
            row.append(times or "")
        yield row


def speed(model: str) -> Iterator[list[str]]:
    """Members cut to a share of the parameters or of the latency: what they keep and take."""
    yield ["cut to", "method", "parameters", "MACs", "measured latency", "quality"]
    for method, result in _results(f"quality_latency_{model}").items():
        for name, member in result["members"].items():
            metrics = member["metrics"]
            quality = metrics.get("task", metrics["cosine"])
            shares = [f"{member[key]:.0%}" for key in ("keep", "macs_share", "latency")]
            yield [name, BEST[method], *shares, f"{quality:.3f}"]


def tuning() -> Iterator[list[str]]:
    """Fidelity of compensated members after some minutes of tuning."""
    limits = ("1", "3", "10")
    yield ["model", "kept", "metric", "before", *(f"{limit} min" for limit in limits), "won back"]
    for file in sorted(RESULTS.glob("tuning_*.json")):
        rows: dict[float, dict[str, Any]] = {}
        for run in stored_runs(file):
            rows.setdefault(run["settings"]["keep"], {})[f"{run['settings']['minutes']:g}"] = run
        for keep, runs in sorted(rows.items(), reverse=True):
            first = next(iter(runs.values()))
            metric = fidelity_of(first["dense"])
            cells = [shown(runs[t]["after"][metric], metric) if t in runs else "" for t in limits]
            shares = ", ".join(f"{runs[t]['share_won_back']:.0%}" for t in limits if t in runs)
            before = shown(first["before"][metric], metric)
            yield [first["settings"]["model"], f"{keep:.0%}", metric, before, *cells, shares]


def rates() -> Iterator[list[str]]:
    """Distance left after tuning at the default rate, and at multiples of its start."""
    rows = [(model, row) for model, rows in _results("rates").items() for row in rows]
    _, first = rows[0]
    names = [name for name in first["left"] if name != "default"]
    yield ["model", "kept", "steps", "default", *(f"{name} ×" for name in names)]
    for model, row in rows:
        left = [f"{row['left'][name]:.2f}" for name in ("default", *names)]
        yield [model, f"{row['keep']:.0%}", f"{row['steps']}", *left]


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    """The first row is the header."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])


def _results(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text())["results"]


def _x(ratio: float) -> str:
    return f"{ratio:.2f} ×"


def picture(file: Path) -> None:
    """Quality against size on the real model, all methods, as SVG."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams["svg.hashsalt"] = "solpath"
    figure = Figure(figsize=(7.2, 3.9), layout="constrained", facecolor="white")
    axes = figure.subplots()
    ends = []
    runs = read_runs("minilm")
    x = [100.0, *(100 * keep for keep in keeps(runs))]
    for method, label in reversed(NAMES.items()):
        if method in runs:
            y = [1.0, *means(runs[method], "cosine")]
            style = STRONG if method == "spp" else WEAK
            axes.plot(x, y, marker="o", **style)
            ends.append((y[-1], label.strip("*"), style["color"]))
    axes.set(xlabel="prunable parameters kept (%)", ylabel="cosine to the dense embedding")
    axes.set(xlim=(101, 1), ylim=(0.15, 1.02), xticks=x)
    ends.sort()
    places = spread([end for end, _, _ in ends], 0.047, *axes.get_ylim())
    for (end, label, colour), place in zip(ends, places, strict=True):
        axes.plot([x[-1], 22], [end, place], color=colour, linewidth=0.4)
        weight = "bold" if colour == STRONG["color"] else "normal"
        axes.text(21.5, place, label, color=colour, va="center", fontsize=8.5, fontweight=weight)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, metadata={"Date": None})


TABLES: dict[str, Callable[[], Iterator[Sequence[str]]]] = {
    **SCALE,
    **CHOOSE,
    "checkpoints": checkpoints,
    "constraint_cost": constraint_cost,
    "costs": costs,
    "decoding": decoding,
    "exactness": exactness,
    "exports": exports,
    "gpu": gpu,
    "latency_budget": latency_budget,
    "qk_norm": qk_norm,
    "quantized": quantized,
    "rates": rates,
    "real_exports": real_exports,
    "runtimes": runtimes,
    "tuning": tuning,
}

if __name__ == "__main__":
    typer.run(main)
