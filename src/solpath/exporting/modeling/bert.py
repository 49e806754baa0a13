"""BERT with widths of its own in every layer; needs transformers 5.19 or newer alone."""

from typing import Any, ClassVar

from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.bert import configuration_bert, modeling_bert

from solpath.exporting.modeling.common import (
    CutConfig,
    CutModel,
    by_head,
    check_whole,
    dense_sizes,
    padded,
    resize,
)


class SolpathBertConfig(CutConfig, configuration_bert.BertConfig):
    """The configuration of BERT, whose `per_layer_config` has the widths of every layer."""

    model_type = "solpath_bert"
    base_model_tp_plan: ClassVar[dict[str, Any]] = {}  # heads stay together


class SolpathBertSelfAttention(modeling_bert.BertSelfAttention):
    """The attention of one layer; either of its widths may be 0.

    Queries, keys and values are padded with zeros to one width that kernels take, the `head_dim` of
    the layer, but not in the cache of transformers.
    """

    def __init__(self: Any, config: Any, layer_idx: int) -> None:
        with dense_sizes(config):
            super().__init__(config, is_causal=config.is_decoder, layer_idx=layer_idx)
        layer, hidden = config.per_layer_config[layer_idx], config.hidden_size
        self.heads, self.head_dim = layer.num_attention_heads, layer.head_dim
        self.query_key_dim, self.value_dim = layer.query_key_dim, layer.value_dim
        resize(self, "query", hidden, self.heads * self.query_key_dim)
        resize(self, "key", hidden, self.heads * self.query_key_dim)
        resize(self, "value", hidden, self.heads * self.value_dim)

    def forward(
        self: Any,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Do what the stock class does, in fewer channels."""
        cache = kwargs.pop("past_key_values", cache)  # its name before transformers 5.24
        cache = getattr(cache, "self_attention_cache", cache)
        check_whole(self)
        query = by_head(self.query(hidden_states), self.heads, self.query_key_dim)
        key = by_head(self.key(hidden_states), self.heads, self.query_key_dim)
        value = by_head(self.value(hidden_states), self.heads, self.value_dim)
        if cache is not None:  # which takes keys without channels for an empty sequence
            key = padded(key, max(self.query_key_dim, 1))
            key, value = cache.update(key, value, self.layer_idx)
        attention_interface = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, modeling_bert.eager_attention_forward
        )
        output, weights = attention_interface(
            self,
            padded(query, self.head_dim),
            padded(key, self.head_dim),
            padded(value, self.head_dim),
            attention_mask,
            dropout=self.dropout.p if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        output = output.reshape(*hidden_states.shape[:-1], self.heads, self.head_dim)
        output = output[..., : self.value_dim].flatten(-2)
        return output, weights


class CutBert(CutModel):
    """Comes before a stock class of models."""

    def cut_layers(self: Any, config: Any) -> None:
        """Exchange the attentions and resize the layers around them."""
        hidden = config.hidden_size
        for index, block in enumerate(self.base_model.encoder.layer):
            layer = config.per_layer_config[index]
            block.attention.self = SolpathBertSelfAttention(config, index)
            channels = layer.num_attention_heads * layer.value_dim
            resize(block.attention.output, "dense", channels, hidden)
            resize(block.intermediate, "dense", hidden, layer.intermediate_size)
            resize(block.output, "dense", layer.intermediate_size, hidden)


class SolpathBertModel(CutBert, modeling_bert.BertModel):
    """The encoder."""

    config: SolpathBertConfig


class SolpathBertForMaskedLM(CutBert, modeling_bert.BertForMaskedLM):
    """The encoder with the head that fills in tokens."""

    config: SolpathBertConfig


class SolpathBertForSequenceClassification(CutBert, modeling_bert.BertForSequenceClassification):
    """The encoder with a head for texts."""

    config: SolpathBertConfig


class SolpathBertForTokenClassification(CutBert, modeling_bert.BertForTokenClassification):
    """The encoder with a head for tokens."""

    config: SolpathBertConfig


class SolpathBertForQuestionAnswering(CutBert, modeling_bert.BertForQuestionAnswering):
    """The encoder with a head for answers."""

    config: SolpathBertConfig
