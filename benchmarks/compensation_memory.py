"""What `compensate` keeps in memory: bytes a token at several depths, and the peak on a real model.

    python benchmarks/compensation_memory.py --before OLD/src --model gemma/

Bytes a token are the most that live tensors hold, of LLaMA-like models of random weights cut to
half: the difference between two numbers of tokens over the difference in tokens, so that weights do
not count. ``--before`` is the source folder of another version, such as a git worktree, that is
measured beside. The peak of the real model, in float32, is the resident size of a process that
compensates a member of half the prunable parameters on packed docstrings, the order by magnitude;
it is counted from after both models are there, and the tokenizer is not. With ``--limit`` that is
done again in a process that may not hold more (see `resident.limited`), in which the C library
gives freed blocks of a megabyte back to the system (`GIVES_BACK`). Linux only.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any

import torch
import typer
from torch import nn

from record import RESULTS, save, show
from resident import limited, resident
from solpath.baselines import magnitude
from solpath.data.docstrings import read_corpus
from solpath.data.text import text_batches
from solpath.measuring.evaluation import evaluate
from solpath.model.extraction import extract
from solpath.refining.compensation import compensate
from workloads import Batch, quiet, random_tokens

try:
    from solpath.running.memory import peak_memory
except ImportError:  # in the version that --before names
    from solpath.measuring.memory import peak_memory

DEPTHS = (4, 8, 16)
SIZE, LENGTH = 4, 32  # of a batch of random tokens
REAL_SIZE, REAL_LENGTH = 4, 128
GIVES_BACK = {"MALLOC_MMAP_THRESHOLD_": "1000000"}


def main(
    model: Annotated[Path | None, typer.Option(help="Folder of a decoder.")] = None,
    before: Annotated[Path | None, typer.Option(help="Source of another version.")] = None,
    tokens: Annotated[int, typer.Option(help="Tokens for the decoder.")] = 65_536,
    limit: Annotated[int, typer.Option(help="Bytes for a second run of the decoder.")] = 0,
    dtypes: Annotated[str, typer.Option(help="Of the decoder, comma-separated.")] = "float32",
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
    out: Annotated[Path, typer.Option(help="JSON to write.")] = RESULTS
    / "compensation_memory.json",
    worker: Annotated[str, typer.Option(hidden=True)] = "",
    smoke: Annotated[bool, typer.Option(help="Tiny settings: does it run?")] = False,
) -> None:
    """Measure bytes a token here and before, and the peak on a real model."""
    torch.set_num_threads(threads)
    if worker:
        assert model is not None or worker == "depths"
        result = (
            depths(DEPTHS[:2] if smoke else DEPTHS)
            if model is None
            else real(model, worker, tokens, limit)
        )
        print(json.dumps(result))
        return
    results: dict[str, Any] = {"now": _worker("depths", threads, smoke=smoke)}
    if before is not None:
        results["before"] = _worker("depths", threads, source=before, smoke=smoke)
    for dtype in dtypes.split(",") if model is not None else ():
        options = [f"--model={model}", f"--tokens={tokens}"]
        results[dtype] = _worker(dtype, threads, *options, smoke=smoke)
        if limit:
            options += [f"--limit={limit}"]
            results[f"{dtype}, limited"] = (
                _worker(dtype, threads, *options, variables=GIVES_BACK, smoke=smoke) | GIVES_BACK
            )
    rows = [
        [f"{version}, {depth} layers", value]
        for version in ("before", "now")
        for depth, value in results.get(version, {}).items()
    ]
    show("bytes a token", ["", "bytes"], rows)
    settings = {"tokens": tokens, "limit": limit, "threads": threads}
    settings |= {"size": REAL_SIZE, "length": REAL_LENGTH}
    save(out, settings | {"smoke": smoke}, results)


def depths(layers: tuple[int, ...]) -> dict[str, float]:
    """Bytes of live tensors a token, by depth."""
    return {str(depth): bytes_a_token(depth) for depth in layers}


def bytes_a_token(depth: int) -> float:
    """Bytes of live tensors that a further token costs at its peak, at one depth."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=176,
        num_hidden_layers=depth,
        num_attention_heads=4,
        tie_word_embeddings=True,
    )
    dense = LlamaForCausalLM(config).eval()
    batches = random_tokens(dense, SIZE, LENGTH, 128)
    small = extract(dense, magnitude(dense, batches[:1]).plan(sparsity=0.5))

    def peak(count: int) -> int:
        return peak_memory(lambda: compensate(small, dense, batches[:count], progress=False))[0]

    return (peak(128) - peak(64)) / (64 * SIZE * LENGTH)


def real(folder: Path, dtype: str, tokens: int, limit: int) -> dict[str, Any]:
    """Peak resident bytes and seconds of compensation, and what it gives on held-out text."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    quiet()
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    corpus = read_corpus()
    texts = [" ".join(pair) for pair in (*corpus.calibration, *corpus.search, *corpus.test)]
    count = tokens // (REAL_SIZE * REAL_LENGTH)
    packed = text_batches(texts, tokenizer, batch_size=REAL_SIZE, length=REAL_LENGTH, pack=True)
    batches = list(packed)[:-1]  # the last may be smaller
    if len(batches) < count + 2:
        raise SystemExit(f"the docstrings here make {len(batches)} batches, not {count + 2}.")
    chosen, heldout = batches[:count], batches[-2:]
    del tokenizer, corpus, texts, packed, batches
    dense: nn.Module = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    small = extract(dense, magnitude(dense, chosen[:1]).plan(sparsity=0.5))
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    start, found = time.perf_counter(), resident("VmRSS")
    with limited(limit) if limit else nullcontext("") as kind:
        better = compensate(small, dense, chosen, progress=False)
    seconds, peak = time.perf_counter() - start, resident("VmHWM")
    return {
        "parameters": sum(p.numel() for p in dense.parameters()),
        "tokens": count * REAL_SIZE * REAL_LENGTH,
        "seconds": seconds,
        "resident_before": found,
        "resident_peak": peak,
        "limit": kind,
        "kl": {"small": _kl(small, dense, heldout), "compensated": _kl(better, dense, heldout)},
    }


def _kl(small: nn.Module, dense: nn.Module, batches: list[Batch]) -> float:
    samples = [{k: v[i : i + 1] for k, v in b.items()} for b in batches for i in range(REAL_SIZE)]
    return float(evaluate(small, dense, samples).metrics["kl"])


def _worker(
    name: str,
    threads: int,
    *options: str,
    source: Path | None = None,
    variables: Mapping[str, str] = MappingProxyType({}),
    smoke: bool,
) -> Any:
    """What a fresh process prints, with the solpath of this folder or that of `source`."""
    environment = dict(os.environ) | dict(variables)
    if source is not None:
        environment["PYTHONPATH"] = str(source.resolve())
    arguments = [f"--worker={name}", f"--threads={threads}", *options]
    done = subprocess.run(
        [sys.executable, __file__, *arguments, *(["--smoke"] if smoke else [])],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    typer.run(main)
