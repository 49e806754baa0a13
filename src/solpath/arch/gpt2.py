"""GPT-2: one `Conv1D` projects queries, keys and values together."""

from typing import Any

from torch import Tensor

from solpath.arch.table import Attention, Mlp, Stack
from solpath.nn.attention import attend, cached_states, heads_left, split_fused


def _forward(
    self: Any,
    hidden_states: Tensor,
    cache: Any = None,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    heads = heads_left(self, self.num_heads)
    width = len(self.c_proj.weight) // heads  # a Conv1D has inputs first
    query, key, value = split_fused(self.c_attn(hidden_states), heads, width)
    states, weights = attend(
        self,
        query,
        *cached_states(self, lambda _: (key, value), hidden_states, cache),
        attention_mask,
        scaling=self.scaling,
        dropout=self.attn_dropout.p,
        **kwargs,
    )
    return self.resid_dropout(self.c_proj(states)), weights


_STACK = Stack(
    blocks="h",
    attentions=(
        Attention(
            module="attn",
            query="attn.c_attn",
            key="attn.c_attn",
            value="attn.c_attn",
            output="attn.c_proj",
            forward=_forward,
            heads="num_heads",
            cached=True,
            by_head=True,
        ),
    ),
    mlps=(Mlp(left=("mlp.c_fc",), right="mlp.c_proj"),),
)
TABLES = {"gpt2": (_STACK,)}
