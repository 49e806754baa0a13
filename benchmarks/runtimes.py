"""Does less arithmetic take less time elsewhere? Cut over dense in onnxruntime and OpenVINO.

    pip install -e ".[demo,onnx,openvino]"
    python benchmarks/runtimes.py --path PATH_FOLDER

all-MiniLM-L6-v2 and its members, whose widths are multiples of 8, are exported, checked on random
and real texts, and timed in turns in one run: float32 in both runtimes, and int8 in onnxruntime.
Without ``--path`` a short search makes the path: the widths are what matters here.
"""

import statistics
import tempfile
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn

from record import RESULTS, save, show
from solpath.config import SearchConfig
from solpath.exporting import onnx_graphs, openvino_graphs
from solpath.exporting.export import FORMATS, Exported, export
from solpath.exporting.graphs import named
from solpath.exporting.onnx_graphs import INT8
from solpath.exporting.tracing import completed
from solpath.measuring.timing import interquartile_range, latencies
from solpath.model.counting import count_macs
from solpath.model.extraction import extract
from solpath.planning.path import SolutionPath
from solpath.running.forward import Batch
from solpath.searching.search import search
from workloads import random_tokens, workload

ONNX, OPENVINO = onnx_graphs.FILE, openvino_graphs.FILE
FILES = {"onnx": (ONNX,), "onnx int8": (named(ONNX, INT8),)}
FILES |= {"openvino": (OPENVINO, OPENVINO.replace(".xml", ".bin"))}


def main(
    path: Annotated[Path | None, typer.Option(help="Folder of a saved MiniLM path.")] = None,
    keeps: Annotated[str, typer.Option(help="Shares of prunable parameters kept.")] = ".8,.6,.4",
    size: Annotated[int, typer.Option(help="Samples per batch.")] = 8,
    length: Annotated[int, typer.Option(help="Tokens per sample.")] = 128,
    repeats: Annotated[int, typer.Option(help="Timed passes of each model.")] = 60,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
    steps: Annotated[int, typer.Option(help="Search steps without --path.")] = 60,
    out: Annotated[Path, typer.Option(help="JSON to write.")] = RESULTS / "runtimes.json",
) -> None:
    """Export and time dense and small all-MiniLM-L6-v2 side by side."""
    torch.set_num_threads(threads)
    work = workload("minilm", heldout=16)
    if path is None:
        config = SearchConfig(steps=steps)
        found = search(work.model, work.batches(0, 64, 16), config, progress=False)
    else:
        found = SolutionPath.load(path)
    models = {"dense": work.model}
    for keep in (float(part) for part in keeps.split(",")):
        plan = found.plan(sparsity=1 - keep, multiple_of=8, min_width=8)
        models[f"keep {keep:g}"] = extract(work.model, plan)
    [batch] = random_tokens(work.model, size, length)
    macs = {name: count_macs(model, batch) for name, model in models.items()}
    results: dict[str, Any] = {name: {"macs": macs[name]} for name in models}
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        written = {
            name: written_as(model, Path(folder) / name, work.heldout[0])
            for name, model in models.items()
        }
        for runtime in FILES:
            calls = {
                name: call(runtime, home(exported, runtime), batch, threads)
                for name, exported in written.items()
            }
            seconds = latencies(calls, repeats=repeats)
            for name, exported in written.items():
                row = summary(seconds[name], seconds["dense"], macs[name] / macs["dense"])
                row["bytes"] = sum(
                    (home(exported, runtime) / file).stat().st_size for file in FILES[runtime]
                )
                row["difference"] = differences(exported, runtime)
                results[name][runtime] = row
                cells = [row["ms"], macs[name] / macs["dense"], row["ratio"], row["over_macs"]]
                worst = f"{max(row['difference'].values()):.1e}"
                rows.append([f"{name}, {runtime}", *cells, row["bytes"] / 1e6, worst])
    columns = ["", "ms", "MACs ratio", "latency ratio", "quotient", "MB", "difference"]
    show(f"all-MiniLM-L6-v2, {size} x {length} tokens, {threads} threads", columns, rows)
    settings = {
        "model": "minilm",
        "size": size,
        "length": length,
        "threads": threads,
        "repeats": repeats,
        "runtimes": [form.runtime() for form in (FORMATS["onnx"], FORMATS["openvino"])],
        "path": {"method": found.method, "config": dict(found.config)},
    }
    save(out, settings, results)


def written_as(model: nn.Module, folder: Path, batch: Batch) -> dict[str, Exported]:
    return {
        "onnx": export(model, folder / "onnx", "onnx", batch=batch, int8=True),
        "openvino": export(model, folder / "openvino", "openvino", batch=batch),
    }


def home(exported: dict[str, Exported], runtime: str) -> Path:
    return exported[runtime.split()[0]].folder


def call(runtime: str, folder: Path, batch: Batch, threads: int) -> Any:
    """A function that runs the model of a folder on a batch."""
    kind = openvino_graphs.Graph if runtime == "openvino" else onnx_graphs.Graph
    graph = kind(folder / FILES[runtime][0], threads)
    full = completed(graph.inputs, batch)
    return lambda: graph(full)


def summary(seconds: list[float], dense: list[float], macs: float) -> dict[str, float]:
    """The median in ms, and what it is of the dense model's, and of what the MACs promise."""
    ratio = statistics.median(seconds) / statistics.median(dense)
    return {
        "ms": 1000 * statistics.median(seconds),
        "iqr_ms": 1000 * interquartile_range(seconds),
        "ratio": ratio,
        "macs_ratio": macs,
        "over_macs": ratio / macs,
    }


def differences(exported: dict[str, Exported], runtime: str) -> dict[str, float]:
    """Inputs to the largest difference from torch on them."""
    found: dict[str, float] = {}
    for row in exported[runtime.split()[0]].parity:
        inputs = row.inputs.removesuffix(", int8")
        if (inputs != row.inputs) == runtime.endswith("int8"):
            found[inputs] = max(found.get(inputs, 0.0), row.difference)
    return found


if __name__ == "__main__":
    typer.run(main)
