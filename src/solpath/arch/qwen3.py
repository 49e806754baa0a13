"""Qwen3: LLaMA with norms over the heads of queries and keys."""

from dataclasses import replace

from solpath.arch import llama
from solpath.arch.table import Stack
from solpath.nn.rotary import rotary

ATTENTION = replace(
    llama.ATTENTION,
    forward=rotary("sliding_window"),
    norms=("self_attn.q_norm", "self_attn.k_norm"),
    norm_dim=-2,
)
TABLES = {"qwen3": (Stack("layers", (replace(ATTENTION, by_head=True),), (llama.MLP,)),)}
