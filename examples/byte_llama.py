"""Train a one-million-parameter stock LLaMA on the bytes of Python's standard library, on CPU.

The model is an unmodified `transformers.LlamaForCausalLM` over 256 byte tokens (grouped-query
attention with 6 query and 2 key-value heads, SwiGLU, RoPE, no biases). The text is the `.py`
files of the running interpreter, so nothing is downloaded; a tenth of the files is held out.

    python examples/byte_llama.py --out models/byte_llama

The folder gets `config.json`, `model.safetensors` and `train.json` (held-out bits per byte, seed,
versions, wall time). A batch is `{"input_ids": [B, 128] int64, "labels": [B, 128] int64}`.
"""

import functools
import hashlib
import json
import math
import platform
import sysconfig
import time
from pathlib import Path
from typing import Annotated

import torch
import transformers
import typer
from rich.progress import Progress
from transformers import LlamaConfig, LlamaForCausalLM

SKIPPED = {"site-packages", "test", "tests", "idlelib", "lib2to3", "ensurepip", "__pycache__"}


@functools.cache
def corpus(split: str) -> torch.Tensor:
    """Return the bytes of one split's files, one after the other, as a uint8 tensor.

    A file's split follows from the hash of its path, so "test" shares no file with "train".
    Some text still recurs across files: about 1 in 20 stretches of 128
    test bytes is also in "train" word for word.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split must be 'train' or 'test', not {split!r}")
    root = Path(sysconfig.get_path("stdlib"))
    text = bytearray()
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if SKIPPED.isdisjoint(relative.parts):
            held_out = hashlib.sha256(relative.as_posix().encode()).digest()[0] % 10 == 0
            if held_out == (split == "test"):
                text += path.read_bytes() + b"\n"
    return torch.frombuffer(text, dtype=torch.uint8)


def sequences(split: str, count: int, length: int = 128, seed: int = 0) -> torch.LongTensor:
    """Return `count` random stretches of `length` bytes of a split, [count, length]."""
    text = corpus(split)
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(text) - length + 1, (count, 1), generator=generator)
    return text[starts + torch.arange(length)].long()


def build() -> LlamaForCausalLM:
    """Return the untrained model."""
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=144,
        intermediate_size=360,
        num_hidden_layers=5,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=24,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config)


@torch.no_grad()
def bits_per_byte(model: LlamaForCausalLM, tokens: torch.Tensor, batch_size: int = 64) -> float:
    """Return the mean cost of a next byte, in bits, over `tokens`."""
    model.eval()
    total = 0.0
    for batch in tokens.split(batch_size):
        total += model(input_ids=batch, labels=batch).loss.item() * len(batch)
    return total / len(tokens) / math.log(2)


def main(
    out: Annotated[Path, typer.Option(help="Folder to save the model in.")],
    seed: Annotated[int, typer.Option(help="Seed of the weights and the batches.")] = 0,
    steps: Annotated[int, typer.Option(help="Training steps.")] = 4600,
    batch_size: Annotated[int, typer.Option(help="Sequences of 128 bytes in a step.")] = 8,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate.")] = 3e-3,
    bf16: Annotated[bool, typer.Option(help="Compute in bfloat16 where autocast can.")] = False,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
) -> None:
    """Train the byte LLaMA and save it."""
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    model = build().train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=learning_rate, betas=(0.9, 0.99), weight_decay=0.1, fused=True
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, learning_rate, total_steps=steps, pct_start=0.05, cycle_momentum=False
    )
    start = time.perf_counter()
    with Progress() as progress:
        task = progress.add_task("byte_llama", total=steps)
        for step in range(steps):
            batch = sequences("train", batch_size, seed=seed * steps + step + 1)
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                loss = model(input_ids=batch, labels=batch).loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            progress.advance(task)
            if (step + 1) % 250 == 0:
                progress.print(f"step {step + 1}: {loss.item() / math.log(2):.3f} bits per byte")
    report = {
        "test_bits_per_byte": bits_per_byte(model, sequences("test", 1024)),
        "train_bits_per_byte": bits_per_byte(model, sequences("train", 1024)),
        "parameters": sum(p.numel() for p in model.parameters()),
        "seed": seed,
        "steps": steps,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "wall_seconds": round(time.perf_counter() - start, 1),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    model.save_pretrained(out)
    (out / "train.json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    typer.run(main)
