"""Whisper: encoder and decoder, self and cross attention, keys without bias."""

from typing import Any

from torch import Tensor

from solpath.arch.table import Attention, Mlp, Stack
from solpath.nn.attention import attend, cached_states, split_heads


def _forward(
    self: Any,
    hidden_states: Tensor,
    key_value_states: Tensor | None = None,
    past_key_values: Any = None,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    def project(source: Tensor) -> tuple[Tensor, Tensor]:
        key = split_heads(self.k_proj, source, self.num_heads)
        return key, split_heads(self.v_proj, source, self.num_heads)

    cross = key_value_states is not None
    source = hidden_states if key_value_states is None else key_value_states
    states, weights = attend(
        self,
        split_heads(self.q_proj, hidden_states, self.num_heads),
        *cached_states(self, project, source, past_key_values, cross=cross),
        attention_mask,
        scaling=self.scaling,
        dropout=self.dropout,
        **kwargs,
    )
    return self.out_proj(states), weights


def _attention(layer: str, name: str, cached: bool) -> Attention:
    return Attention(
        module=layer,
        query=f"{layer}.q_proj",
        key=f"{layer}.k_proj",
        value=f"{layer}.v_proj",
        output=f"{layer}.out_proj",
        forward=_forward,
        heads="num_heads",
        cached=cached,
        name=name,
    )


_MLPS = (Mlp(left=("fc1",), right="fc2"),)
TABLES = {
    "whisper": (
        Stack("encoder.layers", (_attention("self_attn", "self_attention", False),), _MLPS),
        Stack(
            "decoder.layers",
            (
                _attention("self_attn", "self_attention", True),
                _attention("encoder_attn", "cross_attention", False),
            ),
            _MLPS,
        ),
    )
}
