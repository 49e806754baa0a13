"""Read the widths of every layer off a model, and the tensors that its cut class holds beside."""

from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from solpath.arch import Attention, lookup
from solpath.model.linear import linear_map
from solpath.nn.attention import heads_left
from solpath.nn.slim import KEPT_HEADS

Layers = dict[int, dict[str, Any]]
"""Index of a layer to its entries in `per_layer_config`."""

Entries = dict[str, Any]
"""Entries of a configuration."""

Tensors = dict[str, Tensor]
"""Tensors by name."""


def read_widths(model: Any, tensors: Tensors, multiple_of: int) -> tuple[Entries, Tensors]:
    """Read a model.

    Args:
        model: The model.
        tensors: Its parameters and persistent buffers.
        multiple_of: What the size of a head must be a multiple of.

    Returns:
        The widths, as entries of a configuration, and the tensors as the cut class has them.
    """
    if model.config.is_encoder_decoder:
        return {"stack_widths": _stacks(model, multiple_of)}, tensors
    layers, tensors = _stack(model, tensors, multiple_of)
    return {"head_dim": dense_width(model.config), "per_layer_config": layers}, tensors


def _stack(model: Any, tensors: Tensors, multiple_of: int) -> tuple[Layers, Tensors]:
    """Read a model with one stack of blocks, of which each has one attention."""
    [stack] = lookup(model.config.model_type)
    [table], [mlp] = stack.attentions, stack.mlps
    base, width = model.base_model, dense_width(model.config)
    layers: Layers = {}
    tensors = dict(tensors)
    for index, block in enumerate(base.get_submodule(stack.blocks)):
        attention = block.get_submodule(table.module)
        neurons = linear_map(block, mlp.right).in_features
        sizes = _sizes(block, table, multiple_of)
        layers[index] = {**sizes, "intermediate_size": neurons}
        if table.rotary:
            prefix = "" if base is model else f"{model.base_model_prefix}."
            path = f"{prefix}{stack.blocks}.{index}.{table.module}"
            couples = attention._buffers.get("couples")
            if couples is None:
                couples = torch.arange(width // 2).expand(head_counts(attention, table)[1], -1)
            tensors[f"{path}.couples"] = couples.contiguous()
            tensors |= _norms(attention, couples, width, path) if table.norms else {}
    return layers, tensors


def dense_width(config: Any) -> int:
    """Return the number of channels of a head of the dense model."""
    width: int = getattr(config, "head_dim", None) or (
        config.hidden_size // config.num_attention_heads
    )
    return width


def _stacks(model: Any, multiple_of: int) -> dict[str, list[dict[str, Any]]]:
    """Read the stacks of T5: name to an entry for every block."""
    result: dict[str, list[dict[str, Any]]] = {}
    for stack in lookup(model.config.model_type):
        name = stack.blocks.partition(".")[0]
        result[name] = []
        for block in model.get_submodule(stack.blocks):
            entry: dict[str, Any] = {}
            for table in stack.attentions:
                part = table.module.rpartition(".")[2]
                entry[part] = _sizes(block, table, multiple_of)
                kept = block.get_submodule(table.module)._buffers.get(KEPT_HEADS)
                if kept is not None:  # all layers of a stack share one bias for every dense head
                    entry[part]["kept_heads"] = kept.tolist()
            right = linear_map(block, stack.mlps[0].right)
            result[name].append(entry | {"intermediate_size": right.in_features})
    return result


def head_counts(attention: nn.Module, table: Attention) -> tuple[int, int]:
    """Return how many query heads and how many key-value heads an attention has left.

    Args:
        attention: The attention of an extracted or dense model.
        table: Its table.
    """
    heads = attrgetter(table.heads)(attention)
    dense = attrgetter(table.kv_heads)(attention) if table.kv_heads else heads
    left = heads_left(attention, dense)
    return left * (heads // dense), left


def _sizes(block: nn.Module, table: Attention, multiple_of: int) -> dict[str, Any]:
    heads, kv_heads = head_counts(block.get_submodule(table.module), table)
    value = linear_map(block, table.output).in_features // heads
    query_key = linear_map(block, table.query).out_features // heads
    if table.query == table.value:  # one layer for queries, keys and values
        query_key = (query_key - value) // 2
    head = -(-max(query_key, value, 1) // multiple_of) * multiple_of
    sizes = {"query_key_dim": query_key, "value_dim": value, "head_dim": head}
    counts = {"num_attention_heads": heads} | (
        {"num_key_value_heads": kv_heads} if table.kv_heads else {}
    )
    return sizes | counts


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
