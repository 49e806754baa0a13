"""The largest difference between masked and extracted models, over many random plans.

    python benchmarks/exactness.py

Plans are drawn for the tiny random models of the tests: every known architecture, awkward sizes,
every width of every pair from nothing to all, each head its own units. Timm's need timm.
"""

import sys
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.progress import track

from record import RESULTS, save, show
from solpath.model.extraction import extract
from solpath.model.masks import masked
from solpath.running.forward import forward

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from conftest import CASES, build, inputs
from plans import random_plan

DTYPES = {"float32": torch.float32, "float64": torch.float64}


def main(
    plans: Annotated[int, typer.Option(help="Plans of each model in each precision.")] = 40,
    out: Annotated[Path, typer.Option(help="JSON to write.")] = RESULTS / "exactness.json",
) -> None:
    """Draw, compare, and print the worst of every model."""
    results = {}
    for label in track(CASES, description="exactness"):
        errors = {name: _errors(label, dtype, plans) for name, dtype in DTYPES.items()}
        results[label] = {name: {"plans": plans, "worst": max(e)} for name, e in errors.items()}
    rows = [
        [label, *(f"{r[name]['worst']:.1e}" for name in DTYPES)] for label, r in results.items()
    ]
    worst = {name: max(r[name]["worst"] for r in results.values()) for name in DTYPES}
    rows.append(["worst", *(f"{worst[name]:.1e}" for name in DTYPES)])
    count = 2 * plans * len(CASES)
    show(f"largest |masked - cut| / largest |masked|, {count:,} plans", ["model", *DTYPES], rows)
    save(out, {"plans": plans}, results, plans=count, worst=worst)


def _errors(label: str, dtype: torch.dtype, plans: int) -> list[float]:
    errors = []
    for seed in range(plans):
        model = build(label, seed=seed % 5).to(dtype)
        generator = torch.Generator().manual_seed(seed)
        shares = torch.rand(7, generator=generator) * 1.4 - 0.2  # some pairs whole, some gone
        plan = random_plan(model, shares.clamp(0, 1).tolist(), seed)
        batch = inputs(model, seed=seed)
        with torch.no_grad():
            with masked(model, plan):
                expected = forward(model, batch)
            actual = forward(extract(model, plan), batch)
        errors.append(float((actual - expected).abs().max() / expected.abs().max()))
    return errors


if __name__ == "__main__":
    typer.run(main)
