"""T5 with widths of its own in every layer; needs transformers 5.19 or newer alone."""

from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers.cache_utils import EncoderDecoderCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.t5 import configuration_t5, modeling_t5

from solpath.exporting.modeling.common import CutModel, by_head, padded, resize


class SolpathT5Config(configuration_t5.T5Config):
    """The configuration of T5, whose `stack_widths` has the widths of every layer of its stacks."""

    model_type = "solpath_t5"
    base_model_tp_plan: ClassVar[dict[str, Any]] = {}  # heads stay together


class SolpathT5Attention(modeling_t5.T5Attention):
    """The attention of one layer; either of its widths may be 0.

    Queries, keys and values are padded with zeros to one width that kernels take, `head_dim`, but
    not in the cache of transformers.
    """

    def __init__(self: Any, config: Any, sizes: dict[str, int], **settings: Any) -> None:
        super().__init__(config, **settings)
        self.query_key_dim, self.value_dim = sizes["query_key_dim"], sizes["value_dim"]
        self.heads, self.head_dim = sizes["num_attention_heads"], sizes["head_dim"]
        self.kept_heads = sizes.get("kept_heads")
        resize(self, "q", self.d_model, self.heads * self.query_key_dim)
        resize(self, "k", self.d_model, self.heads * self.query_key_dim)
        resize(self, "v", self.d_model, self.heads * self.value_dim)
        resize(self, "o", self.heads * self.value_dim, self.d_model)

    def forward(
        self: Any,
        hidden_states: Tensor,
        mask: Tensor | None = None,
        key_value_states: Tensor | None = None,
        position_bias: Tensor | None = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Do what the stock class does, in fewer channels."""
        cache = kwargs.pop("past_key_values", cache)  # its name before transformers 5.24
        past = cache.get_seq_length(self.layer_idx) if cache is not None else 0
        past = past.clone() if isinstance(past, Tensor) else past
        query = by_head(self.q(hidden_states), self.heads, self.query_key_dim)
        key, value = self.keys_and_values(hidden_states, key_value_states, cache)
        if position_bias is None:
            tokens, keys = hidden_states.shape[1], key.shape[-2]
            if self.has_relative_attention_bias:
                position_bias = self.compute_bias(
                    tokens, keys, device=query.device, past_seen_tokens=past
                )
            else:
                shape = (1, self.n_heads, tokens, keys)
                position_bias = torch.zeros(shape, device=query.device, dtype=query.dtype)
        # All layers share the bias of the first, which has all heads of the dense model.
        own_bias = position_bias if self.kept_heads is None else position_bias[:, self.kept_heads]
        attention_interface = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, modeling_t5.eager_attention_forward
        )
        output, weights = attention_interface(
            self,
            padded(query, self.head_dim),
            padded(key, self.head_dim),
            padded(value, self.head_dim),
            mask,
            dropout=self.dropout if self.training else 0.0,
            scaling=self.scaling,
            position_bias=own_bias,
            **kwargs,
        )
        output = output.reshape(*hidden_states.shape[:-1], self.heads, self.head_dim)
        return self.o(output[..., : self.value_dim].flatten(-2)), position_bias, weights

    def keys_and_values(
        self: Any, hidden_states: Tensor, encoded: Tensor | None, cache: Any
    ) -> tuple[Tensor, Tensor]:
        """Project and cache; what the encoder gave is projected once."""
        both, index = cache, self.layer_idx
        if isinstance(both, EncoderDecoderCache):
            cross = encoded is not None
            cache = both.cross_attention_cache if cross else both.self_attention_cache
            if cross and both.is_updated.get(index):
                return cache.layers[index].keys, cache.layers[index].values
            if cross:
                both.is_updated[index] = True
        source = hidden_states if encoded is None else encoded
        key = by_head(self.k(source), self.heads, self.query_key_dim)
        value = by_head(self.v(source), self.heads, self.value_dim)
        if cache is not None:  # which takes keys without channels for an empty sequence
            key, value = cache.update(padded(key, max(self.query_key_dim, 1)), value, index)
        return key, value


class CutT5(CutModel):
    """Comes before a stock class of models."""

    def cut_layers(self: Any, config: Any) -> None:
        """Exchange the attentions and resize the MLPs."""
        for name, widths in config.stack_widths.items():
            for block, sizes in zip(getattr(self, name).block, widths, strict=True):
                *attentions, mlp = block.layer
                parts = zip(attentions, ("SelfAttention", "EncDecAttention"), strict=False)
                for layer, part in parts:
                    stock = getattr(layer, part)
                    settings = ("has_relative_attention_bias", "layer_idx", "is_causal")
                    own = {key: getattr(stock, key) for key in settings}
                    cut = SolpathT5Attention(stock.config, sizes[part], **own)
                    setattr(layer, part, cut)
                dense, neurons = mlp.DenseReluDense, sizes["intermediate_size"]
                for left in ("wi_0", "wi_1") if config.is_gated_act else ("wi",):
                    resize(dense, left, config.d_model, neurons)
                resize(dense, "wo", neurons, config.d_model)


class SolpathT5Model(CutT5, modeling_t5.T5Model):
    """The encoder and the decoder."""

    config: SolpathT5Config


class SolpathT5ForConditionalGeneration(CutT5, modeling_t5.T5ForConditionalGeneration):
    """The encoder, and the decoder with its head."""

    config: SolpathT5Config
