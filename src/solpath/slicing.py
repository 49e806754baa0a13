"""The only code that cuts a tensor."""

from torch import Tensor, nn


def slice_linear(linear: nn.Linear, index: Tensor, axis: int) -> nn.Linear:
    """A new linear layer with the kept rows or columns; `linear` is left untouched.

    Args:
        linear: weight ``[out, in]``, bias ``[out]`` or none; may live on the meta device.
        index: int64 ``[r]``, channels to keep, in the order they will have.
        axis: 0 keeps rows (outputs, with their bias), 1 keeps columns (inputs; bias whole).

    Returns:
        Layer with weight ``[r, in]`` or ``[out, r]``, same dtype, device, mode, requires_grad.
    """
    index = index.to(linear.weight.device)
    small = nn.Linear(1, 1, bias=linear.bias is not None, device="meta")
    small.weight = _parameter(linear.weight, linear.weight.detach().index_select(axis, index))
    small.out_features, small.in_features = small.weight.shape
    if linear.bias is not None:
        bias = linear.bias.detach()
        bias = bias.index_select(0, index) if axis == 0 else bias.clone()
        small.bias = _parameter(linear.bias, bias)
    return small.train(linear.training)


def _parameter(like: Tensor, value: Tensor) -> nn.Parameter:
    return nn.Parameter(value, requires_grad=like.requires_grad)
