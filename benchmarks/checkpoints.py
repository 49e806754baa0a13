"""Pairs, costs, plans and extracted shapes of well-known checkpoints, without their weights.

    python benchmarks/checkpoints.py

Models are built on the meta device from `benchmarks/configs`, whose sizes are those the publishers
of the checkpoints give. Every layer is cut by the same share, so the table shows what a size is,
not where a search would put it. MACs are of one sample: an image, or 128 tokens. The key-value
cache is counted in bytes per token, all in bfloat16.
"""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

from record import RESULTS, save, show
from solpath.model.counting import count_costs
from solpath.model.discovery import find_pairs
from solpath.model.extraction import extract
from solpath.model.fingerprint import fingerprint
from solpath.planning.cost import Achieved
from solpath.planning.path import SolutionPath

CONFIGS = Path(__file__).resolve().parent / "configs"
SIZES = (0.0, 0.2, 0.4, 0.6, 0.75)
TOKENS = 128
IMAGES = {"clip", "deit", "swin"}


def main(out: Annotated[Path, typer.Option(help="JSON to write.")] = RESULTS / "checkpoints.json"):
    """Measure every checkpoint at five sizes and print the table."""
    results, rows, start = {}, [], time.perf_counter()
    for file in sorted(CONFIGS.glob("*.json")):
        begin = time.perf_counter()
        model = build(file)
        sizes = [size for size, _ in members(model)]
        results[file.stem] = {
            "class": type(model).__name__,
            "seconds": time.perf_counter() - begin,
            "sizes": [vars(size) for size in sizes],
        }
        for measure, unit in (("params", 1e6), ("macs", 1e9), ("cache", 1024)):
            values = [f"{getattr(size, measure) / unit:,.1f}" for size in sizes]
            rows.append([file.stem, measure, *values])
    seconds = time.perf_counter() - start
    columns = ["checkpoint", "measure", *(f"-{size:.0%}" for size in SIZES)]
    show(f"millions, billions, KiB per token ({seconds:.1f} s in all)", columns, rows)
    save(out, {"tokens": TOKENS, "sparsity": SIZES}, results, seconds=seconds)


def build(file: Path) -> nn.Module:
    """The model of a configuration file, on the meta device."""
    import transformers

    config = json.loads(file.read_text())
    cls = getattr(transformers, config["architectures"][0])
    with torch.device("meta"):
        model: nn.Module = cls(cls.config_class.from_dict(config))
    return model.to(torch.bfloat16).eval()


def sample(model: Any) -> dict[str, Tensor]:
    """One sample on the meta device."""
    config = model.config
    batch = {}
    if config.model_type in IMAGES:
        size = getattr(config, "vision_config", config).image_size
        batch["pixel_values"] = torch.empty(1, 3, size, size, dtype=model.dtype, device="meta")
    if config.model_type not in IMAGES - {"clip"}:
        length = min(TOKENS, config.get_text_config().max_position_embeddings)
        batch["input_ids"] = torch.ones(1, length, dtype=torch.int64, device="meta")
    return batch


def members(model: nn.Module) -> Iterator[tuple[Achieved, nn.Module]]:
    """What the plan of every size says, and the model cut to it."""
    pairs = find_pairs(model)
    score = {p.name: -torch.arange(p.width).double().expand(p.heads, -1) / p.width for p in pairs}
    energy = {p.name: torch.ones(p.heads, p.left[0].repeat + 1, p.width) for p in pairs if p.norms}
    costs = count_costs(model, pairs, sample(model))
    identity = fingerprint(model, pairs)
    path = SolutionPath(pairs, score, score, costs, "equal shares", {}, identity, energy=energy)
    for sparsity in SIZES:
        plan = path.plan(sparsity=sparsity)
        yield plan.achieved, extract(model, plan)


if __name__ == "__main__":
    typer.run(main)
