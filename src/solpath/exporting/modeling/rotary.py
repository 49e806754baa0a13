"""Attention with rotary couples, grouped queries, and widths of its own in every layer."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from solpath.exporting.modeling.common import (
    CutModel,
    by_head,
    check_whole,
    dense,
    dense_sizes,
    padded,
    resize,
)


class CutDecoder(CutModel):
    """Comes before a stock class of decoders."""

    attention_class: Any

    def cut_layers(self, config: Any) -> None:
        """Exchange the attentions and MLPs."""
        decoder: Any = self.base_model  # type: ignore[attr-defined]
        decoder.rotary_emb.config = dense(config)
        for index, layer in enumerate(decoder.layers):
            layer.self_attn = self.attention_class(config, index)
            hidden, neurons = config.hidden_size, config.per_layer_config[index].intermediate_size
            resize(layer.mlp, "gate_proj", hidden, neurons)
            resize(layer.mlp, "up_proj", hidden, neurons)
            resize(layer.mlp, "down_proj", neurons, hidden)


class CutRotaryAttention:
    """Comes before a stock class of attentions.

    A head has `query_key_dim` channels in queries and keys, and `value_dim` in values. Either may
    be 0. They are padded with zeros to one width that kernels take, the `head_dim` of the layer,
    but not in the cache of transformers.
    """

    eager: Any  # the attention function of the stock class
    sliding_window: int | None = None

    def __init__(self: Any, config: Any, layer_idx: int) -> None:
        with dense_sizes(config):
            super().__init__(config, layer_idx)  # type: ignore[call-arg]
        layer = config.per_layer_config[layer_idx]
        self.heads, self.kv_heads = layer.num_attention_heads, layer.num_key_value_heads
        self.query_key_dim, self.value_dim = layer.query_key_dim, layer.value_dim
        self.head_dim = layer.head_dim
        hidden, queries = layer.hidden_size, self.heads * self.query_key_dim
        resize(self, "q_proj", hidden, queries)
        resize(self, "k_proj", hidden, self.kv_heads * self.query_key_dim)
        resize(self, "v_proj", hidden, self.kv_heads * self.value_dim)
        resize(self, "o_proj", self.heads * self.value_dim, hidden)
        # Which couples of the dense head each key-value head keeps: read from the weights.
        couples = torch.zeros(self.kv_heads, self.query_key_dim // 2, dtype=torch.int64)
        self.register_buffer("couples", couples, persistent=self.query_key_dim > 0)

    def normed(self: Any, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Norm the heads of queries and keys, where the family does."""
        return query, key

    def forward(
        self: Any,
        hidden_states: Tensor,
        position_embeddings: Any = None,
        attention_mask: Tensor | None = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Do what the stock class does, in fewer channels."""
        cache = kwargs.pop("past_key_values", cache)  # its name before transformers 5.24
        check_whole(self)
        query = by_head(self.q_proj(hidden_states), self.heads, self.query_key_dim)
        key = by_head(self.k_proj(hidden_states), self.kv_heads, self.query_key_dim)
        value = by_head(self.v_proj(hidden_states), self.kv_heads, self.value_dim)
        if self.query_key_dim:
            query, key = self.normed(query, key)
            query, key = rotated(query, key, self.couples, position_embeddings)
        if cache is not None:  # which takes keys without channels for an empty sequence
            key = padded(key, max(self.query_key_dim, 1))
            key, value = cache.update(key, value, self.layer_idx)
        attention_interface = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, self.eager
        )
        output, weights = attention_interface(
            self,
            padded(query, self.head_dim),
            padded(key, self.head_dim),
            padded(value, self.head_dim),
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            **kwargs,
        )
        output = output.reshape(*hidden_states.shape[:-1], self.heads, self.head_dim)
        return self.o_proj(output[..., : self.value_dim].flatten(-2)), weights


class HeadNorm(nn.Module):
    """The root mean square norm of a dense head, of which some channels are left."""

    def __init__(self, heads: int, width: int, dense_width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(heads, 1, width))
        self.dense_width, self.eps = dense_width, eps

    def forward(self, states: Tensor) -> Tensor:
        """Norm ``[batch, heads, tokens, width]``."""
        whole = states.float()
        power = whole.square().sum(-1, keepdim=True) / self.dense_width
        return (whole * torch.rsqrt(power + self.eps) * self.weight.float()).to(states.dtype)


class CutNormedAttention(CutRotaryAttention):
    """Comes before a stock class of attentions that norm the heads of queries and keys."""

    def __init__(self: Any, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        del self.q_norm, self.k_norm
        if not self.query_key_dim:
            return
        width, eps = dense(config).head_dim, config.rms_norm_eps
        self.register_module("q_norm", HeadNorm(self.heads, self.query_key_dim, width, eps))
        self.register_module("k_norm", HeadNorm(self.kv_heads, self.query_key_dim, width, eps))

    def normed(self: Any, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Norm the heads of queries and keys."""
        return self.q_norm(query), self.k_norm(key)


def rotated(
    query: Tensor, key: Tensor, couples: Tensor, tables: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Rotate the couples that are left, by the angles that they have in the dense head.

    Args:
        query: ``[batch, heads, tokens, 2 * couples]``.
        key: ``[batch, kv_heads, tokens, 2 * couples]``.
        couples: Which couples of the dense head they are, int64 ``[kv_heads, couples]``.
        tables: Cosines and sines of the dense head, ``[batch, tokens, head_dim]``.
    """
    cos, sin = (table[..., couples].transpose(1, 2) for table in tables)
    key = turned(key, cos, sin)
    groups = query.shape[1] // key.shape[1]
    cos, sin = (table.repeat_interleave(groups, dim=1) for table in (cos, sin))
    return turned(query, cos, sin), key


def turned(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate couples whose channels are half a head apart."""
    first, second = states.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
