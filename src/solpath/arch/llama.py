"""LLaMA and the families that its `forward` runs: rotary couples, grouped queries, gated MLP."""

from dataclasses import replace
from typing import Any

from solpath.arch.table import Attention, Mlp, Stack
from solpath.nn.rotary import rotary, with_residual_dropout

ATTENTION = Attention(
    module="self_attn",
    query="self_attn.q_proj",
    key="self_attn.k_proj",
    value="self_attn.v_proj",
    output="self_attn.o_proj",
    forward=rotary(),
    heads="config.num_attention_heads",
    kv_heads="config.num_key_value_heads",
    rotary=True,
    cached=True,
)
MLP = Mlp(left=("mlp.gate_proj", "mlp.up_proj"), right="mlp.down_proj")


def stacks(mlp: Mlp = MLP, **changes: Any) -> tuple[Stack]:
    """Return LLaMA's blocks with some fields of their attention changed."""
    return (Stack("layers", (replace(ATTENTION, **changes),), (mlp,)),)


def _by_head(**changes: Any) -> tuple[Stack]:
    return stacks(by_head=True, **changes)


TABLES = {
    "eurobert": _by_head(cached=False),
    "gemma": _by_head(),
    "granite": _by_head(),
    "llama": _by_head(),
    "ministral": _by_head(forward=rotary("sliding_window")),
    "mistral": _by_head(forward=rotary("config.sliding_window")),
    "olmo": _by_head(unset=("config.clip_qkv",)),
    "qwen2": _by_head(forward=rotary("sliding_window")),
    "seed_oss": _by_head(forward=with_residual_dropout(rotary())),
    "smollm3": _by_head(forward=rotary("sliding_window", rotates=lambda self: self.use_rope)),
}
