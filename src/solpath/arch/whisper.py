"""Whisper: encoder and decoder, self and cross attention, keys without bias."""

from solpath.arch.table import Attention, Mlp, Stack
from solpath.nn.attention import separate


def _attention(layer: str, name: str, cached: bool) -> Attention:
    return Attention(
        module=layer,
        query=f"{layer}.q_proj",
        key=f"{layer}.k_proj",
        value=f"{layer}.v_proj",
        output=f"{layer}.out_proj",
        forward=separate(
            "q_proj", "k_proj", "v_proj", "out_proj", heads="num_heads", dropout="dropout"
        ),
        heads="num_heads",
        cached=cached,
        name=name,
    )


_MLPS = (Mlp(left=("fc1",), right="fc2"),)
_ENCODER = (_attention("self_attn", "self_attention", False),)
_DECODER = (
    _attention("self_attn", "self_attention", True),
    _attention("encoder_attn", "cross_attention", False),
)
TABLES = {
    "whisper": (
        Stack("encoder.layers", _ENCODER, _MLPS),
        Stack("decoder.layers", _DECODER, _MLPS),
    )
}
