"""YOLOS, VideoMAE and data2vec's images: ViT with its layers in the places that BERT has them."""

from dataclasses import replace
from typing import Any

from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from solpath.arch.table import Attention, Mlp, Stack
from solpath.nn.attention import pad_to, separate, split_heads


def _forward(
    self: Any,
    hidden_states: Tensor,
    output_attentions: bool = False,
    relative_position_bias: Tensor | None = None,
    interpolate_pos_encoding: bool = False,
    resolution: tuple[int, int] | None = None,
) -> tuple[Tensor, Tensor | None]:
    query, key, value = (
        split_heads(layer, hidden_states, self.num_attention_heads)
        for layer in (self.query, self.key, self.value)
    )
    bias, size = relative_position_bias, self.config.patch_size
    if self.has_relative_position_bias and resolution is not None:
        window = resolution[0] // size, resolution[1] // size
        tokens = hidden_states.shape[1]
        own = self.relative_position_bias(window, interpolate_pos_encoding, dim_size=tokens)
        bias = own if bias is None else own + bias
    scale = self.attention_head_size**-0.5
    if output_attentions:
        logits = query @ key.mT * scale
        weights = self.dropout((logits if bias is None else logits + bias).softmax(-1))
        return (weights @ value).transpose(1, 2).flatten(2), weights
    width = value.shape[-1]
    common = max(key.shape[-1], width, 1)
    query, key, value = (pad_to(states, common) for states in (query, key, value))
    dropout = self.dropout.p if self.training else 0.0
    states = scaled_dot_product_attention(query, key, value, bias, dropout, scale=scale)
    return states[..., :width].transpose(1, 2).flatten(2), None


_ATTENTION = Attention(
    module="attention.attention",
    query="attention.attention.query",
    key="attention.attention.key",
    value="attention.attention.value",
    output="attention.output.dense",
    forward=separate("query", "key", "value", dropout="dropout_prob"),
)
_MLP = Mlp(left=("intermediate.dense",), right="output.dense")
_STACK = Stack("encoder.layer", (_ATTENTION,), (_MLP,))
TABLES = {
    "data2vec-vision": (replace(_STACK, attentions=(replace(_ATTENTION, forward=_forward),)),),
    "videomae": (_STACK,),
    "yolos": (_STACK,),
}
