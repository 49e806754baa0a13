"""RemBERT, Megatron-BERT, BigBird with full attention: BERT that computes attention itself."""

from dataclasses import replace
from typing import Any

from torch import Tensor

from solpath.arch.bert import ATTENTION, MLP
from solpath.arch.table import Stack
from solpath.nn.attention import cached_states, plain_attention, split_heads


def _forward(
    self: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    cache: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    heads = self.num_attention_heads

    def project(source: Tensor) -> tuple[Tensor, Tensor]:
        return split_heads(self.key, source, heads), split_heads(self.value, source, heads)

    return plain_attention(
        split_heads(self.query, hidden_states, heads),
        *cached_states(self, project, hidden_states, cache),
        () if attention_mask is None else (attention_mask,),
        self.attention_head_size**-0.5,
        self.dropout,
    )


_PLAIN = replace(ATTENTION, forward=_forward)
_FULL = replace(_PLAIN, kind="BigBirdSelfAttention")
TABLES = {
    "big_bird": (Stack("encoder.layer", (_FULL,), (MLP,)),),
    "megatron-bert": (Stack("encoder.layer", (_PLAIN,), (MLP,)),),
    "rembert": (Stack("encoder.layer", (_PLAIN,), (MLP,)),),
}
