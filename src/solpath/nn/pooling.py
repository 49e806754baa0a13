"""`nn.MultiheadAttention` step by step, so that its inner dimensions can be masked and cut."""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.nn.functional import linear, scaled_dot_product_attention

from solpath.nn.attention import by_head, pad_to


def pooling_forward(
    self: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Replace the `forward` of a batch-first `nn.MultiheadAttention` that is called without masks.

    Args:
        query: ``[batch, queries, features]``.
        key: ``[batch, tokens, features]``.
        value: ``[batch, tokens, features]``.
        kwargs: Ignored.

    Returns:
        The states ``[batch, queries, features]``, and None in place of the probabilities.
    """
    heads = self.num_heads
    width = self.out_proj.in_features // heads
    shared = (len(self.in_proj_weight) // heads - width) // 2
    sizes = [heads * shared, heads * shared, heads * width]
    states = [
        linear(source, weight, bias)
        for source, weight, bias in zip(
            (query, key, value),
            self.in_proj_weight.split(sizes),
            self.in_proj_bias.split(sizes),
            strict=True,
        )
    ]
    hook: Callable[[Tensor], Tensor] | None = vars(self).get("on_query")
    if hook is not None:
        states[0] = hook(states[0])
    common = max(shared, width, 1)
    queries, keys, values = (pad_to(by_head(part, heads), common) for part in states)
    if attn_mask is not None:
        attn_mask = attn_mask.view(-1, heads, *attn_mask.shape[1:])
    inner = scaled_dot_product_attention(
        queries, keys, values, attn_mask, scale=self.head_dim**-0.5
    )
    return self.out_proj(inner[..., :width].transpose(1, 2).flatten(2)), None
