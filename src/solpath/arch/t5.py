"""T5, mT5, UMT5: relative position bias, no scaling, plain or gated MLP, cross attention."""

from typing import Any

import torch
from torch import Tensor

from solpath.arch.table import Attention, Mlp, Stack
from solpath.nn.attention import attend, cached_states, heads_left, split_heads
from solpath.nn.slim import Forward


def _forward(
    self: Any,
    hidden_states: Tensor,
    mask: Tensor | None = None,
    key_value_states: Tensor | None = None,
    position_bias: Tensor | None = None,
    cache: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor, Tensor | None]:
    cross = key_value_states is not None
    past = cache.get_seq_length(self.layer_idx) if cache is not None else 0
    past = past.clone() if isinstance(past, Tensor) else past

    heads = heads_left(self, self.n_heads)

    def project(source: Tensor) -> tuple[Tensor, Tensor]:
        return split_heads(self.k, source, heads), split_heads(self.v, source, heads)

    source = hidden_states if key_value_states is None else key_value_states
    key, value = cached_states(self, project, source, cache, cross=cross)
    if position_bias is None:
        tokens, keys = hidden_states.shape[1], key.shape[-2]
        if self.has_relative_attention_bias:
            position_bias = self.compute_bias(
                tokens, keys, device=hidden_states.device, past_seen_tokens=past
            )
        else:
            position_bias = torch.zeros(
                (1, self.n_heads, tokens, keys),
                device=hidden_states.device,
                dtype=hidden_states.dtype,
            )
    # All layers share the bias of the first, which has all heads.
    own_bias = position_bias if heads == self.n_heads else position_bias[:, self.kept_heads]
    states, weights = attend(
        self,
        split_heads(self.q, hidden_states, heads),
        key,
        value,
        mask,
        scaling=self.scaling,
        dropout=self.dropout,
        position_bias=own_bias,
        **kwargs,
    )
    return self.o(states), position_bias, weights


def _umt5(
    self: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    encoder_hidden_states: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Every layer has a bias of its own, so that none is handed on."""
    states, _, weights = _forward(
        self, hidden_states, attention_mask, encoder_hidden_states, **kwargs
    )
    return states, weights


def _attention(layer: str, name: str, cached: bool, forward: Forward) -> Attention:
    return Attention(
        module=layer,
        query=f"{layer}.q",
        key=f"{layer}.k",
        value=f"{layer}.v",
        output=f"{layer}.o",
        forward=forward,
        heads="n_heads",
        cached=cached,
        by_head=True,
        name=name,
    )


def _mlps(layer: str) -> tuple[Mlp, Mlp]:
    return (
        Mlp(left=(f"{layer}.wi",), right=f"{layer}.wo"),
        Mlp(left=(f"{layer}.wi_0", f"{layer}.wi_1"), right=f"{layer}.wo"),
    )


def _stacks(forward: Forward) -> tuple[Stack, Stack]:
    return (
        Stack(
            blocks="encoder.block",
            attentions=(_attention("layer.0.SelfAttention", "self_attention", False, forward),),
            mlps=_mlps("layer.1.DenseReluDense"),
        ),
        Stack(
            blocks="decoder.block",
            attentions=(
                _attention("layer.0.SelfAttention", "self_attention", True, forward),
                _attention("layer.1.EncDecAttention", "cross_attention", False, forward),
            ),
            mlps=_mlps("layer.2.DenseReluDense"),
        ),
    )


TABLES = {"mt5": _stacks(_forward), "t5": _stacks(_forward), "umt5": _stacks(_umt5)}
