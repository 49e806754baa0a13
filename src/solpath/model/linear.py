"""Linear layers of any class, seen alike: a weight, a bias, and which dimension is the output."""

from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils import parametrize

from solpath.errors import UnsupportedModelError


@dataclass(frozen=True)
class LinearMap:
    """Weight and bias of a linear layer, whatever its class.

    Attributes:
        weight: The weight, ``[out, in]``, or ``[in, out]`` when `outputs` is 1.
        bias: The bias, ``[out]``, or None.
        outputs: The dimension of `weight` that runs over outputs, 0 or 1.
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
        """Return the weight, and the bias if there is one, by name."""
        found = {"weight": self.weight}
        return found if self.bias is None else found | {"bias": self.bias}


def linear_map(model: nn.Module, path: str) -> LinearMap:
    """Return the linear map of the layer at `path`.

    For an `nn.MultiheadAttention` it is the input projection of query, key and value together.

    Args:
        model: The model. Its parameters are returned as they are, not copied.
        path: Dotted path of the layer.

    Returns:
        The linear map.

    Raises:
        UnsupportedModelError: The layer is of another class, for example quantised or wrapped.
    """
    from transformers.pytorch_utils import Conv1D

    from solpath.nn.conv1d import CutConv1D

    layer: Any = model.get_submodule(path)
    kind = type(layer)
    if kind in (nn.Linear, NonDynamicallyQuantizableLinear) or is_falcon(kind):
        return LinearMap(layer.weight, layer.bias)
    if kind in (Conv1D, CutConv1D):
        return LinearMap(layer.weight, layer.bias, outputs=1)
    if (
        isinstance(layer, nn.MultiheadAttention)
        and kind.forward.__module__ in _MULTIHEAD
        and layer.in_proj_weight is not None
    ):
        return LinearMap(layer.in_proj_weight, layer.in_proj_bias)
    if parametrize.is_parametrized(layer):
        name = next(iter(layer.parametrizations))
        raise UnsupportedModelError(
            f"{path}.{name} is parametrised; call torch.nn.utils.parametrize."
            f"remove_parametrizations(layer, {name!r}) on it first."
        )
    raise UnsupportedModelError(
        f"{path} is a {kind.__module__}.{kind.__name__}, not a plain nn.Linear; "
        "prune before quantising, and merge adapters first."
    )


# Where `forward` of an `nn.MultiheadAttention` comes from: its own, or that of a cut or masked one.
_MULTIHEAD = (nn.MultiheadAttention.forward.__module__, "solpath.nn.slim")


def is_falcon(kind: type) -> bool:
    """Return whether a class is Falcon's linear layer, which rounds in another place."""
    return (kind.__module__, kind.__name__) == (
        "transformers.models.falcon.modeling_falcon",
        "FalconLinear",
    )
