"""LLaMA: rotary couples, grouped-query attention, gated MLP."""

from typing import Any

from torch import Tensor, nn

from solpath.arch.table import Architecture, Attention, Mlp
from solpath.nn.attention import attend, rotate, slim_class, split_heads


def _forward(
    self: Any,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    attention_mask: Tensor | None = None,
    past_key_values: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    heads = self.config.num_attention_heads
    groups = self.num_key_value_groups
    query = split_heads(self.q_proj, hidden_states, heads)
    key = split_heads(self.k_proj, hidden_states, heads // groups)
    value = split_heads(self.v_proj, hidden_states, heads // groups)
    if self.k_proj.out_features:
        # [batch, tokens, head_dim] -> [batch, kv_heads, tokens, couples]: the kept frequencies.
        cos, sin = (table[..., self.couples].transpose(1, 2) for table in position_embeddings)
        key = rotate(key, cos, sin)
        query = rotate(
            query, cos.repeat_interleave(groups, dim=1), sin.repeat_interleave(groups, dim=1)
        )
    if past_key_values is not None:
        key, value = past_key_values.update(key, value, self.layer_idx)
    output, weights = attend(
        self,
        query,
        key,
        value,
        attention_mask,
        width=self.v_proj.out_features * groups // heads,
        dropout=self.attention_dropout,
        **kwargs,
    )
    return self.o_proj(output), weights


def _slim_(attention: nn.Module, kept_qk: Tensor) -> None:
    device = next(attention.parameters()).device
    couples = kept_qk if device.type == "meta" else kept_qk.to(device)
    attention.register_buffer("couples", couples, persistent=False)
    attention.__class__ = slim_class(type(attention), _forward)


ARCHITECTURE = Architecture(
    blocks="layers",
    attention=Attention(
        module="self_attn",
        query="self_attn.q_proj",
        key="self_attn.k_proj",
        value="self_attn.v_proj",
        output="self_attn.o_proj",
        rotary=True,
    ),
    mlp=Mlp(left=("mlp.gate_proj", "mlp.up_proj"), right="mlp.down_proj"),
    slim_=_slim_,
)
