"""Linear layers of any class, seen alike: a weight, a bias, and which dimension is the output."""

from dataclasses import dataclass
from typing import Any

from torch import nn
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
