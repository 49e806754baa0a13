"""MPNet: one relative position bias for all layers."""

from typing import Any

from torch import Tensor

from solpath.arch.bert import MLP
from solpath.arch.table import Attention, Stack
from solpath.nn.attention import plain_attention, split_heads


def _forward(
    self: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    position_bias: Tensor | None = None,
    output_attentions: bool = False,
    **kwargs: Any,
) -> tuple[Tensor, ...]:
    query, key, value = (
        split_heads(layer, hidden_states, self.num_attention_heads)
        for layer in (self.q, self.k, self.v)
    )
    bias = [part for part in (position_bias, attention_mask) if part is not None]
    scaling = self.attention_head_size**-0.5
    states, weights = plain_attention(query, key, value, bias, scaling, self.dropout)
    return (self.o(states), weights) if output_attentions else (self.o(states),)


_ATTENTION = Attention(
    module="attention.attn",
    query="attention.attn.q",
    key="attention.attn.k",
    value="attention.attn.v",
    output="attention.attn.o",
    forward=_forward,
)
TABLES = {"mpnet": (Stack("encoder.layer", (_ATTENTION,), (MLP,)),)}
