"""DeBERTa v2 and v3, without queries and keys: samples share those of positions, masks do not."""

from typing import Any

import torch
from torch import Tensor

from solpath.arch.bert import MLP
from solpath.arch.table import Attention, Stack
from solpath.nn.attention import split_heads


def _forward(
    self: Any,
    hidden_states: Tensor,
    attention_mask: Tensor,
    output_attentions: bool = False,
    query_states: Tensor | None = None,
    relative_pos: Tensor | None = None,
    rel_embeddings: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    heads, source = self.num_attention_heads, query_states
    query = split_heads(self.query_proj, hidden_states if source is None else source, heads)
    key, value = (split_heads(f, hidden_states, heads) for f in (self.key_proj, self.value_proj))
    terms = 1 + len({"c2p", "p2c"}.intersection(self.pos_att_type))
    logits = query @ (key.mT / torch.tensor(query.shape[-1] * terms).float().sqrt().to(key.dtype))
    if self.relative_attention:
        positions, flat = self.pos_dropout(rel_embeddings), (query.flatten(0, 1), key.flatten(0, 1))
        bias = self.disentangled_attention_bias(*flat, relative_pos, positions, terms)
        logits = logits + bias.view_as(logits)
    logits = logits.masked_fill(~attention_mask.bool(), torch.finfo(logits.dtype).min)
    weights = self.dropout(logits.softmax(-1))
    return (weights @ value).transpose(1, 2).flatten(2), weights if output_attentions else None


_SELF = "attention.self"
_PATHS = (_SELF, f"{_SELF}.query_proj", f"{_SELF}.key_proj", f"{_SELF}.value_proj")
_ATTENTION = Attention(*_PATHS, "attention.output.dense", _forward, qk=False)
TABLES = {"deberta-v2": (Stack("encoder.layer", (_ATTENTION,), (MLP,)),)}
