"""What cutting under a norm over the heads costs: a small Qwen3, and four ways to treat its norms.

    python benchmarks/qk_norm.py

Only query-key units are cut, everything else stays dense. With the norm of the dense head out of
reach for the cut model, the product of query and key changes its size; "folded" is what the library
does. "Dense norm" cannot be extracted and is what folding approximates.
"""

import contextlib
import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor, nn
from transformers import Qwen3Config, Qwen3ForCausalLM

from quality_runs import NORMS
from record import RESULTS, save, show
from solpath.model.masks import masked
from solpath.planning.path import SolutionPath
from solpath.planning.plan import Plan
from solpath.searching.search import search

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "examples" / "zoo"))
import recipe  # noqa: E402
import stdlib_bytes  # noqa: E402

KEEPS = (0.8, 0.6, 0.4, 0.25)


def main(
    steps: Annotated[int, typer.Option(help="Training steps of the model.")] = 1000,
    heldout: Annotated[int, typer.Option(help="Held-out stretches of 128 bytes.")] = 256,
    out: Annotated[Path, typer.Option(help="JSON to write.")] = RESULTS / "qk_norm.json",
) -> None:
    """Train, search once, cut the query-key pairs alone, and compare bits per byte."""
    model = recipe.fit(qwen3(steps), seed=0)
    test = stdlib_bytes.sequences("test", heldout)
    train = stdlib_bytes.sequences("train", 1024, seed=1)
    path = search(model, [{"input_ids": part} for part in train.split(16)], progress=False)
    results = {"dense": {"1.0": stdlib_bytes.bits_per_byte(model, test)}}
    for way in NORMS:
        results[way] = {str(keep): _cut(model, path, keep, way, test) for keep in KEEPS}
    rows = [[label, *(results[way][str(keep)] for keep in KEEPS)] for way, label in NORMS.items()]
    dense = results["dense"]["1.0"]
    show(f"bits per byte, dense {dense:.3f}", ["norm", *(f"keep {k:.0%}" for k in KEEPS)], rows)
    save(out, {"steps": steps, "heldout": heldout}, results)


def qwen3(steps: int) -> recipe.Recipe:
    """The zoo's LLaMA with norms over its heads."""
    sizes = stdlib_bytes.LLAMA.config.to_dict()
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim")
    names += ("num_attention_heads", "num_key_value_heads", "max_position_embeddings")
    config = Qwen3Config(**{name: sizes[name] for name in names}, tie_word_embeddings=False)
    return dataclasses.replace(
        stdlib_bytes.LLAMA, model=Qwen3ForCausalLM, config=config, steps=steps
    )


def _cut(model: nn.Module, path: SolutionPath, keep: float, way: str, test: Tensor) -> float:
    """Bits per byte with `keep` of the query-key units, everything else whole."""
    others = [pair.name for pair in path.pairs if pair.kind != "qk"]
    pairs = [pair for pair in path.pairs if pair.kind == "qk"]
    share = sum(pair.units * pair.cost for pair in pairs) / path.costs.prunable(path.pairs)
    plan = path.plan(sparsity=(1 - keep) * share, protect=others)
    if way == "plain":
        ratio = {p.name: plan.widths[p.name] / p.width for p in pairs}
        plan = dataclasses.replace(
            plan, gains={name: torch.full_like(g, ratio[name]) for name, g in plan.gains.items()}
        )
    elif way == "dense_width":
        plan = dataclasses.replace(
            plan, gains={name: torch.ones_like(gain) for name, gain in plan.gains.items()}
        )
    with _dense_norm(model, plan) if way == "dense_norm" else masked(model, plan):
        return stdlib_bytes.bits_per_byte(model, test)


@contextlib.contextmanager
def _dense_norm(model: nn.Module, plan: Plan) -> Iterator[None]:
    """Mask the queries after their norm, ``[batch, tokens, heads, head_dim]``."""
    handles = []
    for pair in plan.pairs:
        if pair.norms:
            mask = plan.masks()[pair.name].view(pair.heads, pair.width)
            mask = mask.repeat(1, pair.channels).repeat_interleave(pair.left[0].repeat, 0)
            norm = model.get_submodule(pair.norms[0].module)
            handles.append(
                norm.register_forward_hook(lambda m, a, output, mask=mask: output * mask)
            )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


if __name__ == "__main__":
    typer.run(main)
