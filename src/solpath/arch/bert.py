"""BERT and what has its blocks."""

from dataclasses import replace

from solpath.arch.table import Attention, Mlp, Stack
from solpath.nn.attention import separate

ATTENTION = Attention(
    module="attention.self",
    query="attention.self.query",
    key="attention.self.key",
    value="attention.self.value",
    output="attention.output.dense",
    forward=separate("query", "key", "value", dropout="dropout.p"),
)
MLP = Mlp(left=("intermediate.dense",), right="output.dense")
_STACK = Stack("encoder.layer", (replace(ATTENTION, by_head=True),), (MLP,))
TABLES = dict.fromkeys(
    (
        "bert", "bert-generation", "camembert", "data2vec-text", "electra", "ernie", "layoutlm",
        "roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl",
    ),
    (_STACK,),
)  # fmt: skip
