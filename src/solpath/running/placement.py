"""Where accelerate keeps a model: its hooks, the devices that it runs on, weights off-loaded.

accelerate spreads a model over devices, or off-loads its weights, by hooks on modules. A hook moves
inputs to the device on which its module runs; one that off-loads also fills the weights of its
module in before each call and empties them afterwards, to the meta device.
"""

from collections import ChainMap
from collections.abc import Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn

from solpath.errors import UnsupportedModelError


class _Replaced(ChainMap[str, Tensor]):
    """The off-loaded weights of a module, some of them replaced."""


def placing_hooks(module: nn.Module) -> list[Any]:
    """Return the hooks by which accelerate places a module, in the order they run.

    Other hooks of accelerate, of a user for example, are not among them.
    """
    return [hook for hook in _hooks(module) if _places(hook)]


def other_hook(module: nn.Module) -> type | None:
    """Return the class of a hook of accelerate on a module that does more than to place it."""
    return next((type(hook) for hook in _hooks(module) if not _places(hook)), None)


def _hooks(module: nn.Module) -> list[Any]:
    hook: Any = vars(module).get("_hf_hook")
    return [] if hook is None else list(getattr(hook, "hooks", [hook]))


def _places(hook: Any) -> bool:
    kind = type(hook)
    names = ("AlignDevicesHook", "CpuOffload")
    return kind.__module__ == "accelerate.hooks" and kind.__name__ in names


def own_forward(module: nn.Module) -> Any:
    """Return the `forward` that was set on a module itself, behind accelerate's hooks, or None."""
    return vars(module).get("_old_forward" if _hooks(module) else "forward")


def execution_device(module: nn.Module) -> torch.device | None:
    """Return the device on which accelerate runs a module, or None if it has no say in that."""
    for hook in placing_hooks(module):
        if hook.execution_device is not None:
            return torch.empty(0, device=hook.execution_device).device  # "cuda" gets its index
    return None


def home_of(model: nn.Module) -> torch.device | None:
    """Return the device for a copy of a model that accelerate places; None for any other model.

    That is the device that all weights lie on, and the CPU if they are spread or off-loaded.
    """
    if not any(placing_hooks(module) for module in model.modules()):
        return None
    return torch.device("cpu") if is_placed(model) else next(model.parameters()).device


def is_placed(model: nn.Module) -> bool:
    """Return whether accelerate keeps weights of a model elsewhere than on one device.

    That is so if some are off-loaded, or if modules run on several devices. A model that is moved
    as a whole, by `accelerate.cpu_offload_with_hook`, is on one device.
    """
    hooked = [module for module in model.modules() if placing_hooks(module)]
    if not hooked:
        return False
    devices = {execution_device(module) for module in hooked} - {None}
    devices |= {parameter.device for parameter in model.parameters()}
    return len(devices) > 1 or any(offloads(module) for module in hooked)


def offloads(module: nn.Module) -> bool:
    """Return whether accelerate off-loads the weights of a module between its calls."""
    return any(getattr(hook, "offload", False) for hook in placing_hooks(module))


def check_whole(model: nn.Module, what: str) -> None:
    """Raise `UnsupportedModelError` if accelerate keeps weights elsewhere than on one device.

    Args:
        model: The model.
        what: What a message says that the model cannot be, for example ``"measured"``.
    """
    if is_placed(model):
        raise UnsupportedModelError(
            f"accelerate keeps the weights of this {type(model).__name__} off its device, or on "
            f"several devices, where it cannot be {what}; load it on one device, without "
            "device_map= and without off-loading."
        )


def check_one_device(model: nn.Module, what: str) -> None:
    """Raise `UnsupportedModelError` if accelerate runs a model on several devices.

    Weights that are off-loaded from the one device that it runs on are no obstacle.

    Args:
        model: The model.
        what: What a message says that the model cannot be, for example ``"compared"``.
    """
    devices = {execution_device(module) for module in model.modules()} - {None}
    if len(devices) > 1:
        names = " and ".join(sorted(map(str, devices)))
        raise UnsupportedModelError(
            f"accelerate runs this {type(model).__name__} on {names}, where it cannot be {what} "
            "layer by layer; load it on one device, with what does not fit off-loaded: "
            "device_map='auto' with max_memory={0: ..., 'cpu': ...}."
        )


def weight_at(module: nn.Module, name: str, weights: Mapping[str, Tensor] | None = None) -> Tensor:
    """Return the data of a parameter or a buffer of a module, also if it is off-loaded.

    Args:
        module: The module that has the tensor.
        name: Its name in the module.
        weights: The off-loaded weights of the module, from `off_loaded_weights`. None asks for
            them.

    Returns:
        The tensor, detached, in the dtype that the model runs with. It is the tensor of the model
        itself, or what accelerate keeps or reads in place of it; do not write to it. A tensor on
        the meta device that is not off-loaded comes back as it is.
    """
    found = module._parameters.get(name)
    value: Tensor = (module._buffers[name] if found is None else found).detach()  # type: ignore[union-attr]
    weights = off_loaded_weights(module) if weights is None else weights
    if weights is None or not value.is_meta:
        return value
    try:
        return weights[name].detach().to(value.dtype)
    except KeyError:
        return value


def put_weight_(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """Let a module run with another parameter, also if accelerate off-loads the module's own.

    Args:
        module: The module.
        name: The name of the parameter in the module.
        parameter: The parameter. The module's own, put back, undoes an earlier call.
    """
    for hook in placing_hooks(module):
        if not getattr(hook, "offload", False):
            continue
        weights = hook.weights_map
        if not parameter.is_meta:
            if not isinstance(weights, _Replaced):
                hook.weights_map = weights = _Replaced({}, weights)
            weights[name] = parameter.detach()
        elif isinstance(weights, _Replaced):
            weights.maps[0].pop(name, None)
            if not weights.maps[0]:
                hook.weights_map = weights.maps[1]
        return
    module._parameters[name] = parameter


def off_loaded_weights(module: nn.Module) -> Mapping[str, Tensor] | None:
    """Return where accelerate keeps the weights of a module, by name; None if it keeps none."""
    for hook in placing_hooks(module):
        if getattr(hook, "offload", False):
            weights: MutableMapping[str, Tensor] = hook.weights_map
            return weights
    return None
