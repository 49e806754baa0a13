"""Linear layers of any class, seen alike: a weight, a bias, and which dimension is the output."""

from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils import parametrize

from solpath.errors import UnsupportedModelError
from solpath.running.placement import weight_at


@dataclass(frozen=True)
class LinearMap:
    """Weight and bias of a linear layer, whatever its class.

    The weights of all experts of a mixture are one layer too. Their neurons, one expert after the
    other, are its outputs before the neurons and its inputs after them.

    Attributes:
        layer: The module that has the parameters.
        weight: The weight, ``[out, in]``, or ``[in, out]`` when `outputs` is 1; of experts
            ``[experts, out, in]`` or ``[experts, in, out]``.
        bias: The bias, ``[out]`` or ``[experts, out]``, or None.
        outputs: The dimension of the weight, or of that of one expert, that runs over outputs, 0
            or 1.
        neurons: For experts, the axis of their neurons: 0 for outputs, 1 for inputs. Else None.
    """

    layer: nn.Module
    weight: nn.Parameter
    bias: nn.Parameter | None
    outputs: int = 0
    neurons: int | None = None

    @property
    def out_features(self) -> int:
        """Number of outputs."""
        return self._features(0)

    @property
    def in_features(self) -> int:
        """Number of inputs."""
        return self._features(1)

    def dim(self, axis: int) -> int:
        """Return the dimension of the weight that runs over outputs (axis 0) or inputs (axis 1).

        For experts it runs over those of one expert.
        """
        return (self.outputs if axis == 0 else 1 - self.outputs) + (self.neurons is not None)

    def read(self, parameter: nn.Parameter) -> Tensor:
        """Return the data of the weight or of the bias, also if accelerate has off-loaded it.

        Args:
            parameter: `weight` or `bias`, which has the shape and the dtype, but may have no data.

        Returns:
            The data, detached; see `weight_at`.
        """
        if not parameter.is_meta:
            return parameter.detach()
        own = self.layer._parameters.items()
        return weight_at(self.layer, next(name for name, value in own if value is parameter))

    def _features(self, axis: int) -> int:
        experts = self.weight.shape[0] if axis == self.neurons else 1
        return experts * self.weight.shape[self.dim(axis)]

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return the weight, and the bias if there is one, by name."""
        found = {"weight": self.weight}
        return found if self.bias is None else found | {"bias": self.bias}


def layer_at(model: nn.Module, path: str) -> nn.Module:
    """Return the module that runs the layer at `path`.

    Args:
        model: The model.
        path: Dotted path of the layer. If it is that of the weights of experts, their module is
            returned.

    Raises:
        AttributeError: There is no such module.
    """
    module: Any = model
    try:  # an order of magnitude faster than get_submodule
        for name in path.split("."):
            module = module if _holds(module, name) else module._modules[name]
    except KeyError:
        return model.get_submodule(path)
    return cast("nn.Module", module)


def _holds(module: nn.Module, name: str) -> bool:
    """Return whether a module has weights of experts of this name, parametrised or not."""
    parametrized: Any = module._modules.get("parametrizations") or ()
    return name in module._parameters or name in parametrized


def linear_map(model: nn.Module, path: str) -> LinearMap:
    """Return the linear map of the layer at `path`.

    For an `nn.MultiheadAttention` it is the input projection of query, key and value together.

    Args:
        model: The model. Its parameters are returned as they are, not copied.
        path: Dotted path of the layer, or of the weights of experts.

    Returns:
        The linear map.

    Raises:
        UnsupportedModelError: The layer is of another class, for example quantised or wrapped.
    """
    from transformers.pytorch_utils import Conv1D

    from solpath.nn.conv1d import CutConv1D
    from solpath.nn.experts import is_experts

    layer: Any = layer_at(model, path)
    kind = type(layer)
    name = path.rpartition(".")[2]
    if is_experts(layer) and name in layer._parameters and not parametrize.is_parametrized(layer):
        return LinearMap(
            layer,
            layer._parameters[name],
            layer._parameters.get(f"{name}_bias"),
            outputs=int(layer.is_transposed),
            neurons=int(name == "down_proj"),
        )
    if kind in (nn.Linear, NonDynamicallyQuantizableLinear) or is_falcon(kind):
        return LinearMap(layer, layer.weight, layer.bias)
    if kind in (Conv1D, CutConv1D):
        return LinearMap(layer, layer.weight, layer.bias, outputs=1)
    if (
        isinstance(layer, nn.MultiheadAttention)
        and kind.forward.__module__ in _MULTIHEAD
        and layer.in_proj_weight is not None
    ):
        return LinearMap(layer, layer.in_proj_weight, layer.in_proj_bias)
    if parametrize.is_parametrized(layer):
        name = next(iter(layer.parametrizations))
        raise UnsupportedModelError(
            f"{name} of {path} is parametrised; call torch.nn.utils.parametrize."
            f"remove_parametrizations(layer, {name!r}) on it first."
        )
    raise UnsupportedModelError(
        f"{path} is a {kind.__module__}.{kind.__name__}, not a plain nn.Linear; "
        "prune before quantising (load the checkpoint that it was quantised from), and merge "
        "adapters first."
    )


# Where `forward` of an `nn.MultiheadAttention` comes from: its own, or that of a cut or masked one.
_MULTIHEAD = (nn.MultiheadAttention.forward.__module__, "solpath.nn.slim")


def is_falcon(kind: type) -> bool:
    """Return whether a class is Falcon's linear layer, which rounds in another place."""
    return (kind.__module__, kind.__name__) == (
        "transformers.models.falcon.modeling_falcon",
        "FalconLinear",
    )
