"""A LLaMA and an OPT on the bytes of Python's standard library.

The text is the `.py` files of the running interpreter, so nothing is downloaded; a tenth of the
files is held out. A token is a byte. A batch is ``{"input_ids": [B, 128] int64}``.
"""

import functools
import hashlib
import math
import sysconfig
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM, PreTrainedModel

from recipe import Recipe

SKIPPED = {"site-packages", "test", "tests", "idlelib", "lib2to3", "ensurepip", "__pycache__"}


@functools.cache
def corpus(split: str) -> Tensor:
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


def data_digest() -> str:
    """Sixteen hex digits of the text, which differs between versions of Python."""
    parts = [corpus(split).numpy().tobytes() for split in ("train", "test")]
    return hashlib.sha256(b"".join(parts)).hexdigest()[:16]


def sequences(split: str, count: int, length: int = 128, seed: int = 0) -> torch.LongTensor:
    """Return `count` random stretches of `length` bytes of a split, [count, length]."""
    text = corpus(split)
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(text) - length + 1, (count, 1), generator=generator)
    return text[starts + torch.arange(length)].long()


@torch.no_grad()
def bits_per_byte(model: PreTrainedModel, tokens: Tensor, batch_size: int = 64) -> float:
    """Return the mean cost of a next byte, in bits, over `tokens`."""
    model.eval()
    total = 0.0
    for batch in tokens.split(batch_size):
        total += model(input_ids=batch, labels=batch).loss.item() * len(batch)
    return total / len(tokens) / math.log(2)


def scores(model: PreTrainedModel) -> dict[str, float]:
    """Bits per byte on 1024 stretches of either split."""
    return {
        "test_bits_per_byte": bits_per_byte(model, sequences("test", 1024)),
        "train_bits_per_byte": bits_per_byte(model, sequences("train", 1024)),
    }


def next_byte_loss(model: PreTrainedModel, draw: int, size: int) -> Tensor:
    """Cross-entropy of the next byte."""
    batch = sequences("train", size, seed=draw)
    return model(input_ids=batch, labels=batch).loss


TRAINING = {
    "data": data_digest,
    "steps": 4600,
    "batch_size": 8,
    "learning_rate": 3e-3,
    "optimizer": {"betas": (0.9, 0.99), "weight_decay": 0.1, "fused": True},
    "schedule": {"pct_start": 0.05, "cycle_momentum": False},
}

# Grouped queries: 6 query heads share 2 key-value heads.
LLAMA = Recipe(
    model=LlamaForCausalLM,
    config=LlamaConfig(
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
    ),
    loss=next_byte_loss,
    scores=scores,
    **TRAINING,
)
# Embeddings are narrower than the blocks, so there are project_in and project_out.
OPT = Recipe(
    model=OPTForCausalLM,
    config=OPTConfig(
        vocab_size=256,
        hidden_size=128,
        word_embed_proj_dim=96,
        ffn_dim=512,
        num_hidden_layers=5,
        num_attention_heads=4,
        max_position_embeddings=128,
        init_std=0.06,
        dropout=0.0,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    ),
    loss=next_byte_loss,
    scores=scores,
    **TRAINING | {"learning_rate": 1.5e-3},
)
