"""Smaller language models: search on C4, five sizes, tuned, perplexity of each on WikiText-2.

    python examples/recipes/language.py --out out/smollm
    accelerate launch examples/recipes/language.py --model Qwen/Qwen2.5-0.5B --out out/qwen

C4 is streamed from the Hub. `--data` and `--evaluation` also take a text file, one text per line,
or a folder with data files that `datasets` reads.
"""

import math
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from family import (
    SIZES,
    BatchSize,
    Data,
    Device,
    Heldout,
    Limit,
    Out,
    Samples,
    Seed,
    Sparsity,
    Steps,
    TuneSteps,
    load,
    make_family,
    start,
)
from torch import nn
from torch.nn import functional

from solpath import text_batches
from solpath.data.batches import Batches

C4, WIKITEXT = "allenai/c4:en", "Salesforce/wikitext:wikitext-2-raw-v1"


def read_texts(name: str, split: str, *, stream: bool) -> Any:
    """A text file as it is, or the data set ``name`` or ``name:configuration``."""
    if Path(name).is_file():
        return name
    from datasets import load_dataset

    folder, _, subset = name.partition(":")
    return load_dataset(folder, subset or None, split=split, streaming=stream)


def one_text(source: Any) -> str:
    """A file or data set as one long text, the usual way for perplexity."""
    if isinstance(source, str):
        return Path(source).read_text(encoding="utf-8")
    return "\n\n".join(source["text"])


@torch.no_grad()
def perplexity(model: nn.Module, batches: Batches) -> float:
    """Of the next token, within blocks."""
    model.eval()
    total = count = 0
    for batch in batches:
        ids = batch["input_ids"]
        logits = model(**batch, use_cache=False).logits[:, :-1].float()
        total += functional.cross_entropy(logits.mT, ids[:, 1:], reduction="sum").item()
        count += ids[:, 1:].numel()
    return math.exp(total / count)


def main(
    out: Out,
    model: Annotated[str, typer.Option(help="Causal LM.")] = "HuggingFaceTB/SmolLM2-135M",
    data: Annotated[str, typer.Option(help="Texts for search and tuning.")] = C4,
    evaluation: Annotated[str, typer.Option(help="Held-out texts.")] = WIKITEXT,
    length: Annotated[int, typer.Option(help="Tokens in a block.", min=2)] = 2048,
    sparsity: Sparsity = SIZES,
    steps: Steps = 200,
    tune_steps: TuneSteps = 500,
    batch_size: BatchSize = 8,
    samples: Samples = 512,
    heldout: Heldout = 64,
    limit: Limit = None,
    seed: Seed = 0,
    device: Device = None,
) -> None:
    """Make a family of smaller language models."""
    dense, tokenizer, place = load(model, device)
    common = {
        "batch_size": batch_size,
        "length": min(length, dense.config.max_position_embeddings),
        "seed": seed,
        "pack": True,
        "device": place,
    }
    texts = read_texts(data, "train", stream=True)
    blocks = text_batches(texts, tokenizer, limit=max(samples, tune_steps * batch_size), **common)
    text = one_text(read_texts(evaluation, "test", stream=False))
    judged = text_batches([text], tokenizer, limit=limit, **common)
    make_family(
        dense,
        Data(
            search=list(islice(blocks, math.ceil(samples / batch_size))),
            tune=blocks,
            heldout=list(text_batches([text], tokenizer, limit=heldout, **common)),
            score=lambda m: {"perplexity": perplexity(m, judged)},
        ),
        out,
        sparsity=sparsity,
        steps=steps,
        tune_steps=tune_steps,
        seed=seed,
        processor=tokenizer,
        about={"recipe": "language", "model": model, "data": data, "evaluation": evaluation},
    )


if __name__ == "__main__":
    start(main)
