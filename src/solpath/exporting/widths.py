"""Read the widths of every layer off a model, and the tensors that its cut class holds beside."""

from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from solpath.arch import lookup
from solpath.model.linear import linear_map

Layers = dict[int, dict[str, Any]]
"""Index of a layer to its entries in `per_layer_config`."""

Tensors = dict[str, Tensor]
"""Tensors by name."""


def read_widths(model: Any, tensors: Tensors, multiple_of: int) -> tuple[Layers, Tensors]:
    """Read a model with one stack of blocks.

    Args:
        model: The model.
        tensors: Its parameters and persistent buffers.
        multiple_of: What the size of a head must be a multiple of.

    Returns:
        The widths, and the tensors as the cut class has them.
    """
    [stack] = lookup(model.config.model_type)
    [table], [mlp] = stack.attentions, stack.mlps
    base, width = model.base_model, dense_width(model.config)
    layers: Layers = {}
    tensors = dict(tensors)
    for index, block in enumerate(base.get_submodule(stack.blocks)):
        attention = block.get_submodule(table.module)
        heads = attrgetter(table.heads)(attention)
        kv_heads = attrgetter(table.kv_heads)(attention) if table.kv_heads else heads
        value = linear_map(block, table.output).in_features // heads
        query_key = linear_map(block, table.query).out_features // heads
        if table.query == table.value:  # one layer for queries, keys and values
            query_key = (query_key - value) // 2
        neurons = linear_map(block, mlp.right).in_features
        layers[index] = _sizes(query_key, value, multiple_of) | {"intermediate_size": neurons}
        if table.rotary:
            prefix = "" if base is model else f"{model.base_model_prefix}."
            path = f"{prefix}{stack.blocks}.{index}.{table.module}"
            couples = attention._buffers.get("couples")
            if couples is None:
                couples = torch.arange(width // 2).expand(kv_heads, -1)
            tensors[f"{path}.couples"] = couples.contiguous()
            tensors |= _norms(attention, couples, width, path) if table.norms else {}
    return layers, tensors


def dense_width(config: Any) -> int:
    """Return the number of channels of a head of the dense model."""
    width: int = getattr(config, "head_dim", None) or (
        config.hidden_size // config.num_attention_heads
    )
    return width


def _sizes(query_key: int, value: int, multiple_of: int) -> dict[str, Any]:
    common = max(query_key, value, 1)
    head = -(-common // multiple_of) * multiple_of
    return {"query_key_dim": query_key, "value_dim": value, "head_dim": head}


def _norms(attention: Any, couples: Tensor, width: int, path: str) -> Tensors:
    """Return the weights of the norms for every head, on its channels; queries have their gain."""
    channels = torch.cat((couples, couples + width // 2), dim=-1)
    weights = [_norm_weight(norm)[channels] for norm in (attention.q_norm, attention.k_norm)]
    query, key = (weight.unsqueeze(1) for weight in weights)
    query = query.repeat_interleave(attention.num_key_value_groups, 0)
    if (gain := attention._buffers.get("gain")) is not None:
        query = query * gain.to(query.dtype).view(-1, 1, 1)
    return {f"{path}.q_norm.weight": query, f"{path}.k_norm.weight": key}


def _norm_weight(norm: Any) -> Tensor:
    """Return the factors of a norm, which Gemma stores less 1."""
    weight: Tensor = norm.weight.detach()
    return 1 + weight if type(norm).__name__.startswith("Gemma") else weight
