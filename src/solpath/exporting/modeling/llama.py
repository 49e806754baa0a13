"""LLaMA with widths of its own in every layer; needs transformers 5.19 or newer alone."""

from typing import Any, ClassVar

from transformers.models.llama import configuration_llama, modeling_llama

from solpath.exporting.modeling.common import CutConfig
from solpath.exporting.modeling.rotary import CutDecoder, CutRotaryAttention


class SolpathLlamaConfig(CutConfig, configuration_llama.LlamaConfig):
    """The configuration of LLaMA, whose `per_layer_config` has the widths of every layer."""

    model_type = "solpath_llama"
    base_model_tp_plan: ClassVar[dict[str, Any]] = {}  # heads stay together


class SolpathLlamaAttention(CutRotaryAttention, modeling_llama.LlamaAttention):
    """The attention of one layer."""

    eager = staticmethod(modeling_llama.eager_attention_forward)


class SolpathLlamaModel(CutDecoder, modeling_llama.LlamaModel):
    """The decoder."""

    config: SolpathLlamaConfig
    attention_class = SolpathLlamaAttention


class SolpathLlamaForCausalLM(CutDecoder, modeling_llama.LlamaForCausalLM):
    """The decoder with its head."""

    config: SolpathLlamaConfig
    attention_class = SolpathLlamaAttention
