"""Mixtral, Qwen2-MoE, Qwen3-MoE, GPT-OSS: experts stay whole, attentions and other MLPs do not."""

from dataclasses import replace

from solpath.arch.llama import ATTENTION, MLP
from solpath.arch.qwen3 import ATTENTION as NORMED
from solpath.arch.table import Attention, Mlp, Stack
from solpath.nn.rotary import rotary

_SHARED = Mlp(
    left=("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj"),
    right="mlp.shared_expert.down_proj",
)
_SINKS = replace(ATTENTION, forward=rotary("sliding_window", sinks="sinks"))
_WINDOW = replace(ATTENTION, forward=rotary("config.sliding_window"))


def _stack(attention: Attention, *mlps: Mlp) -> tuple[Stack]:
    return (Stack("layers", (attention,), mlps, experts=("mlp.experts",)),)


TABLES = {
    "gpt_oss": _stack(_SINKS),
    "mixtral": _stack(_WINDOW),
    "qwen2_moe": _stack(ATTENTION, MLP, _SHARED),
    "qwen3_moe": _stack(NORMED, MLP),
}
