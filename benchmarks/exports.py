"""What runs where: every family in every format, cut, beside the original in the format's runtime.

    python benchmarks/exports.py
    python benchmarks/exports.py --only "llama,bert heads"  # adds to the file

Tiny random models of the tests, in which pairs keep a half, a quarter and three quarters of their
units in turn; for ``stock`` and ``gguf``, whose classes hold less, the plan for that target, by
magnitude. With "whole heads" attentions lose whole heads in place of units, and each layer keeps
another number, which ``stock`` fills up with zeros. The difference is the largest of any output
over its largest value: on random inputs and on padded ones, in the formats that are traced also
with other numbers of samples and tokens.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import track

import solpath
from record import RESULTS, save, show
from solpath import baselines
from solpath.errors import SolpathError
from solpath.exporting.export import FORMATS, export
from workloads import quiet

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from conftest import build, inputs
from plans import heads_plan, random_plan

FAMILIES = {
    "bert": "BERT",
    "vit": "ViT",
    "clip": "CLIP",
    "t5": "T5",
    "whisper": "Whisper",
    "gpt2": "GPT-2",
    "opt": "OPT",
    "llama": "LLaMA",
    "mistral": "Mistral",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "gemma3_text": "Gemma 3",
}
WIDER = {"num_attention_heads": 8, "num_key_value_heads": 4, "hidden_size": 48}  # heads to drop
GROUPED = ("llama", "mistral", "qwen2", "qwen3", "gemma3_text")
WHOLE = ("bert", "vit", "t5", "whisper", "gpt2", *GROUPED)
FAMILIES |= {f"{label} heads": f"{FAMILIES[label]}, whole heads" for label in WHOLE}
SHARES = (0.5, 0.25, 0.75)
DECI = ("llama", "mistral", "qwen2")  # with MLPs of several blocks of 32


def main(
    only: Annotated[str, typer.Option(help="Families, comma-separated.")] = ",".join(FAMILIES),
    formats: Annotated[str, typer.Option(help="Comma-separated.")] = ",".join(FORMATS),
    out: Annotated[Path, typer.Option(help="JSON to add to.")] = RESULTS / "exports.json",
) -> None:
    """Export, and add what came out to the results."""
    quiet()
    results: dict[str, dict[str, Any]] = (
        json.loads(out.read_text())["results"] if out.exists() else {}
    )
    labels, names = only.split(","), formats.split(",")
    for label in track(labels, description="exports"):
        for name in names:
            results.setdefault(FAMILIES[label], {})[name] = _export(label, name)
        save(out, {"shares": SHARES}, results)
    rows = [[label, *(_cell(row.get(name)) for name in names)] for label, row in results.items()]
    show("largest difference", ["", *names], rows)


def _export(label: str, name: str) -> dict[str, Any]:
    try:
        label, whole, _ = label.partition(" heads")
        changes: dict[str, Any] = WIDER if whole and label in GROUPED else {}
        if name == "gguf" and label in DECI:
            changes = changes | {"intermediate_size": 128, "sliding_window": None}
        model = build(label, **changes)
        batch = inputs(model)
        if whole:
            plan = heads_plan(model, (1, 3, 2), (1.0, 0.5))
        elif name in ("stock", "gguf"):
            path = baselines.magnitude(model, [batch])
            plan = path.plan(sparsity=0.2, for_=name)
        else:
            plan = random_plan(model, SHARES)
        small = solpath.extract(model, plan)
        options: dict[str, Any] = {"pad": True} if whole and name == "stock" else {}
        if name == "gguf" and "input_ids" in batch:  # it runs texts of one length
            batch, options = {"input_ids": batch["input_ids"]}, {"quantization": "f32"}
        with tempfile.TemporaryDirectory() as home:
            made = export(small, Path(home) / "out", name, batch=batch, **options)
    except SolpathError as error:
        return {"refused": str(error)}
    record = FORMATS[name]
    return {
        "difference": max(row.difference for row in made.parity),
        "tolerance": made.parity[0].tolerance,
        "runtime": record.runtime(),
        "batches": len({row.inputs for row in made.parity}),
        "bytes": made.bytes,
    }


def _cell(found: dict[str, Any] | None) -> str:
    if found is None:
        return ""
    return f"{found['difference']:.0e}" if "difference" in found else "refused"


if __name__ == "__main__":
    typer.run(main)
