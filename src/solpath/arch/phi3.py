"""Phi-3 and Phi-4: LLaMA with fused projections; only some channels of a head may be rotated."""

from typing import Any

from torch import Tensor

from solpath.arch.llama import stacks
from solpath.arch.table import Mlp
from solpath.nn.attention import split_fused
from solpath.nn.rotary import rotary


def _project(self: Any, hidden: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
    heads = self.config.num_attention_heads
    width = self.o_proj.in_features // heads
    return split_fused(self.qkv_proj(hidden), heads, width, self.num_key_value_heads)


def _rotated(self: Any) -> int:
    return int(self.head_dim * self.config.rope_parameters.get("partial_rotary_factor", 1.0))


TABLES = {
    "phi3": stacks(
        Mlp(left=("mlp.gate_up_proj", "mlp.gate_up_proj"), right="mlp.down_proj"),
        query="self_attn.qkv_proj",
        key="self_attn.qkv_proj",
        value="self_attn.qkv_proj",
        forward=rotary("config.sliding_window", project=_project),
        rotated=_rotated,
    )
}
