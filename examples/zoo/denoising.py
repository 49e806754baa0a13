"""A T5 that restores spans of bytes cut out of Python's standard library.

Three spans, ten bytes in all, are cut out of 64. The encoder reads what is left, with a sentinel
for each span; the decoder says each sentinel and the span behind it. A batch is
``{"input_ids": [B, 57], "attention_mask": [B, 57], "decoder_input_ids": [B, 14]}``, int64.
"""

import itertools
import math

import torch
from torch import Tensor
from torch.nn import functional
from transformers import T5Config, T5ForConditionalGeneration

import stdlib_bytes
from recipe import Recipe

LENGTH, SPANS, CUT = 64, 3, 10
PAD, END, SENTINEL = 256, 257, 258  # after the bytes; sentinels are 258, 259, 260


def lengths(total: int, parts: int, generator: torch.Generator) -> list[int]:
    """Random lengths, each at least 1, that add up to `total`."""
    cuts = torch.randperm(total - 1, generator=generator)[: parts - 1].sort().values + 1
    ends = [0, *cuts.tolist(), total]
    return [end - start for start, end in itertools.pairwise(ends)]


def corrupt(tokens: list[int], generator: torch.Generator) -> tuple[list[int], list[int]]:
    """What the encoder reads, and what the decoder is to say."""
    kept, said = [], []
    gaps = lengths(LENGTH - CUT, SPANS + 1, generator)
    for i, span in enumerate(lengths(CUT, SPANS, generator)):
        kept += [*tokens[: gaps[i]], SENTINEL + i]
        said += [SENTINEL + i, *tokens[gaps[i] : gaps[i] + span]]
        tokens = tokens[gaps[i] + span :]
    return kept + tokens, [*said, END]


def examples(split: str, count: int, seed: int = 0) -> tuple[dict[str, Tensor], Tensor]:
    """`count` random examples: a batch without labels, and what is to be said [count, 14]."""
    text = stdlib_bytes.sequences(split, count, LENGTH, seed)
    generator = torch.Generator().manual_seed(seed)
    pairs = [corrupt(tokens, generator) for tokens in text.tolist()]
    inputs = torch.tensor([kept for kept, _ in pairs])
    said = torch.tensor([said for _, said in pairs])
    batch = {
        "input_ids": inputs,
        "attention_mask": torch.ones_like(inputs),
        "decoder_input_ids": functional.pad(said[:, :-1], (1, 0), value=PAD),
    }
    return batch, said


@torch.no_grad()
def bits_per_byte(
    model: T5ForConditionalGeneration, batch: dict[str, Tensor], said: Tensor
) -> float:
    """Mean cost of a cut byte, in bits, given the bytes before it; sentinels do not count."""
    model.eval()
    logits = model(**batch).logits
    wanted = said < PAD
    return functional.cross_entropy(logits[wanted], said[wanted]).item() / math.log(2)


@torch.no_grad()
def byte_accuracy(
    model: T5ForConditionalGeneration, batch: dict[str, Tensor], said: Tensor
) -> float:
    """Share of cut bytes that are most likely under the model, given the bytes before them."""
    model.eval()
    wanted = said < PAD
    right = model(**batch).logits.argmax(-1) == said
    return right[wanted].float().mean().item()


def scores(model: T5ForConditionalGeneration) -> dict[str, float]:
    """Bits per cut byte and accuracy on 1024 examples of held-out files, bits on training files."""
    test = examples("test", 1024)
    return {
        "test_bits_per_byte": bits_per_byte(model, *test),
        "test_accuracy": byte_accuracy(model, *test),
        "train_bits_per_byte": bits_per_byte(model, *examples("train", 1024)),
    }


def span_loss(model: T5ForConditionalGeneration, draw: int, size: int) -> Tensor:
    """Cross-entropy of everything that is to be said."""
    batch, said = examples("train", size, seed=draw)
    return functional.cross_entropy(model(**batch).logits.flatten(0, 1), said.flatten())


# Heads are wider than d_model / num_heads, and the MLP is gated.
T5 = Recipe(
    model=T5ForConditionalGeneration,
    config=T5Config(
        vocab_size=SENTINEL + SPANS,
        d_model=96,
        d_kv=32,
        num_heads=4,
        d_ff=256,
        num_layers=3,
        feed_forward_proj="gated-gelu",
        relative_attention_max_distance=64,
        dropout_rate=0.0,
        pad_token_id=PAD,
        decoder_start_token_id=PAD,
        eos_token_id=END,
    ),
    loss=span_loss,
    scores=scores,
    **stdlib_bytes.TRAINING | {"steps": 3500, "batch_size": 16},
)
