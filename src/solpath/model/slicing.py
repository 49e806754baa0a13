"""Cut parameters; no other module cuts a tensor."""

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


def cut_linear(linear: LinearMap, index: Tensor, axis: int) -> dict[int, nn.Parameter]:
    """Return the new parameters of a layer that is cut, by the `id` of the old ones.

    Args:
        linear: The layer, which is left untouched.
        index: Channels to keep, int64 ``[r]``.
        axis: 0 keeps these outputs with their biases; 1 keeps these inputs and the whole bias.

    Returns:
        The `id` of every parameter that changes, to the parameter that takes its place.
    """
    outputs = linear.outputs
    if axis == 1:
        return {id(linear.weight): cut(linear.weight, index, 1 - outputs)}
    small = {id(linear.weight): cut(linear.weight, index, outputs)}
    if linear.bias is not None:
        small[id(linear.bias)] = cut(linear.bias, index, 0)
    return small


def resize_(layer: nn.Module) -> None:
    """Set the sizes that a layer states about itself to those of its cut parameters.

    A `Conv1D` also changes its class, to one that runs with no inputs or no outputs.
    """
    from transformers.pytorch_utils import Conv1D

    from solpath.nn.conv1d import CutConv1D

    if isinstance(layer, nn.Linear):
        layer.out_features, layer.in_features = layer.weight.shape
    elif isinstance(layer, Conv1D):
        layer.nx, layer.nf = layer.weight.shape
        layer.__class__ = CutConv1D
