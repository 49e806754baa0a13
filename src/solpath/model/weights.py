"""Read the weights of a model by name, whether in memory or off-loaded by accelerate."""

from collections.abc import Callable

from torch import Tensor, nn

from solpath.running.placement import off_loaded_weights, weight_at


def weight_reader(model: nn.Module) -> Callable[[str], Tensor]:
    """Return a function that reads one parameter or buffer of a model.

    Args:
        model: The model, which is only read. It may have hooks of accelerate.

    Returns:
        Name to the tensor, detached; see `solpath.running.placement.weight_at`. The hooks may be
        removed meanwhile.

    Example:
        >>> read = weight_reader(model)
        >>> read("bert.embeddings.LayerNorm.weight").shape
        torch.Size([32])
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    away = {path: off_loaded_weights(module) for path, module in modules.items()}

    def read(name: str) -> Tensor:
        path, _, leaf = name.rpartition(".")
        return weight_at(modules[path], leaf, away[path])

    return read
