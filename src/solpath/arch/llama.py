"""LLaMA, Mistral, Qwen2: rotary couples, grouped-query attention, gated MLP."""

from dataclasses import replace

from solpath.arch.table import Attention, Mlp, Stack
from solpath.nn.attention import rotary

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
_MISTRAL = replace(ATTENTION, forward=rotary("config.sliding_window"))
_QWEN2 = replace(ATTENTION, forward=rotary("sliding_window"))

TABLES = {
    "llama": (Stack("layers", (ATTENTION,), (MLP,)),),
    "mistral": (Stack("layers", (_MISTRAL,), (MLP,)),),
    "qwen2": (Stack("layers", (_QWEN2,), (MLP,)),),
}
