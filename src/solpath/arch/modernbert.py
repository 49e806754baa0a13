"""ModernBERT: fused projections, rotary couples, local and global attention, gated MLP."""

from typing import Any

from torch import Tensor

from solpath.arch.table import Attention, Mlp, Stack
from solpath.nn.attention import attend, split_fused
from solpath.nn.rotary import rotate_kept


def _forward(
    self: Any,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    heads = self.config.num_attention_heads
    width = self.Wo.in_features // heads
    query, key, value = split_fused(self.Wqkv(hidden_states), heads, width)
    query, key = (rotate_kept(part, self.couples, position_embeddings) for part in (query, key))
    kwargs |= {"scaling": self.head_dim**-0.5, "dropout": self.attention_dropout}
    kwargs |= {"sliding_window": self.sliding_window}
    kwargs |= {"deterministic": self.deterministic_flash_attn}
    states, weights = attend(self, query, key, value, attention_mask, **kwargs)
    return self.out_drop(self.Wo(states)), weights


_ATTENTION = Attention(
    module="attn",
    query="attn.Wqkv",
    key="attn.Wqkv",
    value="attn.Wqkv",
    output="attn.Wo",
    forward=_forward,
    heads="config.num_attention_heads",
    rotary=True,
)
_MLP = Mlp(left=("mlp.Wi", "mlp.Wi"), right="mlp.Wo")
TABLES = {"modernbert": (Stack("layers", (_ATTENTION,), (_MLP,)),)}
