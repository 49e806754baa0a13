"""ViT and DeiT."""

from typing import Any

from torch import Tensor, nn

from solpath.arch.table import Architecture, Attention, Mlp
from solpath.nn.attention import attend, slim_class, split_heads


def _forward(
    self: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    heads = self.num_attention_heads
    output, weights = attend(
        self,
        split_heads(self.q_proj, hidden_states, heads),
        split_heads(self.k_proj, hidden_states, heads),
        split_heads(self.v_proj, hidden_states, heads),
        attention_mask,
        width=self.v_proj.out_features // heads,
        dropout=self.attention_dropout,
        **kwargs,
    )
    return self.o_proj(output), weights


def _slim_(attention: nn.Module, kept_qk: Tensor) -> None:
    attention.__class__ = slim_class(type(attention), _forward)


ARCHITECTURE = Architecture(
    blocks="layers",
    attention=Attention(
        module="attention",
        query="attention.q_proj",
        key="attention.k_proj",
        value="attention.v_proj",
        output="attention.o_proj",
    ),
    mlp=Mlp(left=("mlp.fc1",), right="mlp.fc2"),
    slim_=_slim_,
)
