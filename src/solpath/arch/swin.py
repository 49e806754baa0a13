"""Swin: windows, relative position bias, stages of different widths."""

from typing import Any

from torch import Tensor

from solpath.arch.table import Attention, Mlp, Stack
from solpath.nn.attention import separate

_plain = separate("q_proj", "k_proj", "v_proj", "o_proj")


def _forward(
    self: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    bias = self.relative_position_bias()
    if attention_mask is not None:
        # [windows, tokens, tokens] -> [batch * windows, 1, tokens, tokens]
        batch = hidden_states.shape[0] // attention_mask.shape[0]
        bias = bias + attention_mask.unsqueeze(1).repeat(batch, 1, 1, 1)
    result: tuple[Tensor, Tensor | None] = _plain(self, hidden_states, bias, **kwargs)
    return result


_STACK = Stack(
    blocks="encoder.layers.*.blocks",
    attentions=(
        Attention(
            module="attention",
            query="attention.q_proj",
            key="attention.k_proj",
            value="attention.v_proj",
            output="attention.o_proj",
            forward=_forward,
        ),
    ),
    mlps=(Mlp(left=("mlp.fc1",), right="mlp.fc2"),),
)
TABLES = {"swin": (_STACK,)}
