"""Put low-rank adapters (LoRA, by peft) on the linear layers of a model, and merge them."""

import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from solpath.errors import ConfigError, UnsupportedModelError
from solpath.model.linear import is_falcon
from solpath.nn.conv1d import CutConv1D

if TYPE_CHECKING:
    from peft import LoraModel


def add_adapters_(model: nn.Module, rank: int, alpha: float) -> "LoraModel":
    """Put an adapter on every linear layer of `model`, in place.

    Only adapters require gradients afterwards. The model computes what it computed before. Three
    kinds of layers get no adapter: those whose weight is empty, frozen ones, and those whose weight
    another module shares, because a merge would change that module too. The first factor of every
    adapter is drawn from torch's global generator. Factors are in float32 at least, so that small
    updates are not lost to rounding; a merge rounds once, to the dtype of the weight.

    Args:
        model: The model, which is changed.
        rank: Rank of every adapter, which is a product of two factors.
        alpha: The product of the factors is scaled by ``alpha / rank``.

    Returns:
        The object that merges the adapters later. Its attribute ``model`` is `model`.

    Raises:
        ConfigError: peft is not installed.
        UnsupportedModelError: No layer can get an adapter.
    """
    try:
        from peft import LoraConfig, LoraModel
    except ImportError as error:
        raise ConfigError(
            "lora_rank needs peft; install it with: pip install 'solpath[tune]'."
        ) from error
    layers = adaptable(model)
    if not layers:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no linear layer for an adapter: all are empty, frozen or "
            "shared. Use lora_rank=None."
        )
    turned = any(isinstance(model.get_submodule(name), Conv1D) for name in layers)
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]
        target_modules=layers,
        exclude_modules=_alike(model, layers),
        fan_in_fan_out=turned,
    )
    with _plain(model):
        tuner = LoraModel(model, config, "default")
    for parameter in tuner.model.parameters():
        if parameter.requires_grad:  # the factors alone
            parameter.data = parameter.to(torch.promote_types(parameter.dtype, torch.float32)).data
    return tuner


@contextmanager
def _plain(model: nn.Module) -> Iterator[None]:
    """Hide from peft that a model is one of transformers, so that it takes layers by their names.

    Otherwise it takes layers of some mixtures, such as the ``gate_proj`` of a dense block, for the
    experts, which lost these names in transformers 5, and adapts those.
    """
    config: Any = vars(model).get("config")
    if config is None:
        yield
        return
    vars(model)["config"] = config.to_dict()
    try:
        yield
    finally:
        vars(model)["config"] = config


def adaptable(model: nn.Module) -> list[str]:
    """Return the names of the linear layers that can get an adapter, see `add_adapters_`."""
    owners = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    return [
        name
        for name, module in model.named_modules()
        if (type(module) in (nn.Linear, Conv1D, CutConv1D) or is_falcon(type(module)))
        and module.weight.numel()
        and module.weight.requires_grad
        and owners[id(module.weight)] == 1
    ]


def _alike(model: nn.Module, layers: Collection[str]) -> str | None:
    """Return an expression for all modules that peft takes for one of some layers, or None.

    It looks at the ends of names: ``block.fc`` is taken for a layer ``fc``.
    """
    ends = tuple(f".{name}" for name in layers)
    names = {name for name, _ in model.named_modules() if name.endswith(ends)} - set(layers)
    return "|".join(map(re.escape, sorted(names))) or None


def merge_adapters_(tuner: "LoraModel", adapters: Mapping[str, Tensor]) -> dict[str, nn.Parameter]:
    """Set the factors of adapters, add their products to the weights, and remove the adapters.

    Args:
        tuner: From `add_adapters_`. Its model is changed.
        adapters: Name to value of the factors. Factors that are not named keep their values.

    Returns:
        All parameters of the model, by their names without adapters.
    """
    with torch.no_grad():
        for name, parameter in tuner.model.named_parameters():
            if name in adapters:
                parameter.copy_(adapters[name])
    return dict(tuner.merge_and_unload().named_parameters())
