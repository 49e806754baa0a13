"""BLOOM: one projection, head by head; logits biased by distance."""

from typing import Any

from torch import Tensor, nn

from solpath.arch.gpt_neox import MLP, attention
from solpath.arch.table import Stack
from solpath.nn.attention import cached_states, split_groups


def _forward(
    self: Any,
    hidden: Tensor,
    residual: Tensor,
    alibi: Tensor,
    attention_mask: Tensor | None = None,
    layer_past: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    width = self.dense.in_features // self.num_heads
    query, key, value = split_groups(self.query_key_value(hidden), self.num_heads, width)
    key, value = cached_states(self, lambda _: (key, value), hidden, layer_past)
    key = key[..., : query.shape[-1]]  # a cache keeps a column of a key without channels
    logits = query @ key.mT * self.inv_norm_factor
    logits = logits + alibi.view(-1, self.num_heads, 1, alibi.shape[-1])
    logits = logits if attention_mask is None else logits + attention_mask
    weights = self.attention_dropout(logits.float().softmax(-1).to(query.dtype))
    states = self.dense((weights @ value).transpose(1, 2).flatten(2))
    return residual + nn.functional.dropout(states, self.hidden_dropout, self.training), weights


_ATTENTION = attention(
    "self_attention", forward=_forward, heads="num_heads", unset=("slow_but_exact",)
)
TABLES = {"bloom": (Stack("h", (_ATTENTION,), (MLP,)),)}
