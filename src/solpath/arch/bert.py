"""BERT, RoBERTa, XLM-RoBERTa, CamemBERT, ELECTRA."""

from typing import Any

from torch import Tensor, nn

from solpath.arch.table import Architecture, Attention, Mlp
from solpath.nn.attention import attend, slim_class, split_heads


def _forward(
    self: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    past_key_values: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    heads = self.num_attention_heads
    query, key, value = (
        split_heads(layer, hidden_states, heads) for layer in (self.query, self.key, self.value)
    )
    if past_key_values is not None:
        cache = getattr(past_key_values, "self_attention_cache", past_key_values)
        key, value = cache.update(key, value, self.layer_idx)
    return attend(
        self,
        query,
        key,
        value,
        attention_mask,
        width=self.value.out_features // heads,
        dropout=self.dropout.p,
        **kwargs,
    )


def _slim_(attention: nn.Module, kept_qk: Tensor) -> None:
    attention.__class__ = slim_class(type(attention), _forward)


ARCHITECTURE = Architecture(
    blocks="encoder.layer",
    attention=Attention(
        module="attention.self",
        query="attention.self.query",
        key="attention.self.key",
        value="attention.self.value",
        output="attention.output.dense",
    ),
    mlp=Mlp(left=("intermediate.dense",), right="output.dense"),
    slim_=_slim_,
)
