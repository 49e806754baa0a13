"""ALBERT: a few layers, each of which runs many times; a pair is that of all its runs."""

from typing import Any

from torch import Tensor

from solpath.arch.table import Attention, Mlp, Stack
from solpath.nn.attention import separate

_plain = separate("query", "key", "value", "dense", dropout="attention_dropout.p")


def _forward(
    self: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    states, weights = _plain(self, hidden_states, attention_mask, **kwargs)
    return self.LayerNorm(hidden_states + self.output_dropout(states)), weights


_ATTENTION = Attention(
    module="attention",
    query="attention.query",
    key="attention.key",
    value="attention.value",
    output="attention.dense",
    forward=_forward,
)
_MLP = Mlp(left=("ffn",), right="ffn_output")
TABLES = {"albert": (Stack("encoder.albert_layer_groups.*.albert_layers", (_ATTENTION,), (_MLP,)),)}
