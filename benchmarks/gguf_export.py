"""What a type of GGUF costs a cut model, run in llama.cpp: a small LLaMA on bytes of Python.

    pip install llama-cpp-python
    python benchmarks/gguf_export.py

The MLPs are cut, each layer to its own width, and the cut model is written in every type. Without
llama-cpp-python the files are run by the same graph in NumPy, and the result says so.
"""

import dataclasses
import math
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from transformers import LlamaConfig

from record import RESULTS, save, show
from solpath.config import SearchConfig
from solpath.exporting.export import export
from solpath.exporting.gguf import FORMAT
from solpath.model.extraction import extract
from solpath.searching.search import search

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "examples" / "zoo"))
import recipe  # noqa: E402
import stdlib_bytes  # noqa: E402

TYPES = ("f32", "f16", "q8_0", "q4_0")
SIZES = {"hidden_size": 128, "intermediate_size": 384, "num_attention_heads": 4, "head_dim": 32}


def main(
    steps: Annotated[int, typer.Option(help="Training steps of the model.")] = 250,
    heldout: Annotated[int, typer.Option(help="Held-out stretches of 128 bytes.")] = 64,
    sparsity: Annotated[float, typer.Option(help="Share of what can be pruned to remove.")] = 0.3,
    out: Annotated[Path, typer.Option(help="JSON to write.")] = RESULTS / "gguf_export.json",
) -> None:
    """Train, search, cut the MLPs, and compare logits and bits per byte of every type."""
    config = LlamaConfig(**stdlib_bytes.LLAMA.config.to_dict() | SIZES)
    small = dataclasses.replace(stdlib_bytes.LLAMA, config=config, steps=steps)
    model = recipe.fit(small, seed=0)
    train = stdlib_bytes.sequences("train", 256, seed=1)
    batches = [{"input_ids": part} for part in train.split(8)]
    path = search(model, batches, SearchConfig(steps=16, scale_batches=4), progress=False)
    plan = path.plan(sparsity=sparsity, multiple_of=32, min_width=32, protect=("*.attention.*",))
    cut = extract(model, plan).eval()
    test = stdlib_bytes.sequences("test", heldout)
    results: dict[str, Any] = {
        "runtime": FORMAT.runtime(),
        "widths": [width for name, width in plan.widths.items() if "mlp" in name],
        "dense": stdlib_bytes.bits_per_byte(model, test),
        "cut": stdlib_bytes.bits_per_byte(cut, test),
        "types": {kind: _measure(cut, kind, test) for kind in TYPES},
    }
    rows = [[kind, *row.values()] for kind, row in results["types"].items()]
    title = f"bits per byte: dense {results['dense']:.3f}, cut {results['cut']:.3f}"
    show(title, ["type", "difference", "bits per byte", "bytes"], rows)
    save(out, {"steps": steps, "heldout": heldout, "sparsity": sparsity}, results)


def _measure(model: Any, kind: str, test: Tensor) -> dict[str, float | int]:
    with tempfile.TemporaryDirectory() as folder:
        batch = {"input_ids": test[:8]}
        done = export(model, Path(folder) / "out", "gguf", batch=batch, quantization=kind)
        logits = FORMAT.open(done.folder)({"input_ids": test})["logits"]
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), test[:, 1:].flatten())
    return {
        "difference": max(row.difference for row in done.parity),
        "bits_per_byte": loss.item() / math.log(2),
        "bytes": done.bytes,
    }


if __name__ == "__main__":
    typer.run(main)
