"""Gemma 3 with widths of its own in every layer; needs transformers 5.19 or newer alone."""

from typing import Any, ClassVar

from transformers.models.gemma3 import configuration_gemma3, modeling_gemma3

from solpath.exporting.modeling.common import CutConfig
from solpath.exporting.modeling.rotary import CutDecoder, CutNormedAttention


class SolpathGemma3TextConfig(CutConfig, configuration_gemma3.Gemma3TextConfig):
    """The configuration of Gemma 3, whose `per_layer_config` has the widths of every layer."""

    model_type = "solpath_gemma3_text"
    base_model_tp_plan: ClassVar[dict[str, Any]] = {}  # heads stay together


class SolpathGemma3Attention(CutNormedAttention, modeling_gemma3.Gemma3Attention):
    """The attention of one layer."""

    eager = staticmethod(modeling_gemma3.eager_attention_forward)


class SolpathGemma3TextModel(CutDecoder, modeling_gemma3.Gemma3TextModel):
    """The decoder."""

    config: SolpathGemma3TextConfig
    attention_class = SolpathGemma3Attention


class SolpathGemma3ForCausalLM(CutDecoder, modeling_gemma3.Gemma3ForCausalLM):
    """The decoder with its head."""

    config: SolpathGemma3TextConfig
    attention_class = SolpathGemma3Attention
