"""Whisper (keys without bias), BART and what has its blocks: encoder, decoder, cross attention."""

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
        by_head=True,
        name=name,
    )


_MLPS = (Mlp(left=("fc1",), right="fc2"),)
_ENCODER = (_attention("self_attn", "self_attention", False),)
_DECODER = (
    _attention("self_attn", "self_attention", True),
    _attention("encoder_attn", "cross_attention", False),
)
_STACKS = (
    Stack("encoder.layers", _ENCODER, _MLPS),
    Stack("decoder.layers", _DECODER, _MLPS),
)
TABLES = dict.fromkeys(
    (
        "bart", "blenderbot", "blenderbot-small", "m2m_100", "marian", "mbart", "pegasus", "plbart",
        "whisper",
    ),
    _STACKS,
)  # fmt: skip
