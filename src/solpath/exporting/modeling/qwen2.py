"""Qwen2 with widths of its own in every layer; needs transformers 5.19 or newer alone."""

from typing import Any, ClassVar

from transformers.models.qwen2 import configuration_qwen2, modeling_qwen2

from solpath.exporting.modeling.common import CutConfig
from solpath.exporting.modeling.rotary import CutDecoder, CutRotaryAttention


class SolpathQwen2Config(CutConfig, configuration_qwen2.Qwen2Config):
    """The configuration of Qwen2, whose `per_layer_config` has the widths of every layer."""

    model_type = "solpath_qwen2"
    base_model_tp_plan: ClassVar[dict[str, Any]] = {}  # heads stay together


class SolpathQwen2Attention(CutRotaryAttention, modeling_qwen2.Qwen2Attention):
    """The attention of one layer."""

    eager = staticmethod(modeling_qwen2.eager_attention_forward)


class SolpathQwen2Model(CutDecoder, modeling_qwen2.Qwen2Model):
    """The decoder."""

    config: SolpathQwen2Config
    attention_class = SolpathQwen2Attention


class SolpathQwen2ForCausalLM(CutDecoder, modeling_qwen2.Qwen2ForCausalLM):
    """The decoder with its head."""

    config: SolpathQwen2Config
    attention_class = SolpathQwen2Attention
