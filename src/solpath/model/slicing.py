"""Cut parameters; no other module cuts a tensor."""

import torch
from torch import Tensor, nn

from solpath.model.linear import LinearMap


def cut(values: Tensor, index: Tensor, dim: int) -> Tensor:
    """Return a new tensor that keeps some entries of one dimension.

    Args:
        values: A tensor of any shape, which is left untouched. It may be on the meta device.
        index: Entries to keep, int64 ``[r]``, in the order that they will have.
        dim: The dimension that is cut to r.

    Returns:
        The new tensor, with the dtype and device of the old one.
    """
    return values.index_select(dim, index.to(values.device))


def cut_experts(values: Tensor, index: Tensor, dim: int) -> Tensor:
    """Return new weights of experts that keep some entries of one dimension of each.

    Args:
        values: Weights whose first dimension runs over experts. They are left untouched.
        index: Entries to keep, int64 ``[experts * r]``, ascending. They count through all experts.
        dim: The dimension that is cut to r, at least 1.

    Returns:
        The new weights, with the dtype and device of the old ones.
    """
    experts, size = len(values), values.shape[dim]
    index = index.view(experts, len(index) // experts) - size * torch.arange(experts).unsqueeze(1)
    parts = zip(values, index.to(values.device), strict=True)
    return torch.stack([part.index_select(dim - 1, own) for part, own in parts])


def cut_linear(linear: LinearMap, index: Tensor, axis: int) -> dict[int, nn.Parameter]:
    """Return the new parameters of a layer that is cut, by the `id` of the old ones.

    Args:
        linear: The layer, which is left untouched.
        index: Channels to keep, int64 ``[r]``.
        axis: 0 keeps these outputs with their biases; 1 keeps these inputs and the whole bias.

    Returns:
        The `id` of every parameter that changes, to the parameter that takes its place, with the
        dtype and `requires_grad` of the old one, on the device that its data lie on.
    """
    keep = cut if linear.neurons is None else cut_experts
    changed = [(linear.weight, linear.dim(axis))]
    if linear.bias is not None and axis == 0:
        changed.append((linear.bias, linear.bias.dim() - 1))
    return {
        id(old): nn.Parameter(keep(linear.read(old), index, dim), requires_grad=old.requires_grad)
        for old, dim in changed
    }


def resize_(layer: nn.Module) -> None:
    """Set the sizes that a layer states about itself to those of its cut parameters.

    A `Conv1D` also changes its class, to one that runs with no inputs or no outputs. So do experts,
    to one that runs with any number of neurons.
    """
    from transformers.pytorch_utils import Conv1D

    from solpath.nn.conv1d import CutConv1D
    from solpath.nn.experts import cut_experts_, is_experts

    if isinstance(layer, nn.Linear):
        layer.out_features, layer.in_features = layer.weight.shape
    elif isinstance(layer, Conv1D):
        layer.nx, layer.nf = layer.weight.shape
        layer.__class__ = CutConv1D
    elif is_experts(layer):
        cut_experts_(layer)
