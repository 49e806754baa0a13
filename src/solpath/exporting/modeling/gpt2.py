"""GPT-2 with widths of its own in every layer; needs transformers 5.19 or newer alone."""

from typing import Any, ClassVar

from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.gpt2 import configuration_gpt2, modeling_gpt2
from transformers.pytorch_utils import Conv1D

from solpath.exporting.modeling.common import (
    CutConfig,
    CutModel,
    by_head,
    check_whole,
    dense_sizes,
    padded,
    resize,
)


class SolpathGPT2Config(CutConfig, configuration_gpt2.GPT2Config):
    """The configuration of GPT-2, whose `per_layer_config` has the widths of every layer."""

    model_type = "solpath_gpt2"
    base_model_tp_plan: ClassVar[dict[str, Any]] = {}  # heads stay together


class SolpathGPT2Attention(modeling_gpt2.GPT2Attention):
    """The attention of one layer; either of its widths may be 0.

    Queries, keys and values are padded with zeros to one width that kernels take, the `head_dim` of
    the layer, but not in the cache of transformers.
    """

    def __init__(self: Any, config: Any, layer_idx: int) -> None:
        with dense_sizes(config):
            super().__init__(config, layer_idx=layer_idx)
        layer, hidden = config.per_layer_config[layer_idx], config.hidden_size
        self.heads, self.head_dim = layer.num_attention_heads, layer.head_dim
        self.query_key_dim, self.value_dim = layer.query_key_dim, layer.value_dim
        channels = 2 * self.query_key_dim + self.value_dim
        resize(self, "c_attn", hidden, self.heads * channels, transposed)
        resize(self, "c_proj", self.heads * self.value_dim, hidden, transposed)

    def forward(
        self: Any,
        hidden_states: Tensor,
        cache: Any = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Do what the stock class does, in fewer channels."""
        cache = kwargs.pop("past_key_values", cache)  # its name before transformers 5.24
        cache = getattr(cache, "self_attention_cache", cache)
        check_whole(self)
        widths = self.query_key_dim, self.query_key_dim, self.value_dim
        parts = self.c_attn(hidden_states).split([self.heads * width for width in widths], dim=-1)
        query, key, value = (
            by_head(part, self.heads, width) for part, width in zip(parts, widths, strict=True)
        )
        if cache is not None:  # which takes keys without channels for an empty sequence
            key = padded(key, max(self.query_key_dim, 1))
            key, value = cache.update(key, value, self.layer_idx)
        attention_interface = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, modeling_gpt2.eager_attention_forward
        )
        output, weights = attention_interface(
            self,
            padded(query, self.head_dim),
            padded(key, self.head_dim),
            padded(value, self.head_dim),
            attention_mask,
            dropout=self.attn_dropout.p if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        output = output.reshape(*hidden_states.shape[:-1], self.heads, self.head_dim)
        output = output[..., : self.value_dim].flatten(-2)
        return self.resid_dropout(self.c_proj(output)), weights


def transposed(inputs: int, outputs: int, bias: bool) -> nn.Module:
    """Return a linear layer as GPT-2 has them."""
    return Conv1D(outputs, inputs)


class CutGPT2(CutModel):
    """Comes before a stock class of models."""

    # The stock classes pass over old buffers by patterns that fit biases, too.
    _keys_to_ignore_on_load_unexpected: ClassVar[Any] = None

    def cut_layers(self: Any, config: Any) -> None:
        """Exchange the attentions and resize the MLPs."""
        for index, block in enumerate(self.base_model.h):
            hidden, neurons = config.hidden_size, config.per_layer_config[index].intermediate_size
            block.attn = SolpathGPT2Attention(config, index)
            resize(block.mlp, "c_fc", hidden, neurons, transposed)
            resize(block.mlp, "c_proj", neurons, hidden, transposed)


class SolpathGPT2Model(CutGPT2, modeling_gpt2.GPT2Model):
    """The decoder."""

    config: SolpathGPT2Config


class SolpathGPT2LMHeadModel(CutGPT2, modeling_gpt2.GPT2LMHeadModel):
    """The decoder with its head."""

    config: SolpathGPT2Config
