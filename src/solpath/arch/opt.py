"""OPT."""

from solpath.arch.table import Attention, Mlp, Stack
from solpath.nn.attention import separate

_STACK = Stack(
    blocks="decoder.layers",
    attentions=(
        Attention(
            module="self_attn",
            query="self_attn.q_proj",
            key="self_attn.k_proj",
            value="self_attn.v_proj",
            output="self_attn.out_proj",
            forward=separate(
                "q_proj", "k_proj", "v_proj", "out_proj", heads="num_heads", dropout="dropout"
            ),
            heads="num_heads",
            cached=True,
        ),
    ),
    mlps=(Mlp(left=("fc1",), right="fc2"),),
)
TABLES = {"opt": (_STACK,)}
