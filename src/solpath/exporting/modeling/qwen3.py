"""Qwen3 with widths of its own in every layer; needs transformers 5.19 or newer alone."""

from typing import Any, ClassVar

from transformers.models.qwen3 import configuration_qwen3, modeling_qwen3

from solpath.exporting.modeling.common import CutConfig
from solpath.exporting.modeling.rotary import CutDecoder, CutNormedAttention


class SolpathQwen3Config(CutConfig, configuration_qwen3.Qwen3Config):
    """The configuration of Qwen3, whose `per_layer_config` has the widths of every layer."""

    model_type = "solpath_qwen3"
    base_model_tp_plan: ClassVar[dict[str, Any]] = {}  # heads stay together


class SolpathQwen3Attention(CutNormedAttention, modeling_qwen3.Qwen3Attention):
    """The attention of one layer."""

    eager = staticmethod(modeling_qwen3.eager_attention_forward)


class SolpathQwen3Model(CutDecoder, modeling_qwen3.Qwen3Model):
    """The decoder."""

    config: SolpathQwen3Config
    attention_class = SolpathQwen3Attention


class SolpathQwen3ForCausalLM(CutDecoder, modeling_qwen3.Qwen3ForCausalLM):
    """The decoder with its head."""

    config: SolpathQwen3Config
    attention_class = SolpathQwen3Attention
