"""Weights that accelerate may have off-loaded or spread over devices: count them, and copy them."""

import copy
from collections.abc import Iterator
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from solpath.running.placement import is_placed, own_forward, placing_hooks, weight_at

Model = TypeVar("Model", bound=nn.Module)

# What accelerate sets on a model that it spreads: `to` and its like belong to the model itself.
_LEFT_BEHIND = ("hf_device_map", "to", "cuda", "npu", "xpu", "mlu", "sdaa", "musa", "neuron")


def distinct_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield every parameter of a model by its first name, a tied one once.

    Off-loaded parameters that are tied are objects of their own; transformers knows of them.

    Args:
        model: The model, which is only looked at.
    """
    seen: set[str] = set()
    tied = tied_names(model)
    for name, parameter in model.named_parameters():
        first = tied.get(name, name)
        if first not in seen:
            seen.add(first)
            yield name, parameter


def tied_names(model: nn.Module) -> dict[str, str]:
    """Return what names of off-loaded weights stand for: the name of the weight they are tied to.

    Args:
        model: The model, which is only looked at. Only a model of transformers says which of its
            weights are tied once they are off-loaded.
    """
    names: Any = getattr(model, "all_tied_weights_keys", None)
    if not isinstance(names, dict) or not is_placed(model):
        return {}
    return {name: first for name, first in names.items() if name != first}


def copied(model: Model, memo: dict[int, Any], device: torch.device | None) -> Model:
    """Return a deep copy of a model that needs no hooks of accelerate.

    Args:
        model: The model, or a part of one. It is left untouched.
        memo: What takes the place of some parameters, by their `id`; see `copy.deepcopy`.
        device: The device of the copy, if accelerate places the model; see `home_of`. Any other
            model is copied where it is.

    Returns:
        The copy, with the weights in memory that `model` has off-loaded, and tied where those of
        `model` are.
    """
    placed = [part for part in model.modules() if placing_hooks(part)]
    if placed and device is not None:
        _bring_(memo, model, device)
    for part in placed:
        for name in ("_hf_hook", "forward"):  # they hold the model, and all of its weights
            memo[id(vars(part)[name])] = ()
    result = copy.deepcopy(model, memo)
    for part, old in zip(result.modules(), model.modules(), strict=True):
        if placing_hooks(old):
            _unhook_(part)
        own = vars(part).get("forward")  # hooks that were removed have left that of the class
        if getattr(own, "__func__", None) is type(part).forward:
            del vars(part)["forward"]
    return result


def _bring_(memo: dict[int, Any], model: nn.Module, device: torch.device) -> None:
    """Put a copy on `device` of every tensor of a model into `memo`, if there is none yet."""
    tied, made = tied_names(model), dict[str, Any]()
    for path, part in model.named_modules():
        for name, value in chain(part._parameters.items(), part._buffers.items()):
            if value is None:
                continue
            full = f"{path}.{name}" if path else name
            first = tied.get(full, full)
            if first in made:
                memo[id(value)] = made[first]
            elif id(value) not in memo:
                new: Tensor = weight_at(part, name).to(device, copy=True)
                if isinstance(value, nn.Parameter):
                    new = nn.Parameter(new, requires_grad=value.requires_grad)
                memo[id(value)] = new
            made[first] = memo[id(value)]


def _unhook_(part: nn.Module) -> None:
    """Remove what accelerate's hooks are on a copy of a module."""
    own, forward = vars(part), own_forward(part)
    for name in ("_hf_hook", "_old_forward", "forward", *_LEFT_BEHIND):
        own.pop(name, None)
    if forward is not None:
        own["forward"] = forward
