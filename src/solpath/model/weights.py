"""Read the weights of a model by name, wherever they are: in memory, or off-loaded by accelerate.

Weights that accelerate off-loads to the memory of the CPU or to disk leave empty parameters on the
meta device. The hook on their module knows where the values are.
"""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn


def weight_reader(model: nn.Module) -> Callable[[str], Tensor]:
    """Return a function that reads one parameter or buffer of a model.

    Args:
        model: The model, which is only read. It may have hooks of accelerate.

    Returns:
        Name to the tensor, detached. It is the tensor itself if it is in memory, and one of its own
        if it was read from where it was off-loaded to. If its values are nowhere, it is on the meta
        device.

    Example:
        >>> read = weight_reader(model)
        >>> read("bert.embeddings.LayerNorm.weight").shape
        torch.Size([32])
    """
    held: dict[str, Tensor] = dict(model.named_buffers(remove_duplicate=False))
    held |= dict(model.named_parameters(remove_duplicate=False))
    maps = {path: _weights_map(module) for path, module in model.named_modules()}

    def read(name: str) -> Tensor:
        tensor, path = held[name].detach(), name
        while tensor.is_meta and path:
            path = path.rpartition(".")[0]
            values = maps.get(path)
            if values is not None:
                try:
                    return values[name[len(path) + bool(path) :]].detach()
                except KeyError:  # off-loaded by a module above
                    continue
        return tensor

    return read


def _weights_map(module: nn.Module) -> Mapping[str, Tensor] | None:
    """Return where accelerate keeps the off-loaded weights of a module, if it does."""
    hook: Any = getattr(module, "_hf_hook", None)
    for one in getattr(hook, "hooks", (hook,)):
        found: Mapping[str, Tensor] | None = getattr(one, "weights_map", None)
        if found is not None:
            return found
    return None
