"""Attention with its own query-key and value-output widths, either of which may be 0."""

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


def split_heads(linear: nn.Linear, hidden: Tensor, heads: int) -> Tensor:
    """Project and split. ``[batch, tokens, features] -> [batch, heads, tokens, width]``.

    A projection of width 0 gives one column of zeros, which changes no logit and no output.
    """
    if linear.out_features == 0:
        return hidden.new_zeros(hidden.shape[0], heads, hidden.shape[1], 1)
    states: Tensor = linear(hidden)
    return states.view(*states.shape[:-1], heads, -1).transpose(1, 2)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    width: int,
    dropout: float,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Run the attention function the model is configured for.

    The scale is the dense model's (`module.scaling`). Query and key, or value, are padded with
    zeros to equal widths, which changes nothing and lets fused kernels run.

    Args:
        module: the attention module, with the attributes its stock class has.
        query: ``[batch, heads, tokens, qk]``.
        key: ``[batch, kv_heads, keys, qk]``.
        value: ``[batch, kv_heads, keys, vo]``.
        attention_mask: as the stock module gets it.
        width: value-output width per head; 0 when `value` is a placeholder.
        dropout: probability while training.

    Returns:
        ``[batch, tokens, heads * width]`` and the attention probabilities, if they are computed.
    """
    eager = sys.modules[_stock(module).__module__].eager_attention_forward
    config: Any = module.config
    function: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS.get_interface(
        config._attn_implementation, eager
    )
    gap = query.shape[-1] - value.shape[-1]
    if gap > 0:
        value = nn.functional.pad(value, (0, gap))
    elif gap < 0:
        query, key = nn.functional.pad(query, (0, -gap)), nn.functional.pad(key, (0, -gap))
    output, weights = function(
        module,
        query,
        key,
        value,
        attention_mask,
        dropout=dropout if module.training else 0.0,
        scaling=module.scaling,
        **kwargs,
    )
    return output[..., :width].flatten(2), weights


def slim_class(stock: type[nn.Module], forward: Callable[..., Any]) -> type[nn.Module]:
    """A subclass of a stock attention class that only replaces `forward`.

    It stays an instance of the stock class, so output recording and attention backends find it.
    """
    return type(f"Slim{stock.__name__}", (stock,), {"forward": forward})


def _stock(module: nn.Module) -> type:
    return type(module).__mro__[1]


def rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of kept couples, half-split layout.

    Args:
        states: ``[batch, heads, tokens, 2 * couples]``.
        cos: ``[batch, heads, tokens, couples]``, gathered for the couples of each head.
        sin: likewise.
    """
    first, second = states.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
