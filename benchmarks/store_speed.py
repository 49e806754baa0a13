"""Time of saving against copying the same bytes, and of loading against reading them.

    python benchmarks/store_speed.py

Each repeat runs every measured action once, one after the other, on a fresh folder; the ratios are
medians of the ratios within a repeat, so that a slow moment of the disk counts for both.
"""

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer
from transformers import AutoModel

from record import RESULTS, save, show
from solpath.model.counting import count_costs
from solpath.model.discovery import find_pairs
from solpath.model.extraction import extract
from solpath.model.fingerprint import fingerprint
from solpath.planning.budget import Budget
from solpath.planning.constraints import Constraints
from solpath.planning.making import make_plan
from solpath.planning.plan import Plan
from solpath.storing import writing as store
from workloads import installed_minilm, quiet

PATHS = {"extract_save": "copy", "save": "copy", "load": "read", "load_verified": "read"}


def random_plan(model: torch.nn.Module, sparsity: float) -> Plan:
    pairs = find_pairs(model)
    generator = torch.Generator().manual_seed(0)
    score = {p.name: torch.rand(p.heads, p.width, generator=generator) for p in pairs}
    tokens = torch.ones(1, 32, dtype=torch.int64)
    costs = count_costs(model, pairs, {"input_ids": tokens, "attention_mask": tokens})
    return make_plan(
        pairs,
        score,
        costs,
        fingerprint(model, pairs),
        Budget("sparsity", sparsity),
        Constraints(),
        {},
        {},
    )


def copy_durably(source: Path, target: Path) -> None:
    """Copy the files of a folder in large blocks and flush them, as a save must."""
    target.mkdir()
    for file in source.iterdir():
        with file.open("rb") as reader, (target / file.name).open("wb") as writer:
            while block := reader.read(2**20):
                writer.write(block)
            writer.flush()
            os.fsync(writer.fileno())
    for folder in (target, target.parent):
        descriptor = os.open(folder, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def read(source: Path) -> None:
    for file in source.iterdir():
        with file.open("rb") as stream:
            stream.read()


def timed(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    result = action()
    seconds = time.perf_counter() - start
    del result
    return seconds


def spread(values: list[float]) -> dict[str, float]:
    low, middle, high = statistics.quantiles(values, n=4)
    return {"median": middle, "q1": low, "q3": high}


def main(
    model: Annotated[Path | None, typer.Option(help="Model folder; default MiniLM.")] = None,
    sparsity: Annotated[float, typer.Option(help="Of the extracted model.")] = 0.5,
    repeats: Annotated[int, typer.Option(help="Interleaved rounds.")] = 15,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
    out: Annotated[Path, typer.Option(help="JSON to write.")] = RESULTS / "store_speed.json",
) -> None:
    """Measure `save` and `load` against the floor of plain files."""
    torch.set_num_threads(threads)
    quiet()
    dense = AutoModel.from_pretrained(model or installed_minilm()).eval()
    plan = random_plan(dense, sparsity)
    small = extract(dense, plan)
    times: dict[str, list[float]] = {name: [] for name in ("copy", "read", *PATHS)}
    with tempfile.TemporaryDirectory() as parent:
        root = Path(parent)
        source = root / "source"
        store.save(small, source)
        size = sum(file.stat().st_size for file in source.iterdir())
        for i in range(repeats + 2):
            actions: dict[str, Callable[[], object]] = {
                "copy": lambda: copy_durably(source, root / "copied"),
                "save": lambda: store.save(small, root / "saved"),
                "extract_save": lambda: store.save(extract(dense, plan), root / "extracted"),
                "read": lambda: read(source),
                "load": lambda: store.load(source),
                "load_verified": lambda: store.load(source, verify=True),
            }
            order = list(actions) if i % 2 else list(reversed(actions))
            for name in order:
                seconds = timed(actions[name])
                if i >= 2:  # two rounds to warm up
                    times[name].append(seconds)
            for name in ("copied", "saved", "extracted"):
                for file in (root / name).iterdir():
                    file.unlink()
                (root / name).rmdir()
    ratios = {
        f"{name}/{base}": spread([a / b for a, b in zip(times[name], times[base], strict=True)])
        for name, base in PATHS.items()
    }
    seconds = {name: spread(values) for name, values in times.items()}
    rows = []
    for name, base in PATHS.items():
        pair = (1e3 * seconds[name]["median"], 1e3 * seconds[base]["median"])
        rows.append([f"{name} / {base}", *pair, ratios[f"{name}/{base}"]["median"]])
    show(f"{size / 2**20:.1f} MiB, {threads} threads", ["", "ms", "floor ms", "ratio"], rows)
    settings = {
        "model": "minilm" if model is None else str(model),
        "sparsity": plan.achieved.sparsity,
        "repeats": repeats,
        "threads": threads,
    }
    save(out, settings, {"bytes": size, "seconds": seconds, "ratios": ratios})


if __name__ == "__main__":
    typer.run(main)
