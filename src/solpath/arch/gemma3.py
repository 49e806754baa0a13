"""Gemma 3: norms over heads, local and global rotary tables, with or without its vision tower."""

from dataclasses import replace

from solpath.arch.clip import tower
from solpath.arch.llama import ATTENTION, MLP
from solpath.arch.table import Stack
from solpath.nn.rotary import rotary

_ATTENTION = replace(
    ATTENTION,
    forward=rotary("sliding_window"),
    norms=("self_attn.q_norm", "self_attn.k_norm"),
    norm_dim=-3,
    by_head=True,
)


def _text(blocks: str) -> Stack:
    return Stack(blocks, (_ATTENTION,), (MLP,))


TABLES = {
    "gemma3": (_text("language_model.layers"), tower("vision_tower.encoder.layers")),
    "gemma3_text": (_text("layers"),),
}
