"""DINOv3's ViT: patches are rotated, the tokens before them are not; plain or gated MLP."""

from dataclasses import replace
from typing import Any

from torch import Tensor
from torch.nn.functional import pad

from solpath.arch.table import Mlp, Stack
from solpath.arch.vit import ATTENTION, GATED
from solpath.nn.attention import attend, split_heads
from solpath.nn.rotary import rotate


def _forward(
    self: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    query, key, value = (
        split_heads(layer, hidden_states, self.num_heads)
        for layer in (self.q_proj, self.k_proj, self.v_proj)
    )
    if position_embeddings is not None and self.couples.numel():
        before = hidden_states.shape[1] - len(position_embeddings[0])
        # [patches, head_dim] -> [heads, tokens, couples]; an angle of 0 rotates nothing.
        cos, sin = (
            pad(table[:, self.couples].transpose(0, 1), (0, 0, before, 0), value=start)
            for table, start in zip(position_embeddings, (1.0, 0.0), strict=True)
        )
        query, key = rotate(query, cos, sin), rotate(key, cos, sin)
    options = {"scaling": self.scaling, "dropout": self.dropout, **kwargs}
    states, weights = attend(self, query, key, value, attention_mask, **options)
    return self.o_proj(states), weights


_ATTENTION = replace(ATTENTION, forward=_forward, heads="num_heads", rotary=True)
_PLAIN = Mlp(left=("mlp.up_proj",), right="mlp.down_proj")
TABLES = {"dinov3_vit": (Stack("layer", (_ATTENTION,), (_PLAIN, GATED)),)}
