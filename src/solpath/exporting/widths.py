"""Read the widths of every layer off a model, and the tensors that its cut class holds beside."""

from typing import Any

import torch
from torch import Tensor, nn

Layers = dict[int, dict[str, Any]]
"""Index of a layer to its entries in `per_layer_config`."""

Tensors = dict[str, Tensor]
"""Tensors by name."""


def decoder_widths(model: Any, tensors: Tensors, multiple_of: int) -> tuple[Layers, Tensors]:
    """Read a decoder with rotary couples.

    Args:
        model: The model.
        tensors: Its parameters and persistent buffers.
        multiple_of: What the size of a head must be a multiple of.

    Returns:
        The widths, and the tensors as the cut class has them.
    """
    config, base, width = model.config, model.base_model, dense_width(model.config)
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    prefix = "" if base is model else f"{model.base_model_prefix}."
    layers: Layers = {}
    tensors = dict(tensors)
    for index, layer in enumerate(base.layers):
        attention, path = layer.self_attn, f"{prefix}layers.{index}"
        couples = attention._buffers.get("couples")
        if couples is None:
            couples = torch.arange(width // 2).expand(kv_heads, -1)
        query_key = attention.q_proj.out_features // heads
        value = attention.v_proj.out_features // kv_heads
        neurons = layer.mlp.down_proj.in_features
        layers[index] = _widths(query_key, value, multiple_of) | {"intermediate_size": neurons}
        tensors[f"{path}.self_attn.couples"] = couples.contiguous()
        if isinstance(getattr(attention, "q_norm", None), nn.Module):
            tensors |= _norms(attention, couples, width, f"{path}.self_attn")
        if not neurons and f"{path}.mlp.down_proj.bias" in tensors:
            tensors[f"{path}.mlp.bias"] = tensors.pop(f"{path}.mlp.down_proj.bias")
    return layers, tensors


def dense_width(config: Any) -> int:
    """Return the number of channels of a head of the dense model."""
    width: int = getattr(config, "head_dim", None) or (
        config.hidden_size // config.num_attention_heads
    )
    return width


def _widths(query_key: int, value: int, multiple_of: int) -> dict[str, Any]:
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
