"""ViT with widths of its own in every layer; needs transformers 5.19 or newer alone."""

from typing import Any, ClassVar

from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.vit import configuration_vit, modeling_vit

from solpath.exporting.modeling.common import (
    CutConfig,
    CutModel,
    by_head,
    dense_sizes,
    padded,
    resize,
)


class SolpathViTConfig(CutConfig, configuration_vit.ViTConfig):
    """The configuration of ViT, whose `per_layer_config` has the widths of every layer."""

    model_type = "solpath_vit"
    base_model_tp_plan: ClassVar[dict[str, Any]] = {}  # heads stay together


class SolpathViTAttention(modeling_vit.ViTAttention):
    """The attention of one layer; either of its widths may be 0.

    Queries, keys and values are padded with zeros to one width that kernels take, the `head_dim` of
    the layer.
    """

    def __init__(self: Any, config: Any, layer_idx: int) -> None:
        with dense_sizes(config):
            super().__init__(config)
        layer, hidden = config.per_layer_config[layer_idx], config.hidden_size
        self.layer_idx, self.head_dim = layer_idx, layer.head_dim
        self.heads = layer.num_attention_heads
        self.query_key_dim, self.value_dim = layer.query_key_dim, layer.value_dim
        resize(self, "q_proj", hidden, self.heads * self.query_key_dim)
        resize(self, "k_proj", hidden, self.heads * self.query_key_dim)
        resize(self, "v_proj", hidden, self.heads * self.value_dim)
        resize(self, "o_proj", self.heads * self.value_dim, hidden)

    def forward(
        self: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Do what the stock class does, in fewer channels."""
        query = by_head(self.q_proj(hidden_states), self.heads, self.query_key_dim)
        key = by_head(self.k_proj(hidden_states), self.heads, self.query_key_dim)
        value = by_head(self.v_proj(hidden_states), self.heads, self.value_dim)
        attention_interface = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, modeling_vit.eager_attention_forward
        )
        output, weights = attention_interface(
            self,
            padded(query, self.head_dim),
            padded(key, self.head_dim),
            padded(value, self.head_dim),
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        output = output.reshape(*hidden_states.shape[:-1], self.heads, self.head_dim)
        output = output[..., : self.value_dim].flatten(-2)
        return self.o_proj(output), weights


class CutViT(CutModel):
    """Comes before a stock class of models."""

    def cut_layers(self: Any, config: Any) -> None:
        """Exchange the attentions and resize the MLPs."""
        for index, block in enumerate(self.base_model.layers):
            hidden, neurons = config.hidden_size, config.per_layer_config[index].intermediate_size
            block.attention = SolpathViTAttention(config, index)
            resize(block.mlp, "fc1", hidden, neurons)
            resize(block.mlp, "fc2", neurons, hidden)


class SolpathViTModel(CutViT, modeling_vit.ViTModel):
    """The encoder."""

    config: SolpathViTConfig


class SolpathViTForImageClassification(CutViT, modeling_vit.ViTForImageClassification):
    """The encoder with a head for images."""

    config: SolpathViTConfig
