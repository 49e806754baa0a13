"""Swin v2: queries and keys are normed head by head, outside any module, and stay whole."""

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from solpath.arch.bert import ATTENTION, MLP
from solpath.arch.table import Stack
from solpath.nn.attention import plain_attention, split_heads


def _forward(
    self: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    output_attentions: bool = False,
) -> tuple[Tensor, ...]:
    query, key, value = (
        split_heads(layer, hidden_states, self.num_attention_heads)
        for layer in (self.query, self.key, self.value)
    )
    query, key = normalize(query, dim=-1), normalize(key, dim=-1)
    scale = self.logit_scale.clamp(max=math.log(1.0 / 0.01)).exp()
    window = self.window_size[0] * self.window_size[1]
    table = self.continuous_position_bias_mlp(self.relative_coords_table)
    table = table.view(-1, self.num_attention_heads)[self.relative_position_index.view(-1)]
    bias = [16 * torch.sigmoid(table.view(window, window, -1).permute(2, 0, 1).contiguous())]
    if attention_mask is not None:  # transformers adds it twice
        mask = attention_mask.unsqueeze(1).repeat(len(query) // len(attention_mask), 1, 1, 1)
        bias += [mask, mask]
    found = plain_attention(query * scale, key, value, bias, 1.0, self.dropout)
    return found if output_attentions else found[:1]


_ATTENTION = replace(ATTENTION, forward=_forward, qk=False)
TABLES = {"swinv2": (Stack("encoder.layers.*.blocks", (_ATTENTION,), (MLP,)),)}
