"""SigLIP and SigLIP 2: both towers with the attention that pools the image, or either tower alone.

In a vision tower alone, the pooling head stays dense: the last hidden states are compared there,
and the head only comes after them.
"""

from solpath.arch.clip import MLP, tower
from solpath.arch.table import Attention, Stack
from solpath.nn.pooling import pooling_forward


def _head(path: str) -> Stack:
    return Stack(
        blocks=path,
        attentions=(
            Attention(
                module="attention",
                query="attention",
                key="attention",
                value="attention",
                output="attention.out_proj",
                forward=pooling_forward,
                heads="num_heads",
            ),
        ),
        mlps=(MLP,),
    )


_BOTH = (
    tower("vision_model.encoder.layers"),
    _head("vision_model.head"),
    tower("text_model.encoder.layers"),
)
_TOWERS = ("siglip_text_model", "siglip_vision_model", "siglip2_text_model", "siglip2_vision_model")
TABLES = {"siglip": _BOTH, "siglip2": _BOTH, **dict.fromkeys(_TOWERS, (tower("encoder.layers"),))}
