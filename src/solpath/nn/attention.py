"""Attention with separate query-key and value-output widths, either of which may be 0."""

import hashlib
import sys
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import EncoderDecoderCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

_ALIGNED = 8  # elements: what fused kernels of GPUs want the width of a head to be a multiple of

_UNITS = "solpath.units"  # in the metadata of a state_dict

Forward = Callable[..., Any]
"""The `forward` of an attention module, as a function whose first argument is the module."""


def split_heads(linear: nn.Module, hidden: Tensor, heads: int) -> Tensor:
    """Project, then split. ``[batch, tokens, features] -> [batch, heads, tokens, width]``."""
    return by_head(linear(hidden), heads)


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
    eager = sys.modules[_stock(module).__module__].eager_attention_forward
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

    Views of a fused projection that was cut may start anywhere.
    """
    starts = (*states.stride()[:-1], states.storage_offset())
    if states.is_cuda and any(start % _ALIGNED for start in starts):
        return states.contiguous()
    return states


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
    count, scale, drop = _getter(heads), _getter(scaling), _getter(dropout)

    def forward(
        self: Any,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        cache: Any = None,
        key_value_states: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        def project(source: Tensor) -> tuple[Tensor, Tensor]:
            keys = split_heads(getattr(self, key), source, count(self))
            return keys, split_heads(getattr(self, value), source, count(self))

        cross = key_value_states is not None
        source = hidden_states if key_value_states is None else key_value_states
        states, weights = attend(
            self,
            split_heads(getattr(self, query), hidden_states, count(self)),
            *cached_states(self, project, source, cache, cross=cross),
            attention_mask,
            scaling=scale(self),
            dropout=drop(self),
            **kwargs,
        )
        return getattr(self, output)(states) if output else states, weights

    return forward


def _getter(path: str) -> Callable[[Any], Any]:
    """Return an `operator.attrgetter` that `torch.compile` can look into."""
    names = path.split(".")

    def get(value: Any) -> Any:
        for name in names:
            value = getattr(value, name)
        return value

    return get


def project_apart(self: Any, hidden: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries, keys and values ``[batch, heads, tokens, width]`` of three projections."""
    heads = self.config.num_attention_heads
    kv_heads = heads // self.num_key_value_groups
    return (
        split_heads(self.q_proj, hidden, heads),
        split_heads(self.k_proj, hidden, kv_heads),
        split_heads(self.v_proj, hidden, kv_heads),
    )


def always(self: Any) -> bool:
    """Return True: every attention of the model rotates."""
    return True


def rotary(
    sliding_window: str = "",
    *,
    softcap: str = "",
    sinks: str = "",
    project: Callable[..., tuple[Tensor, Tensor, Tensor]] = project_apart,
    rotates: Callable[[Any], bool] = always,
    table: int = 1,
    neighbours: bool = False,
    upcast: bool = False,
    output: str = "o_proj",
) -> Forward:
    """Return the `forward` of LLaMA's attention and its relatives: rotary couples, grouped queries.

    With norms over the heads, the module has `q_norm` and `k_norm`, which run on the kept channels
    among zeros, and the query is multiplied by the buffer ``gain``, ``[heads]``. Channels of a head
    after its couples are not rotated.

    Args:
        sliding_window: The attribute that holds the window; dots are allowed. Empty if there is
            none.
        softcap: The attribute that holds the bound of the logits; empty if there is none.
        sinks: The attribute that holds one more logit per head; empty if there is none.
        project: The function of the module, the hidden states and the other arguments of `forward`
            that returns queries, keys and values.
        rotates: The function that tells whether a module rotates at all.
        table: The number of columns of the rotary tables per couple.
        neighbours: Whether the channels of a couple are neighbours.
        upcast: Whether the stock module rotates in float32.
        output: The attribute that holds the output projection.
    """
    extras = {"sliding_window": sliding_window, "softcap": softcap, "s_aux": sinks}
    getters = {name: _getter(path) for name, path in extras.items() if path}

    def forward(
        self: Any,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        query, key, value = project(self, hidden_states, **kwargs)
        if self.couples.numel():
            if "gain" in self._buffers:
                query = _norm(self.q_norm, query, self.couples, self.head_dim)
                query = query * self.gain.to(query.dtype).view(-1, 1, 1)
                key = _norm(self.k_norm, key, self.couples, self.head_dim)
            if rotates(self):
                columns = self.couples * table
                query, key = rotate_couples(
                    query, key, columns, position_embeddings, neighbours, upcast
                )
        kwargs |= {name: get(self) for name, get in getters.items()}
        states, weights = attend(
            self,
            query,
            *cached_states(self, lambda _: (key, value), hidden_states, cache),
            attention_mask,
            scaling=self.scaling,
            dropout=self.attention_dropout,
            **kwargs,
        )
        return getattr(self, output)(states), weights

    return forward


def with_residual_dropout(forward: Forward) -> Forward:
    """Return a `forward` whose output is dropped out with probability `residual_dropout`."""

    def dropped(self: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        states, weights = forward(self, *args, **kwargs)
        return nn.functional.dropout(states, self.residual_dropout, self.training), weights

    return dropped


def _norm(norm: nn.Module, states: Tensor, couples: Tensor, width: int) -> Tensor:
    """Norm the kept channels among zeros. ``[batch, heads, tokens, 2 * couples]`` both ways.

    Args:
        norm: The norm of the dense head.
        states: The kept channels.
        couples: The index of every kept couple, int64 ``[kv_heads, couples]``.
        width: The number of channels of the dense head.
    """
    channels = torch.cat((couples, couples + width // 2), dim=-1)
    channels = channels.repeat_interleave(states.shape[1] // len(couples), 0)
    index = channels.unsqueeze(1).expand(states.shape)
    whole = states.new_zeros(*states.shape[:-1], width).scatter(-1, index, states)
    normed: Tensor = norm(whole).gather(-1, index)
    return normed


def rotate_couples(
    query: Tensor,
    key: Tensor,
    columns: Tensor,
    tables: tuple[Tensor, Tensor] | None,
    neighbours: bool = False,
    upcast: bool = False,
) -> tuple[Tensor, Tensor]:
    """Apply the rotary embedding to the kept couples of queries and keys.

    Args:
        query: ``[batch, heads, tokens, 2 * couples + others]``.
        key: ``[batch, kv_heads, tokens, 2 * couples + others]``.
        columns: The columns of the tables for every kept couple, int64 ``[kv_heads, couples]``.
        tables: Cosines and sines, ``[batch, tokens, head_dim]``, or None to rotate nothing.
        neighbours: Whether the channels of a couple are neighbours.
        upcast: Whether to rotate in float32.
    """
    if tables is None or not columns.numel():
        return query, key
    # [batch, tokens, head_dim] -> [batch, kv_heads, tokens, couples]
    cos, sin = (table[..., columns].transpose(1, 2) for table in tables)
    key = rotate(key, cos, sin, neighbours, upcast)
    groups = query.shape[1] // cos.shape[1]
    cos, sin = (table.repeat_interleave(groups, dim=1) for table in (cos, sin))
    return rotate(query, cos, sin, neighbours, upcast), key


def rotate(
    states: Tensor, cos: Tensor, sin: Tensor, neighbours: bool = False, upcast: bool = False
) -> Tensor:
    """Apply the rotary embedding to the kept couples, which come first in every head.

    Args:
        states: ``[batch, heads, tokens, 2 * couples + others]``.
        cos: ``[batch, heads, tokens, couples]``, gathered for the couples of each head.
        sin: ``[batch, heads, tokens, couples]``, gathered in the same way.
        neighbours: Whether the channels of a couple are neighbours, which they are not in the
            result. Otherwise they are in the half-split layout.
        upcast: Whether to rotate in float32.
    """
    count = 2 * cos.shape[-1]
    couples, others = states[..., :count], states[..., count:]
    couples = couples.float() if upcast else couples
    first, second = (
        (couples[..., ::2], couples[..., 1::2]) if neighbours else couples.chunk(2, dim=-1)
    )
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    turned = turned.to(states.dtype)
    return torch.cat((turned, others), dim=-1) if others.shape[-1] else turned


def rotate_kept(states: Tensor, couples: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary embedding of kept couples in float32, by tables of whole heads.

    Args:
        states: ``[batch, heads, tokens, 2 * couples]``.
        couples: int64 ``[heads, couples]``.
        tables: cosines and sines, ``[batch, tokens, width]``.
    """
    if not couples.numel():
        return states
    cos, sin = (table[..., couples].transpose(1, 2).repeat(1, 1, 1, 2) for table in tables)
    first, second = states.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    # Two casts, as in transformers: gradients are rounded to float32 before they are added up.
    return (states.float() * cos + turned.float() * sin).to(states.dtype)


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


@cache
def slim_class(
    stock: type[nn.Module],
    forward: Forward,
    maker: tuple[Callable[..., nn.Module], tuple[Any, ...]] | None = None,
) -> type[nn.Module]:
    """Return a subclass of a stock attention class that replaces `forward`.

    It also lets a ``state_dict`` say which units its buffers stand for, and refuses weights that
    belong to others: of rotary couples, only the plan knows which were kept. Its modules stay
    instances of the stock class, so output recording and attention backends find them. transformers
    names the key-value cache ``cache`` from 5.24 on, and ``past_key_values`` before; `forward`
    always gets it as ``cache``.

    Args:
        stock: The stock class.
        forward: The function that replaces its `forward`.
        maker: A function and its arguments that return a module of this class without contents, for
            copies and pickles; the class itself has no place where a pickle could find it.
    """

    def call(self: Any, *args: Any, past_key_values: Any = None, **kwargs: Any) -> Any:
        if past_key_values is not None:
            kwargs["cache"] = past_key_values
        return forward(self, *args, **kwargs)

    def reduce(self: Any, protocol: int) -> tuple[Any, ...]:
        return (*(maker or ()), *object.__reduce_ex__(self, protocol)[2:])

    def save(self: Any, destination: Any, prefix: str, keep_vars: bool) -> None:
        stock._save_to_state_dict(self, destination, prefix, keep_vars)
        if hasattr(destination, "_metadata"):
            destination._metadata[prefix[:-1]][_UNITS] = _units_of(self)

    def load(self: Any, state: Any, prefix: str, metadata: Any, *others: Any) -> None:
        if metadata.get(_UNITS) not in (None, _units_of(self)):
            others[-1].append(
                f"{prefix[:-1]} keeps other units than the model that these weights come from; "
                "load them into a model that was extracted with the same plan."
            )
        stock._load_from_state_dict(self, state, prefix, metadata, *others)

    added = {"forward": call, "_save_to_state_dict": save, "_load_from_state_dict": load}
    added |= {"__reduce_ex__": reduce} if maker else {}
    return type(f"Slim{stock.__name__}", (stock,), added)


def _units_of(module: nn.Module) -> str | None:
    """Return a digest of the buffers that say which units a cut attention keeps, or None."""
    buffers = [module._buffers[name] for name in ("couples", "gain") if name in module._buffers]
    values = [value.tolist() for value in buffers if value is not None and not value.is_meta]
    return hashlib.sha256(repr(values).encode()).hexdigest()[:16] if values else None


def _stock(module: nn.Module) -> type:
    return type(module).__mro__[1]
