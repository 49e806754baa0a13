"""The only code that cuts a tensor."""

from torch import Tensor, nn

from solpath.model.linear import LinearMap


def cut(parameter: nn.Parameter, index: Tensor, dim: int) -> nn.Parameter:
    """A new parameter with the kept entries of one dimension; `parameter` is left untouched.

    Args:
        parameter: any shape; may live on the meta device.
        index: int64 ``[r]``, what to keep, in the order it will have.
        dim: the dimension that is cut to r.

    Returns:
        Same dtype, device and requires_grad.
    """
    kept = parameter.detach().index_select(dim, index.to(parameter.device))
    return nn.Parameter(kept, requires_grad=parameter.requires_grad)


def cut_linear(linear: LinearMap, index: Tensor, axis: int) -> dict[int, nn.Parameter]:
    """What to put in place of the parameters of a layer: id of the old one to the new one.

    Args:
        linear: left untouched.
        index: int64 ``[r]``, channels to keep.
        axis: 0 keeps outputs, with their bias; 1 keeps inputs, and the bias whole.
    """
    outputs = linear.outputs
    if axis == 1:
        return {id(linear.weight): cut(linear.weight, index, 1 - outputs)}
    small = {id(linear.weight): cut(linear.weight, index, outputs)}
    if linear.bias is not None:
        small[id(linear.bias)] = cut(linear.bias, index, 0)
    return small


def resize_(layer: nn.Module) -> None:
    """Let a layer whose parameters were cut know its sizes."""
    from transformers.pytorch_utils import Conv1D

    from solpath.nn.conv1d import CutConv1D

    if isinstance(layer, nn.Linear):
        layer.out_features, layer.in_features = layer.weight.shape
    elif isinstance(layer, Conv1D):
        layer.nx, layer.nf = layer.weight.shape
        layer.__class__ = CutConv1D
