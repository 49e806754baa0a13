"""DistilBERT."""

from solpath.arch.table import Attention, Mlp, Stack
from solpath.nn.attention import separate

_STACK = Stack(
    blocks="transformer.layer",
    attentions=(
        Attention(
            module="attention",
            query="attention.q_lin",
            key="attention.k_lin",
            value="attention.v_lin",
            output="attention.out_lin",
            forward=separate(
                "q_lin", "k_lin", "v_lin", "out_lin", heads="n_heads", dropout="dropout.p"
            ),
            heads="n_heads",
        ),
    ),
    mlps=(Mlp(left=("ffn.lin1",), right="ffn.lin2"),),
)
TABLES = {"distilbert": (_STACK,)}
