"""What stock classes of transformers hold: every family and cut, loaded where solpath is absent.

    python benchmarks/stock_cuts.py
    python benchmarks/stock_cuts.py --cuts "whole heads,fewer heads"  # adds to the file

Plans are made for the tiny random models of the tests. "mlp" is one width of MLPs, "heads" one
width of heads and the same rotary couples everywhere, "both" is both, "dropped" lacks two
sublayers, and "uneven" is a random plan, held with ``pad=True``. Attentions that can lose whole
heads keep all but one of them in "whole heads", where a class has a field for their number, and
other numbers in every layer in "fewer heads", held with ``pad=True``. The difference is the largest
of any output, over its largest value, on random and on padded inputs. Every folder is loaded by the
lines of its card in an interpreter that cannot import solpath, and gives what the model gave here.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.progress import track
from safetensors.torch import load_file, save_file

import solpath
from record import RESULTS, save, show
from solpath.arch import lookup
from solpath.errors import SolpathError
from solpath.exporting.export import export
from solpath.exporting.parity import outputs_of
from solpath.model.discovery import find_pairs
from solpath.planning.plan import Plan
from solpath.running.forward import run
from solpath.running.provenance import provenance

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from conftest import CASES, build, inputs
from plans import HEADS, NO_MLP, heads_plan, stock_plan

TESTS = Path(__file__).resolve().parents[1] / "tests"
CUTS = ("mlp", "heads", "both", "dropped", "uneven", "whole heads", "fewer heads")
PADDED = ("uneven", "fewer heads")
ONE_HEAD = ("llama 1:6", "gemma", "qwen3", "bert one head", "wavlm")  # nothing to drop
BIAS = ("mt5", "t5", "t5 gated", "umt5")  # for every head, which the field does not know


def main(
    out: Annotated[Path, typer.Option(help="JSON to write.")] = RESULTS / "stock_cuts.json",
    only: Annotated[list[str] | None, typer.Option(help="Families; all if none is given.")] = None,
    cuts: Annotated[str, typer.Option(help="Cuts, comma-separated.")] = ",".join(CUTS),
) -> None:
    """Export every family at every cut, load all folders elsewhere, and print the table."""
    chosen = cuts.split(",")
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as home:
        for label in track(only or list(CASES), description="stock"):
            mine = [cut for cut in chosen if _tried(label, cut)]
            found[label] = {cut: _export(label, cut, Path(home) / label / cut) for cut in mine}
        _load_bare(found, Path(home))
    old = json.loads(out.read_text()) if out.exists() else {"results": {}, "runs": []}
    runs = [*old["runs"], {"cuts": chosen, "families": only or "all", **provenance("cpu")}]
    results: dict[str, dict[str, Any]] = old["results"]
    for label, cells in found.items():
        results[label] = results.get(label, {}) | cells
    rows = [[label, *(_cell(found.get(cut)) for cut in CUTS)] for label, found in results.items()]
    show("largest difference of a stock folder; * not loaded without solpath", ["", *CUTS], rows)
    cells = [cell for found in results.values() for cell in found.values()]
    held = [cell["difference"] for cell in cells if "difference" in cell]
    loaded = sum(cell.get("bare", False) for cell in cells)
    totals = {"tried": len(cells), "held": len(held), "loaded": loaded, "worst": max(held)}
    save(out, {}, results, **totals, runs=runs)


def _tried(label: str, cut: str) -> bool:
    """Return whether a family can have a cut."""
    if cut in ("heads", "both"):
        return label in HEADS
    if cut in ("whole heads", "fewer heads"):
        stacks = lookup(label.partition(" ")[0])
        able = all(table.by_head for stack in stacks for table in stack.attentions)
        fields = label in HEADS and label not in BIAS
        return able and label not in ONE_HEAD and (fields or cut == "fewer heads")
    return cut != "mlp" or label not in NO_MLP


def _plan(model: Any, label: str, cut: str) -> Plan:
    if cut == "fewer heads":
        return heads_plan(model, (1, 3, 2), (1.0, 0.5))
    if cut != "whole heads":
        return stock_plan(model, label, cut)
    counts = {pair.heads for pair in find_pairs(model) if pair.kind == "vo"}
    return heads_plan(model, [max(1, min(counts) - 1)])


def _export(label: str, cut: str, parent: Path) -> dict[str, Any]:
    parent.mkdir(parents=True)
    model = build(label)
    small = solpath.extract(model, _plan(model, label, cut))
    batch: Any = inputs(model)
    try:
        made = export(small, parent / "stock", "stock", batch=batch, pad=cut in PADDED)
    except SolpathError as error:
        return {"refused": str(error)}
    save_file(batch, parent / "inputs.safetensors")
    with torch.no_grad():
        expected = outputs_of(run(small, batch, labels=False))
    save_file({k: v.contiguous() for k, v in expected.items()}, parent / "expected.safetensors")
    return {"difference": max(row.difference for row in made.parity), "bytes": made.bytes}


def _load_bare(results: dict[str, dict[str, Any]], home: Path) -> None:
    """Note of every folder whether it loads without solpath and gives the same there."""
    cells = {
        home / label / cut: cell
        for label, found in results.items()
        for cut, cell in found.items()
        if "difference" in cell
    }
    folders = [str(parent / "stock") for parent in cells]
    command = [sys.executable, "-I", str(TESTS / "bare.py"), *folders]
    subprocess.run(command, check=False, capture_output=True)
    for parent, cell in cells.items():
        file = parent / "outputs.safetensors"
        found = load_file(file) if file.exists() else {}
        expected = load_file(parent / "expected.safetensors")
        cell["bare"] = all(
            name in found and float((found[name] - value).abs().max() / value.abs().max()) <= 1e-5
            for name, value in expected.items()
        )


def _cell(found: dict[str, Any] | None) -> str:
    if found is None:
        return ""
    if "refused" in found:
        return "refused"
    return f"{found['difference']:.0e}{'' if found['bare'] else ' *'}"


if __name__ == "__main__":
    typer.run(main)
