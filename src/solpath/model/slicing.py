"""Cut parameters; no other module cuts a tensor."""

import torch
from torch import Tensor, nn

from solpath.model.linear import LinearMap


def cut(parameter: nn.Parameter, index: Tensor, dim: int) -> nn.Parameter:
    """Return a new parameter that keeps some entries of one dimension.

    Args:
        parameter: A parameter of any shape, which is left untouched. It may be on the meta device.
        index: Entries to keep, int64 ``[r]``, in the order that they will have.
        dim: The dimension that is cut to r.

    Returns:
        The new parameter, with the dtype, device and `requires_grad` of the old one.
    """
    kept = parameter.detach().index_select(dim, index.to(parameter.device))
    return nn.Parameter(kept, requires_grad=parameter.requires_grad)


def cut_experts(parameter: nn.Parameter, index: Tensor, dim: int) -> nn.Parameter:
    """Return a new parameter of experts that keeps some entries of one dimension of each.

    Args:
        parameter: A parameter whose first dimension runs over experts. It is left untouched.
        index: Entries to keep, int64 ``[experts * r]``, ascending. They count through all experts.
        dim: The dimension that is cut to r, at least 1.

    Returns:
        The new parameter, with the dtype, device and `requires_grad` of the old one.
    """
    experts, size = len(parameter), parameter.shape[dim]
    index = index.view(experts, len(index) // experts) - size * torch.arange(experts).unsqueeze(1)
    parts = zip(parameter.detach(), index.to(parameter.device), strict=True)
    kept = torch.stack([part.index_select(dim - 1, own) for part, own in parts])
    return nn.Parameter(kept, requires_grad=parameter.requires_grad)


def cut_linear(linear: LinearMap, index: Tensor, axis: int) -> dict[int, nn.Parameter]:
    """Return the new parameters of a layer that is cut, by the `id` of the old ones.

    Args:
        linear: The layer, which is left untouched.
        index: Channels to keep, int64 ``[r]``.
        axis: 0 keeps these outputs with their biases; 1 keeps these inputs and the whole bias.

    Returns:
        The `id` of every parameter that changes, to the parameter that takes its place.
    """
    keep = cut if linear.neurons is None else cut_experts
    small = {id(linear.weight): keep(linear.weight, index, linear.dim(axis))}
    if linear.bias is not None and axis == 0:
        small[id(linear.bias)] = keep(linear.bias, index, linear.bias.dim() - 1)
    return small


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
