"""wav2vec 2.0, HuBERT, data2vec's sound; WavLM, whose attention is one function of torch.

No module sees the queries or values of WavLM, so that they stay whole and its neurons are pruned.
"""

from solpath.arch.table import Attention, Mlp, Stack
from solpath.nn.attention import separate

_ATTENTION = Attention(
    module="attention",
    query="attention.q_proj",
    key="attention.k_proj",
    value="attention.v_proj",
    output="attention.out_proj",
    forward=separate(
        "q_proj", "k_proj", "v_proj", "out_proj", heads="num_heads", dropout="dropout"
    ),
    heads="num_heads",
)
_MLP = Mlp(left=("feed_forward.intermediate_dense",), right="feed_forward.output_dense")
_STACK = Stack("encoder.layers", (_ATTENTION,), (_MLP,))
TABLES = dict.fromkeys(("data2vec-audio", "hubert", "wav2vec2"), (_STACK,))
TABLES["wavlm"] = (Stack("encoder.layers", (), (_MLP,)),)
