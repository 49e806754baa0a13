"""Read and write the inner dimension of a pair, head by head."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from solpath.model.linear import linear_map
from solpath.pair import Pair, Side
from solpath.planning.plan import norm_gain

Kept = Mapping[str, Tensor]
"""Pair name to bool ``[heads, width]``: the units that stay."""


def inner_weight(model: nn.Module, pair: Pair, side: Side) -> Tensor:
    """A copy of what a layer has of a pair. float64 ``[heads, repeat, channels * width, n]``."""
    return _view(pair, side, _first(model, side).detach()).double()


def inner_bias(model: nn.Module, pair: Pair, side: Side) -> Tensor:
    """Its bias, of a layer before the inner dimension. ``[heads, repeat, channels * width]``."""
    bias = linear_map(model, side.module).bias
    if bias is None:
        return torch.zeros(pair.heads, side.repeat, pair.channels * pair.width).double()
    return _view(pair, side, bias.detach().unsqueeze(1)).squeeze(-1).double()


@torch.no_grad()
def set_inner_(model: nn.Module, pair: Pair, side: Side, weight: Tensor) -> None:
    """Write what `inner_weight` reads; fewer channels per head are followed by zeros."""
    weight = nn.functional.pad(weight, (0, 0, 0, pair.channels * pair.width - weight.shape[2]))
    _view(pair, side, _first(model, side)).copy_(weight)


@torch.no_grad()
def set_inner_bias_(model: nn.Module, pair: Pair, side: Side, bias: Tensor) -> None:
    """Write what `inner_bias` reads, if the layer has a bias; zeros follow likewise."""
    target = linear_map(model, side.module).bias
    if target is not None:
        bias = nn.functional.pad(bias, (0, pair.channels * pair.width - bias.shape[2]))
        _view(pair, side, target.unsqueeze(1)).squeeze(-1).copy_(bias)


@torch.no_grad()
def add_bias_(model: nn.Module, side: Side, amount: Tensor) -> None:
    """Add ``[outputs]`` to the output bias of a layer, which gets one if it has none."""
    linear = linear_map(model, side.module)
    if linear.bias is not None:
        linear.bias.add_(amount.to(linear.bias))
    elif amount.any():
        model.get_submodule(side.module).bias = nn.Parameter(amount.to(linear.weight))


def keep_units_(model: nn.Module, pairs: Sequence[Pair], kept: Kept) -> None:
    """Set every unit that does not stay to zero on both sides of its pair."""
    for pair in pairs:
        mask = kept[pair.name].double().repeat(1, pair.channels).unsqueeze(1)
        for side in pair.sides:
            set_inner_(model, pair, side, inner_weight(model, pair, side) * mask.unsqueeze(-1))
            if side.axis == 0:
                set_inner_bias_(model, pair, side, inner_bias(model, pair, side) * mask)


def alive_units(model: nn.Module, pair: Pair) -> Tensor:
    """Which units have a weight in the right-hand layer that is not 0, bool ``[heads, width]``."""
    alive = inner_weight(model, pair, pair.right).abs().amax((1, 3)) > 0
    return alive.view(pair.heads, pair.channels, -1).any(1)


def set_gains_(model: nn.Module, pairs: Sequence[Pair], energy: Mapping[str, Tensor]) -> None:
    """Make up for channels that norms over the heads no longer see, as every plan does.

    Args:
        energy: what these norms see in the dense model, see `rivals.moments.Calibration`.
    """
    for pair in pairs:
        if not pair.norms or (mask := alive_units(model, pair)).all():
            continue
        gain, norm = norm_gain(mask.double(), energy[pair.name]).flatten(), pair.norms[0]
        gain = gain.view(-1, *[1] * (-norm.heads_dim - 1))
        model.get_submodule(norm.module).register_forward_hook(_multiplying(gain))


def _multiplying(gain: Tensor) -> Any:
    return lambda module, args, output: output * gain.to(output.dtype)


def outputs(model: nn.Module, pair: Pair) -> Tensor:
    """The right-hand weight of a ``vo`` or ``mlp`` pair, float64 ``[inner channels, outputs]``."""
    return inner_weight(model, pair, pair.right).flatten(0, 2)


def set_outputs_(model: nn.Module, pair: Pair, weight: Tensor) -> None:
    """Write what `outputs` reads."""
    shape = (pair.heads, pair.right.repeat, pair.width, -1)
    set_inner_(model, pair, pair.right, weight.view(shape))


def channels(pair: Pair, units: Tensor) -> Tensor:
    """A value per unit as one per inner channel of the right-hand layer. ``[heads, width]``."""
    return units.unsqueeze(1).expand(-1, pair.right.repeat, -1).flatten()


def remaining(dense: nn.Module, pruned: nn.Module, pairs: Sequence[Pair]) -> float:
    """Share of the prunable parameters left: of what was cut, or of units that are not zero.

    A rival that counts otherwise says so in ``pruned.kept_share``.
    """
    if hasattr(pruned, "kept_share"):
        return pruned.kept_share
    total = sum(pair.cost * pair.units for pair in pairs)
    sizes = [sum(value.numel() for value in model.parameters()) for model in (dense, pruned)]
    if sizes[1] < sizes[0]:
        return 1 - (sizes[0] - sizes[1]) / total
    kept = 0
    for pair in pairs:
        kept += pair.cost * int(alive_units(pruned, pair).sum())
    return kept / total


def _first(model: nn.Module, side: Side) -> Tensor:
    """The weight of a layer with the inner dimension first."""
    linear = linear_map(model, side.module)
    return linear.weight.movedim(linear.outputs if side.axis == 0 else 1 - linear.outputs, 0)


def _view(pair: Pair, side: Side, tensor: Tensor) -> Tensor:
    """The part of a layer that belongs to a pair, by head; shares its memory."""
    inside = pair.channels * pair.width
    part = tensor[side.offset : side.offset + pair.heads * side.repeat * inside]
    return part.unflatten(0, (pair.heads, side.repeat, inside))
