"""Attention with rotary embeddings, of which couples of channels are kept."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from solpath.nn.attention import attend, cached_states, getter, heads_left, split_heads
from solpath.nn.slim import Forward


def project_apart(self: Any, hidden: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries, keys and values ``[batch, heads, tokens, width]`` of three projections."""
    repeat = self.num_key_value_groups
    kv_heads = heads_left(self, self.config.num_attention_heads // repeat)
    heads = kv_heads * repeat
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
    getters = {name: getter(path) for name, path in extras.items() if path}

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
                columns = self.couples if table == 1 else self.couples * table
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
    groups = query.view(query.shape[0], cos.shape[1], -1, *query.shape[2:])  # by key-value head
    cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
    return rotate(groups, cos, sin, neighbours, upcast).flatten(1, 2), key


def rotate(
    states: Tensor, cos: Tensor, sin: Tensor, neighbours: bool = False, upcast: bool = False
) -> Tensor:
    """Apply the rotary embedding to the kept couples, which come first in every head.

    Args:
        states: ``[..., tokens, 2 * couples + others]``.
        cos: ``[..., tokens, couples]``, gathered for the couples of each head.
        sin: ``[..., tokens, couples]``, gathered in the same way.
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
