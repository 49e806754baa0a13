"""Qwen3: LLaMA with norms over the heads of queries and keys."""

from dataclasses import replace

from solpath.arch.llama import ATTENTION, MLP
from solpath.arch.table import Stack
from solpath.nn.attention import rotary

_ATTENTION = replace(
    ATTENTION,
    forward=rotary("sliding_window"),
    norms=("self_attn.q_norm", "self_attn.k_norm"),
    norm_dim=-2,
)
TABLES = {"qwen3": (Stack("layers", (_ATTENTION,), (MLP,)),)}
