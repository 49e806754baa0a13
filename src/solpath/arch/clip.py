"""CLIP: both towers, or either tower alone."""

from solpath.arch.table import Attention, Mlp, Stack
from solpath.nn.attention import separate

ATTENTION = Attention(
    module="self_attn",
    query="self_attn.q_proj",
    key="self_attn.k_proj",
    value="self_attn.v_proj",
    output="self_attn.out_proj",
    forward=separate(
        "q_proj", "k_proj", "v_proj", "out_proj", heads="num_heads", scaling="scale",
        dropout="dropout",
    ),
    heads="num_heads",
)  # fmt: skip
MLP = Mlp(left=("mlp.fc1",), right="mlp.fc2")


def tower(blocks: str) -> Stack:
    """Return the stack of one tower, given the dotted name of its blocks."""
    return Stack(blocks, (ATTENTION,), (MLP,))


TABLES = {
    "clip": (tower("vision_model.encoder.layers"), tower("text_model.encoder.layers")),
    # A tower with a projection keeps it in a model of its own up to transformers 5.20.
    "clip_text_model": (tower("encoder.layers"), tower("text_model.encoder.layers")),
    "clip_vision_model": (tower("encoder.layers"), tower("vision_model.encoder.layers")),
}
