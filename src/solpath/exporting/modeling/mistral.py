"""Mistral with widths of its own in every layer; needs transformers 5.19 or newer alone."""

from typing import Any, ClassVar

from transformers.models.mistral import configuration_mistral, modeling_mistral

from solpath.exporting.modeling.common import CutConfig
from solpath.exporting.modeling.rotary import CutDecoder, CutRotaryAttention


class SolpathMistralConfig(CutConfig, configuration_mistral.MistralConfig):
    """The configuration of Mistral, whose `per_layer_config` has the widths of every layer."""

    model_type = "solpath_mistral"
    base_model_tp_plan: ClassVar[dict[str, Any]] = {}  # heads stay together


class SolpathMistralAttention(CutRotaryAttention, modeling_mistral.MistralAttention):
    """The attention of one layer."""

    eager = staticmethod(modeling_mistral.eager_attention_forward)

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.sliding_window = config.sliding_window


class SolpathMistralModel(CutDecoder, modeling_mistral.MistralModel):
    """The decoder."""

    config: SolpathMistralConfig
    attention_class = SolpathMistralAttention


class SolpathMistralForCausalLM(CutDecoder, modeling_mistral.MistralForCausalLM):
    """The decoder with its head."""

    config: SolpathMistralConfig
    attention_class = SolpathMistralAttention
