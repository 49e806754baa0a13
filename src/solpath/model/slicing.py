"""The only code that cuts a tensor, and what it knows of the layers it cuts."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from solpath.errors import UnsupportedModelError


@dataclass(frozen=True)
class LinearMap:
    """Weight and bias of a linear layer, whatever its class.

    Attributes:
        weight: ``[out, in]``, or ``[in, out]`` when `outputs` is 1.
        bias: ``[out]`` or None.
        outputs: the dimension of `weight` that runs over outputs.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    outputs: int = 0

    @property
    def out_features(self) -> int:
        """Number of outputs."""
        return self.weight.shape[self.outputs]

    @property
    def in_features(self) -> int:
        """Number of inputs."""
        return self.weight.shape[1 - self.outputs]

    def parameters(self) -> dict[str, nn.Parameter]:
        """The weight, and the bias if there is one."""
        found = {"weight": self.weight}
        return found if self.bias is None else found | {"bias": self.bias}


def linear_map(model: nn.Module, path: str) -> LinearMap:
    """The linear map of the layer at `path`; the input projection of a `nn.MultiheadAttention`.

    Raises:
        UnsupportedModelError: any other class, such as a quantised or wrapped layer.
    """
    from transformers.pytorch_utils import Conv1D

    layer: Any = model.get_submodule(path)
    kind = type(layer)
    if kind is nn.Linear or kind is NonDynamicallyQuantizableLinear:
        return LinearMap(layer.weight, layer.bias)
    if isinstance(layer, Conv1D):
        return LinearMap(layer.weight, layer.bias, outputs=1)
    if isinstance(layer, nn.MultiheadAttention) and layer.in_proj_weight is not None:
        return LinearMap(layer.in_proj_weight, layer.in_proj_bias)
    raise UnsupportedModelError(
        f"{path} is a {kind.__module__}.{kind.__name__}, not a plain nn.Linear; "
        "prune before quantising, and merge adapters first."
    )


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


def refit_(layer: nn.Module) -> None:
    """Let a layer whose parameters were cut know its sizes."""
    from transformers.pytorch_utils import Conv1D

    from solpath.nn.conv1d import CutConv1D

    if isinstance(layer, nn.Linear):
        layer.out_features, layer.in_features = layer.weight.shape
    elif isinstance(layer, Conv1D):
        layer.nx, layer.nf = layer.weight.shape
        layer.__class__ = CutConv1D
