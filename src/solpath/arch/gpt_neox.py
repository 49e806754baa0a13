"""GPT-NeoX and Pythia: one projection, head by head; some channels of a head are rotated."""

from typing import Any

from torch import Tensor

from solpath.arch.table import Attention, Mlp, Stack
from solpath.nn.attention import split_groups
from solpath.nn.rotary import rotary

MLP = Mlp(left=("mlp.dense_h_to_4h",), right="mlp.dense_4h_to_h")


def attention(module: str, **fields: Any) -> Attention:
    """Return an attention with one projection of queries, keys and values, head by head."""
    fused = dict.fromkeys(("query", "key", "value"), f"{module}.query_key_value")
    fields |= fused | {"output": f"{module}.dense", "by_group": True, "cached": True}
    return Attention(module=module, **fields)


def _project(self: Any, hidden: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
    heads = self.config.num_attention_heads
    return split_groups(self.query_key_value(hidden), heads, self.dense.in_features // heads)


_rotary = rotary(project=_project, output="dense")


def _forward(self: Any, *args: Any, layer_past: Any = None, **kwargs: Any) -> Any:
    return _rotary(self, *args, cache=layer_past, **kwargs)


_ATTENTION = attention(
    "attention",
    forward=_forward,
    heads="config.num_attention_heads",
    rotary=True,
    rotated=lambda module: module.rotary_ndims,
)
TABLES = {"gpt_neox": (Stack("layers", (_ATTENTION,), (MLP,)),)}
