"""OLMo 2 and 3: one norm over all heads of the queries, one over all keys, which stay whole."""

from typing import Any

from torch import Tensor

from solpath.arch.llama import stacks
from solpath.nn.attention import attend, by_head, cached_states
from solpath.nn.rotary import rotate


def _forward(
    self: Any,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    attention_mask: Tensor | None = None,
    cache: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    heads = self.config.num_attention_heads
    kv_heads = heads // self.num_key_value_groups
    query = by_head(self.q_norm(self.q_proj(hidden_states)), heads)
    key = by_head(self.k_norm(self.k_proj(hidden_states)), kv_heads)
    value = by_head(self.v_proj(hidden_states), kv_heads)
    half = query.shape[-1] // 2
    cos, sin = (table[..., :half].unsqueeze(1) for table in position_embeddings)
    query, key = (rotate(states, cos, sin) for states in (query, key))
    if hasattr(self, "sliding_window"):
        kwargs["sliding_window"] = self.sliding_window
    states, weights = attend(
        self,
        query,
        *cached_states(self, lambda _: (key, value), hidden_states, cache),
        attention_mask,
        scaling=self.scaling,
        dropout=self.attention_dropout,
        **kwargs,
    )
    return self.o_proj(states), weights


TABLES = dict.fromkeys(("olmo2", "olmo3"), stacks(forward=_forward, rotary=False, qk=False))
