"""How fast do decoders generate, dense and cut? First token, tokens per second, and the cache.

    python benchmarks/decoding.py --model FOLDER --gguf gemma-3-270m-q4_k_m.gguf
    python benchmarks/decoding.py                      # a Llama of 1.1 B parameters, random weights

All models are timed in one run, in turns: every prompt of random tokens is continued greedily by
the same number of tokens, with the key-value cache and without. Units leave by magnitude: the
widths are what matters here. A checkpoint in GGUF is read by transformers, as float32.
"""

from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer

from record import RESULTS, save, show
from solpath import baselines
from solpath.measuring.measurement import measure
from solpath.model.extraction import extract
from workloads import quiet, random_tokens

RANDOM = {"vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 5632}
RANDOM |= {"num_hidden_layers": 22, "num_attention_heads": 32, "num_key_value_heads": 4}


def load(model: str | None, gguf: str | None) -> Any:
    """The checkpoint, or a Llama of random weights in bfloat16."""
    if model is None:
        torch.manual_seed(0)
        config = transformers.LlamaConfig(**RANDOM, dtype=torch.bfloat16)
        return transformers.AutoModelForCausalLM.from_config(config).eval()
    options: dict[str, Any] = {"gguf_file": gguf} if gguf else {}
    return transformers.AutoModelForCausalLM.from_pretrained(model, **options).eval()


def main(
    model: Annotated[str | None, typer.Option(help="Folder or hub id; none: random.")] = None,
    gguf: Annotated[str | None, typer.Option(help="Name of a GGUF file in it.")] = None,
    name: Annotated[str, typer.Option(help="What the results call the model.")] = "llama 1.1B",
    sizes: Annotated[str, typer.Option(help="Sparsities, comma-separated.")] = "0.3,0.6",
    multiple: Annotated[int, typer.Option(help="multiple_of of the plans.")] = 8,
    samples: Annotated[int, typer.Option(help="Prompts at once.")] = 1,
    prompt: Annotated[int, typer.Option(help="Tokens per prompt.")] = 128,
    new: Annotated[int, typer.Option(help="New tokens.")] = 32,
    repeats: Annotated[int, typer.Option(help="Timed generations of each model.")] = 5,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
    device: Annotated[str, typer.Option(help="Where the models are.")] = "cpu",
    out: Annotated[Path, typer.Option(help="JSON to write.")] = RESULTS / "decoding.json",
) -> None:
    """Time a decoder and its members side by side."""
    torch.set_num_threads(threads)
    quiet()
    dense = load(model, gguf).to(device)
    [batch] = random_tokens(dense, samples, prompt)
    batch = {key: value.to(device) for key, value in batch.items()}
    path = baselines.magnitude(dense, [{key: value[:1] for key, value in batch.items()}])
    plans = {
        f"{size:.0%} removed": path.plan(sparsity=size, multiple_of=multiple)
        for size in map(float, sizes.split(","))
    }
    models = {"dense": dense} | {key: extract(dense, plan) for key, plan in plans.items()}
    measured = measure(models, batch, repeats=repeats, generate=new)
    first, results, rows = measured["dense"].generation, {}, []
    assert first is not None
    for key, found in measured.items():
        text = found.generation
        assert text is not None
        plan = plans.get(key)
        counted = path.costs.dense["cache"] if plan is None else plan.achieved.cache
        results[key] = {**found.to_dict(), "cache_per_token": counted}
        rows.append(
            [key, f"{found.params / 1e6:.0f} M", text.cached.ttft_ms, text.cached.tokens_per_s,
             text.uncached.tokens_per_s, text.cached.tokens_per_s / first.cached.tokens_per_s,
             text.cache_bytes]
        )  # fmt: skip
    columns = ["model", "parameters", "first token, ms", "tokens/s", "without cache", "÷ dense",
               "cache, bytes"]  # fmt: skip
    show(f"{name}: {prompt} + {new} tokens, {samples} at once", columns, rows)
    settings = {
        "model": name, "gguf": gguf, "sizes": sizes, "multiple": multiple, "samples": samples,
        "prompt": prompt, "new": new, "repeats": repeats, "dtype": str(dense.dtype),
    }  # fmt: skip
    save(out, settings, results, device=device)


if __name__ == "__main__":
    typer.run(main)
