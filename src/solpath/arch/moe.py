"""Mixtral, Qwen2-MoE, Qwen3-MoE, GPT-OSS: experts in the place of MLPs, or beside them."""

from dataclasses import replace

from solpath.arch.llama import ATTENTION, MLP
from solpath.arch.qwen3 import ATTENTION as NORMED
from solpath.arch.table import Attention, Experts, Mlp, Stack
from solpath.nn.rotary import rotary

_SHARED = Mlp(
    left=("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj"),
    right="mlp.shared_expert.down_proj",
)
_SINKS = replace(ATTENTION, forward=rotary("sliding_window", sinks="sinks"))
_WINDOW = replace(ATTENTION, forward=rotary("config.sliding_window"))


def _stack(attention: Attention, kind: str, *mlps: Mlp) -> tuple[Stack]:
    return (Stack("layers", (attention,), mlps, (Experts("mlp.experts", kind),)),)


TABLES = {
    "gpt_oss": _stack(_SINKS, "GptOssExperts"),
    "mixtral": _stack(_WINDOW, "MixtralExperts"),
    "qwen2_moe": _stack(ATTENTION, "Qwen2MoeExperts", MLP, _SHARED),
    "qwen3_moe": _stack(NORMED, "Qwen3MoeExperts", MLP),
}
