"""ESM: rotary couples, or learned positions; queries are scaled before they are rotated."""

from dataclasses import replace
from typing import Any

from torch import Tensor

from solpath.arch.bert import ATTENTION, MLP
from solpath.arch.table import Stack
from solpath.nn.attention import attend, split_heads
from solpath.nn.rotary import rotate_kept


def _forward(
    self: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    encoder_hidden_states: Tensor | None = None,
    encoder_attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    layers, heads = (self.query, self.key, self.value), self.num_attention_heads
    query, key, value = (split_heads(layer, hidden_states, heads) for layer in layers)
    query = query * self.attention_head_size**-0.5
    if self.position_embedding_type == "rotary" and position_embeddings is not None:
        query, key = (rotate_kept(part, self.couples, position_embeddings) for part in (query, key))
    kwargs |= {"scaling": self.scaling, "dropout": self.dropout}
    return attend(self, query, key, value, attention_mask, **kwargs)


_ATTENTION = replace(ATTENTION, forward=_forward, rotary=True)
TABLES = {"esm": (Stack("encoder.layer", (_ATTENTION,), (MLP,)),)}
