"""BERT, RoBERTa, XLM-RoBERTa, CamemBERT, ELECTRA."""

from solpath.arch.table import Attention, Mlp, Stack
from solpath.nn.attention import separate

_STACK = Stack(
    blocks="encoder.layer",
    attentions=(
        Attention(
            module="attention.self",
            query="attention.self.query",
            key="attention.self.key",
            value="attention.self.value",
            output="attention.output.dense",
            forward=separate("query", "key", "value", dropout="dropout.p"),
        ),
    ),
    mlps=(Mlp(left=("intermediate.dense",), right="output.dense"),),
)
TABLES = dict.fromkeys(("bert", "camembert", "electra", "roberta", "xlm-roberta"), (_STACK,))
