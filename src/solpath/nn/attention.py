"""Attention with separate query-key and value-output widths, either of which may be 0."""

import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import EncoderDecoderCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from solpath.nn.slim import KEPT_HEADS, Forward, stock_class

_ALIGNED = 8  # elements: what fused kernels of GPUs want the width of a head to be a multiple of


def split_heads(linear: nn.Module, hidden: Tensor, heads: int) -> Tensor:
    """Project, then split. ``[batch, tokens, features] -> [batch, heads, tokens, width]``."""
    return by_head(linear(hidden), heads)


def heads_left(module: nn.Module, dense: int) -> int:
    """Return the number of key-value heads of a cut attention.

    Args:
        module: The attention module.
        dense: The number in the dense model.
    """
    kept = module._buffers.get(KEPT_HEADS)
    return dense if kept is None else len(kept)


def by_head(states: Tensor, heads: int) -> Tensor:
    """Split into heads; `width` may be 0.

    ``[batch, tokens, heads * width] -> [batch, heads, tokens, width]``.
    """
    shape = (*states.shape[:-1], heads, states.shape[-1] // heads)
    return states.view(shape).transpose(1, 2)


def split_fused(
    states: Tensor, heads: int, width: int, kv_heads: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Split the output of a fused projection into queries, keys and values.

    Args:
        states: ``[batch, tokens, features]``: the queries of all heads, then the keys, then the
            values.
        heads: The number of query heads.
        width: The value-output width. Queries and keys share the remaining features.
        kv_heads: The number of key-value heads; 0 if there are as many as query heads.

    Returns:
        Queries and keys ``[batch, heads, tokens, qk]``, and values
        ``[batch, heads, tokens, width]``.
    """
    kv_heads = kv_heads or heads
    shared = (states.shape[-1] - kv_heads * width) // (heads + kv_heads)
    sizes = [heads * shared, kv_heads * shared, kv_heads * width]
    query, key, value = torch.split(states, sizes, dim=-1)
    return by_head(query, heads), by_head(key, kv_heads), by_head(value, kv_heads)


def split_groups(
    states: Tensor, heads: int, width: int, kv_heads: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Do what `split_fused` does where the features of each key-value head come together.

    They are its queries, its key and its value.
    """
    kv_heads = kv_heads or heads
    repeat = heads // kv_heads
    groups = states.view(*states.shape[:-1], kv_heads, states.shape[-1] // kv_heads)
    shared = (groups.shape[-1] - width) // (repeat + 1)
    query, key, value = torch.split(groups, [repeat * shared, shared, width], dim=-1)
    query = query.reshape(*states.shape[:-1], heads, shared)
    return query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    dropout: float,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Run the attention function that the model is configured for.

    Queries and keys, or values, are padded with zeros to one width, on a GPU to a multiple of 8.
    This changes no result and lets fused kernels run.

    Args:
        module: The attention module, with the attributes of its stock class.
        query: ``[batch, heads, tokens, qk]``.
        key: ``[batch, kv_heads, keys, qk]``.
        value: ``[batch, kv_heads, keys, vo]``.
        attention_mask: The mask, as the stock module gets it.
        scaling: The factor of the logits: that of the dense head.
        dropout: The dropout probability of the attention while training.
        kwargs: Anything else that the attention function takes.

    Returns:
        The states ``[batch, tokens, heads * vo]``, and the attention probabilities, or None if the
        function does not return them.
    """
    eager = sys.modules[stock_class(module).__module__].eager_attention_forward
    config: Any = module.config
    function: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS.get_interface(
        config._attn_implementation, eager
    )
    width = value.shape[-1]
    common = max(key.shape[-1], width, 1)
    if query.is_cuda:
        common = -(-common // _ALIGNED) * _ALIGNED
    query, key, value = (_aligned(pad_to(states, common)) for states in (query, key, value))
    output, weights = function(
        module,
        query,
        key,
        value,
        attention_mask,
        dropout=dropout if module.training else 0.0,
        scaling=scaling,
        **kwargs,
    )
    return output[..., :width].flatten(2), weights


def _aligned(states: Tensor) -> Tensor:
    """Return states whose rows start where the kernels of a GPU can read them, copied if need be.

    Views of a fused projection that was cut may start anywhere. A compiler sees to that itself.
    """
    if not states.is_cuda or torch.compiler.is_compiling():
        return states
    starts = (*states.stride()[:-1], states.storage_offset())
    return states.contiguous() if any(start % _ALIGNED for start in starts) else states


def pad_to(states: Tensor, width: int) -> Tensor:
    """Add zeros at the end of the last dimension until its size is `width`."""
    gap = width - states.shape[-1]
    return nn.functional.pad(states, (0, gap)) if gap else states


def cached_states(
    module: nn.Module,
    project: Callable[[Tensor], tuple[Tensor, Tensor]],
    source: Tensor,
    cache: Any,
    *,
    cross: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return the keys and values of `source` after those in the cache, or those in the cache alone.

    Args:
        module: The attention module, which must have a `layer_idx` if there is a cache.
        project: The function ``source -> key, value``.
        source: The hidden states of the sequence that is attended to.
        cache: A cache of transformers, which is updated, or None.
        cross: Whether `source` is the output of an encoder, which is then projected only once.
    """
    index: Any = module.layer_idx if cache is not None else None
    if isinstance(cache, EncoderDecoderCache):
        known = cache.is_updated.get(index)
        pair, cache = cache, cache.cross_attention_cache if cross else cache.self_attention_cache
        if cross and known:
            return cache.layers[index].keys, cache.layers[index].values
        if cross:
            pair.is_updated[index] = True
    key, value = project(source)
    if cache is None:
        return key, value
    # A cache takes keys without channels for an empty sequence, so they get one channel.
    updated: tuple[Tensor, Tensor] = cache.update(pad_to(key, max(key.shape[-1], 1)), value, index)
    return updated


def getter(path: str) -> Callable[[Any], Any]:
    """Return an `operator.attrgetter` that `torch.compile` can look into."""
    names = path.split(".")

    def get(value: Any) -> Any:
        for name in names:
            value = getattr(value, name)
        return value

    return get


def separate(
    query: str,
    key: str,
    value: str,
    output: str = "",
    *,
    heads: str = "num_attention_heads",
    scaling: str = "scaling",
    dropout: str = "attention_dropout",
) -> Forward:
    """Return the `forward` of an attention with separate projections and nothing between them.

    It attends to `hidden_states` or, as a cross attention, to `key_value_states`.

    Args:
        query, key, value: The attributes of the module that hold the projections.
        output: The attribute that holds the output projection; empty if that is outside the module.
        heads, scaling, dropout: The attributes that hold these numbers; dots are allowed.
    """
    count, scale, drop = getter(heads), getter(scaling), getter(dropout)

    def forward(
        self: Any,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        cache: Any = None,
        key_value_states: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        heads = heads_left(self, count(self))

        def project(source: Tensor) -> tuple[Tensor, Tensor]:
            keys = split_heads(getattr(self, key), source, heads)
            return keys, split_heads(getattr(self, value), source, heads)

        cross = key_value_states is not None
        source = hidden_states if key_value_states is None else key_value_states
        states, weights = attend(
            self,
            split_heads(getattr(self, query), hidden_states, heads),
            *cached_states(self, project, source, cache, cross=cross),
            attention_mask,
            scaling=scale(self),
            dropout=drop(self),
            **kwargs,
        )
        return getattr(self, output)(states) if output else states, weights

    return forward


def plain_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    added: Iterable[Tensor],
    scaling: float,
    dropout: nn.Module,
) -> tuple[Tensor, Tensor]:
    """Attention of a model that transformers runs in one form only.

    Args:
        query, key: ``[batch, heads, tokens, qk]``.
        value: ``[batch, heads, tokens, vo]``.
        added: what is added to the logits, such as positions and a mask.
        scaling: of the logits; that of the dense head.
        dropout: the module that drops probabilities.

    Returns:
        ``[batch, tokens, heads * vo]`` and the probabilities.
    """
    logits = sum(added, query @ key.mT * scaling)
    weights = dropout(logits.softmax(-1))
    return (weights @ value).transpose(1, 2).flatten(2), weights
