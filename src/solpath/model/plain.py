"""Refuse layers that compute something else than the product with their weights.

A cut copies weights. What replaces a weight, an input or an output on the way is not cut with it:
the small model would crash, or compute something else than the masked dense model.
"""

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.utils import prune

from solpath.errors import UnsupportedModelError
from solpath.model.linear import layer_at, linear_map
from solpath.model.placed import tied_names
from solpath.pair import Pair
from solpath.running.placement import offloads, other_hook, own_forward, placing_hooks

_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_BEFORE = (
    "prune before quantising or sharding: call model.dequantize(), or load the checkpoint that it "
    "was quantised from"
)
_LEAVES_ITS_OWN = "transformers."  # its hooks only look on, and come back when a model is loaded


def check_countable(model: nn.Module) -> None:
    """Raise `UnsupportedModelError` if weights are packed so that they cannot be counted.

    Those of torchao can: their tensors have the shape of what they stand for.

    Args:
        model: The model, which is only looked at.
    """
    way = "what it holds cannot be counted; measure the model before quantising, or use torchao"
    _check_modules(model, way)
    for name, parameter in model.named_parameters():
        if not parameter.dtype.is_floating_point:
            raise UnsupportedModelError(f"{name} is of {parameter.dtype}: {way}.")


def check_floats(model: nn.Module, way: str = _BEFORE, besides: Collection[str] = ()) -> None:
    """Raise `UnsupportedModelError` if a parameter is packed: quantised, or a part of a tensor.

    Layers that stay whole count, too: no gradient passes them, or they cannot be saved.

    Args:
        model: The model, which is only looked at.
        way: The way out, for the message.
        besides: Names of parameters that may be packed all the same.
    """
    _check_modules(model, way)
    for name, parameter in model.named_parameters():
        if name in besides:
            continue
        if type(parameter) is not nn.Parameter or parameter.dtype not in _FLOATS:
            settings: Any = getattr(getattr(model, "config", None), "quantization_config", None)
            method = getattr(settings, "quant_method", None)
            by = f" (quantised by {getattr(method, 'value', method)})" if method else ""
            raise UnsupportedModelError(
                f"{name} is a {type(parameter).__name__} of {parameter.dtype}{by}, not a plain "
                f"parameter of floats; {way}."
            )


def _check_modules(model: nn.Module, way: str) -> None:
    """Raise `UnsupportedModelError` if a module is one of torch.ao, which have no parameters."""
    for name, module in model.named_modules():
        if hasattr(module, "_packed_params"):
            kind = f"{type(module).__module__}.{type(module).__name__}"
            raise UnsupportedModelError(f"{name} is a {kind}, whose weights are packed; {way}.")


def check_plain(model: nn.Module, pairs: Sequence[Pair]) -> None:
    """Raise `UnsupportedModelError` unless the layers of all pairs run as their classes say.

    Weights may not be computed by pruning masks, weight norms or spectral norms, or belong to
    another module, too; parametrisations are refused by `linear_map`.
    No hook and no other `forward` may have been put on a layer, on a norm over the heads, or on an
    activation between the layers of an MLP. Hooks of transformers itself are let be.

    Args:
        model: The model, which is only looked at.
        pairs: Its pairs.
    """
    _check_off_loading(model)
    owners = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    tied = tied_names(model)
    shared = {*tied, *tied.values()}
    for path in dict.fromkeys(side.module for pair in pairs for side in pair.sides):
        layer = layer_at(model, path)
        _check_weights(layer, path)
        for name, parameter in linear_map(model, path).parameters().items():
            if owners[id(parameter)] > 1 or f"{path}.{name}" in shared:
                raise UnsupportedModelError(
                    f"{path}.{name} is shared with another module; cutting one would break the "
                    "other. Give each its own copy first."
                )
    for path in dict.fromkeys(path for pair in pairs for path in _inside(model, pair)):
        _check_calls(layer_at(model, path), path)
    for pair in pairs:
        if pair.kind == "experts":  # a kernel that runs the whole mixture passes its experts by
            path = pair.right.module.rsplit(".", 2)[0]
            _check_own_forward(model.get_submodule(path), path)


def _check_off_loading(model: nn.Module) -> None:
    """Raise `UnsupportedModelError` if weights are off-loaded where their module cannot be run."""
    for path, module in model.named_modules():
        filled = offloads(module) and len(module._modules)
        if filled and any(getattr(h, "place_submodules", False) for h in placing_hooks(module)):
            raise UnsupportedModelError(
                f"accelerate fills {path or 'the model'} in as a whole, weights of its submodules "
                "included; off-load without preload_module_classes=."
            )
        if isinstance(module, nn.MultiheadAttention) and offloads(module.out_proj):
            raise UnsupportedModelError(
                f"accelerate off-loads {path}.out_proj, whose weight torch reads without calling "
                "it; keep this module on a device in device_map=."
            )


def _check_weights(layer: nn.Module, path: str) -> None:
    """Raise `UnsupportedModelError` if a weight is computed from other tensors when it is used."""
    for hook in layer._forward_pre_hooks.values():
        removal = _REMOVALS.get(type(hook).__name__)
        if isinstance(hook, prune.BasePruningMethod):
            removal = "torch.nn.utils.prune.remove(layer, {!r})"
        if removal is not None:
            name = getattr(hook, "_tensor_name", None) or getattr(hook, "name", "weight")
            raise UnsupportedModelError(
                f"{path}.{name} is computed by a {type(hook).__name__} before every call; call "
                f"{removal.format(name)} on it first."
            )


_REMOVALS = {
    "WeightNorm": "torch.nn.utils.remove_weight_norm(layer, {!r})",
    "SpectralNorm": "torch.nn.utils.remove_spectral_norm(layer, {!r})",
}


def check_forward(module: nn.Module, path: str, *, registered: bool) -> None:
    """Raise `UnsupportedModelError` if an attention runs another `forward` than its table knows.

    A cut attention gets a `forward` that does what that of transformers or timm does.

    Args:
        module: The attention.
        path: Dotted path of the attention, for the message.
        registered: Whether its table comes from `register`. A class of any origin then passes, but
            for a subclass of one of transformers or timm that has another `forward`.
    """
    kinds = type(module).__mro__
    stock = [
        kind
        for kind in kinds
        if kind.__module__.partition(".")[0] in ("transformers", "timm")
        or kind is nn.MultiheadAttention
    ]
    if not stock and not registered:
        raise UnsupportedModelError(
            f"{path} is a {kinds[0].__module__}.{kinds[0].__name__}, not a class of transformers "
            "or timm; register a table for it with solpath.arch.register."
        )
    for kind in kinds[: kinds.index(stock[0])] if stock else ():
        if "forward" in vars(kind):
            raise UnsupportedModelError(
                f"{path} is a {kind.__module__}.{kind.__name__} with another forward than "
                f"{stock[0].__name__}, which a cut would put in its place."
            )
    _check_own_forward(module, path)


def _check_own_forward(module: nn.Module, path: str) -> None:
    """Raise `UnsupportedModelError` if a module does not run the `forward` of its class."""
    if (kind := other_hook(module)) is not None:
        raise UnsupportedModelError(
            f"{path} has a hook of accelerate, {kind.__name__} of {kind.__module__}, that may do "
            "more than to place it on a device or to off-load it; call "
            "accelerate.hooks.remove_hook_from_submodules(model)."
        )
    own = own_forward(module)  # accelerate's hooks, once removed, leave the same one
    if own is not None and getattr(own, "__func__", None) is not type(module).forward:
        raise UnsupportedModelError(
            f"{path} has a forward of its own, beside that of its class; del module.forward first."
        )


def _inside(model: nn.Module, pair: Pair) -> Iterator[str]:
    """Yield the paths of the modules that see the inner dimension of a pair."""
    yield from (side.module for side in pair.sides)
    yield from (norm.module for norm in pair.norms)
    if pair.kind not in ("mlp", "experts"):
        return
    for parent in dict.fromkeys(side.module.rpartition(".")[0] for side in pair.left):
        for name, module in model.get_submodule(parent).named_children():
            if not any(True for _ in module.parameters()):
                yield f"{parent}.{name}"


def _check_calls(module: nn.Module, path: str) -> None:
    """Raise `UnsupportedModelError` if something was put between a module and its callers."""
    hooks: list[Any] = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
    for hook in hooks:
        home = getattr(hook, "__module__", None) or type(hook).__module__
        if not home.startswith(_LEAVES_ITS_OWN):
            name = getattr(hook, "__qualname__", type(hook).__name__)
            raise UnsupportedModelError(
                f"{path} has a hook ({name} of {home}), which would see other channels once it is "
                "cut; remove it first, with the handle that registering it returned."
            )
    _check_own_forward(module, path)
