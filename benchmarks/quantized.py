"""Cut and quantised: how near the dense model, how fast and how large members in few bits are.

    pip install -e ".[demo,onnx]" torchao
    python benchmarks/quantized.py

Members of all-MiniLM-L6-v2 from one search, nothing refitted, are quantised after cutting: by
torchao in eager torch and by onnxruntime, whose graph also takes torchao's weights. All are judged
against the dense float32 model on the held-out texts and timed in turns in one run. ``bytes`` are
those of the graph's files, or of the weights as a safetensors file would hold them. torchao's
kernels for int4 need a GPU, so int4 is held in bytes, one number each: its quality counts, its time
and size do not.
"""

import copy
import statistics
import tempfile
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn
from transformers.modeling_outputs import BaseModelOutput

from record import RESULTS, save, show
from solpath.config import SearchConfig
from solpath.exporting import onnx
from solpath.exporting.export import export
from solpath.exporting.graphs import named
from solpath.exporting.onnx_graphs import FILE, INT8
from solpath.exporting.onnx_graphs import Graph as OnnxGraph
from solpath.exporting.tracing import completed
from solpath.measuring.memory import bytes_on_disk
from solpath.measuring.timing import interquartile_range, latencies
from solpath.model.extraction import extract
from solpath.running.forward import Batch
from solpath.running.provenance import version_of
from solpath.searching.search import search
from workloads import random_tokens, workload

GROUP = 32  # numbers of int4 that share a scale; MLPs keep multiples of it
WIDTHS = {"qk": 8, "vo": 8, "mlp": GROUP}


class Graph(nn.Module):
    """A graph in onnxruntime that is called like the model."""

    def __init__(self, file: Path, threads: int) -> None:
        super().__init__()
        self.graph = OnnxGraph(file, threads)
        self.bytes = file.stat().st_size
        self.anchor = nn.Parameter(torch.empty(0))  # says which device

    def forward(self, input_ids: torch.Tensor, **more: torch.Tensor) -> BaseModelOutput:
        batch = completed(self.graph.inputs, {"input_ids": input_ids, **more})
        return BaseModelOutput(last_hidden_state=self.graph(batch)[0]["last_hidden_state"])


def main(
    keeps: Annotated[str, typer.Option(help="Shares of prunable parameters kept.")] = "1,.8,.6,.4",
    size: Annotated[int, typer.Option(help="Samples per timed batch.")] = 8,
    length: Annotated[int, typer.Option(help="Tokens per timed sample.")] = 128,
    repeats: Annotated[int, typer.Option(help="Timed passes of each model.")] = 15,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
    steps: Annotated[int, typer.Option(help="Search steps.")] = 60,
    heldout: Annotated[int | None, typer.Option(help="Held-out texts; all without it.")] = None,
    out: Annotated[Path, typer.Option(help="JSON to write.")] = RESULTS / "quantized.json",
) -> None:
    """Quantise, judge and time members of all-MiniLM-L6-v2."""
    torch.set_num_threads(threads)
    work = workload("minilm", heldout=heldout)
    judge, _ = work.judge()
    found = search(work.model, work.batches(0, 64, 16), SearchConfig(steps=steps), progress=False)
    [batch] = random_tokens(work.model, size, length)
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        models: dict[tuple[str, str], nn.Module] = {}
        for keep in keeps.split(","):
            name = f"keep {float(keep):g}"
            plan = found.plan(sparsity=1 - float(keep), multiple_of=WIDTHS, min_width=8)
            member = extract(work.model, plan) if float(keep) < 1 else work.model
            for kind, model in variants(member, Path(folder) / name, work.heldout[0], threads):
                models[name, kind] = model
                size_ = model.bytes if isinstance(model, Graph) else bytes_on_disk(model)
                row = {"bytes": size_, "metrics": judge(model)}
                results.setdefault(name, {})[kind] = row
                print(name, kind, size_, row["metrics"]["cosine"], flush=True)
        calls = {key: call(model, batch) for key, model in models.items()}
        with torch.inference_mode():
            seconds = latencies(calls, repeats=repeats)
    dense = statistics.median(seconds["keep 1", "float32"]) if "keep 1" in results else None
    rows = []
    for (name, kind), times in seconds.items():
        row = results[name][kind]
        row["ms"] = 1000 * statistics.median(times)
        row["iqr_ms"] = 1000 * interquartile_range(times)
        row["ratio"] = None if dense is None else statistics.median(times) / dense
        cells = [row["metrics"]["cosine"], row["ms"], row["ratio"], row["bytes"] / 1e6]
        rows.append([f"{name}, {kind}", *cells])
    title = f"all-MiniLM-L6-v2, {size} x {length} tokens, {threads} threads"
    show(title, ["", "cosine", "ms", "latency ratio", "MB"], rows)
    settings = {
        "model": "minilm",
        "size": size,
        "length": length,
        "threads": threads,
        "repeats": repeats,
        "heldout": heldout,
        "multiple_of": WIDTHS,
        "torchao": version_of("torchao"),
        "runtime": onnx.FORMAT.runtime(),
        "path": {"method": found.method, "config": dict(found.config)},
    }
    save(out, settings, results)


def variants(model: nn.Module, folder: Path, batch: Batch, threads: int) -> Any:
    """Yield the name and the model of every kind of numbers; the first is the model itself."""
    from torchao import quantization
    from torchao.quantization.granularity import PerGroup

    yield "float32", model
    file = export(model, folder / "onnx", "onnx", batch=batch, int8=True).folder / FILE
    yield "onnxruntime float32", Graph(file, threads)
    int8 = Path(named(str(file), INT8))
    yield "onnxruntime int8 dynamic", Graph(int8, threads)
    few = {
        "torchao int8 weights": quantization.Int8WeightOnlyConfig(),
        "torchao int8 dynamic": quantization.Int8DynamicActivationInt8WeightConfig(),
        "torchao int4 weights": quantization.IntxWeightOnlyConfig(
            weight_dtype=torch.int4, granularity=PerGroup(GROUP)
        ),
    }
    for name, settings in few.items():
        quantised = copy.deepcopy(model)
        quantization.quantize_(quantised, settings)
        yield name, quantised
        if name == "torchao int8 weights":
            eight = quantised
    file = export(eight, folder / "weights", "onnx", batch=batch).folder / FILE
    yield "onnxruntime, torchao int8 weights", Graph(file, threads)


def call(model: nn.Module, batch: Batch) -> Any:
    """A function that runs a model on a batch."""
    return lambda: model(**batch)


if __name__ == "__main__":
    typer.run(main)
