"""Falcon 7B and its kin: one projection, one key-value head or one per head, rotary couples."""

from typing import Any

from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from solpath.arch.gpt_neox import MLP, attention
from solpath.arch.table import Stack
from solpath.nn.attention import cached_states, pad_to, split_groups
from solpath.nn.rotary import rotate_couples


def _forward(
    self: Any,
    hidden: Tensor,
    alibi: Tensor | None,
    attention_mask: Tensor | None,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    layer_past: Any = None,
    output_attentions: bool = False,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    width, weights = self.dense.in_features // self.num_heads, None
    fused = self.query_key_value(hidden)
    query, key, value = split_groups(fused, self.num_heads, width, self.num_kv_heads)
    query, key = rotate_couples(query, key, self.couples, position_embeddings)
    key, value = cached_states(self, lambda _: (key, value), hidden, layer_past)
    query = pad_to(query, key.shape[-1])  # a cache keeps a column of a key without channels
    if self.config._attn_implementation == "sdpa" and not output_attentions:
        common = max(key.shape[-1], width)
        states = scaled_dot_product_attention(
            pad_to(query, common),
            pad_to(key, common),
            pad_to(value, common),
            attn_mask=attention_mask,
            is_causal=self.is_causal and attention_mask is None and hidden.shape[1] > 1,
            scale=self.inv_norm_factor,
        )
    else:
        logits = query @ key.mT * self.inv_norm_factor
        weights = (logits if attention_mask is None else logits + attention_mask).softmax(-1)
        states = weights @ value
    return self.dense(states[..., :width].transpose(1, 2).flatten(2)), weights


_UNSET = ("config.alibi", "new_decoder_architecture")
_KIND = "FalconAttention"  # that of flash attention computes otherwise
_FIELDS = {"heads": "num_heads", "kv_heads": "num_kv_heads", "rotary": True, "unset": _UNSET}
_ATTENTION = attention("self_attention", forward=_forward, kind=_KIND, **_FIELDS)
TABLES = {"falcon": (Stack("h", (_ATTENTION,), (MLP,)),)}
