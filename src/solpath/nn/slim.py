"""Classes of cut attentions: stock ones with another `forward`, which say which units they keep."""

import hashlib
from collections.abc import Callable
from functools import cache
from types import MethodType
from typing import Any

from torch import nn

Forward = Callable[..., Any]
"""The `forward` of an attention module, as a function whose first argument is the module."""

KEPT_HEADS = "kept_heads"
"""The buffer of an attention that lost whole heads: the key-value heads that are left, int64."""

_UNITS = "solpath.units"  # in the metadata of a state_dict


@cache
def slim_class(
    stock: type[nn.Module],
    forward: Forward,
    maker: tuple[Callable[..., nn.Module], tuple[Any, ...]] | None = None,
) -> type[nn.Module]:
    """Return a subclass of a stock attention class that replaces `forward`.

    It also lets a ``state_dict`` say which units its buffers stand for, and refuses weights that
    belong to others: of rotary couples, only the plan knows which were kept. Its modules stay
    instances of the stock class, so output recording and attention backends find them. transformers
    names the key-value cache ``cache`` from 5.24 on, and ``past_key_values`` before; `forward`
    always gets it as ``cache``.

    Args:
        stock: The stock class.
        forward: The function that replaces its `forward`.
        maker: A function and its arguments that return a module of this class without contents, for
            copies and pickles; the class itself has no place where a pickle could find it.
    """

    def call(self: Any, *args: Any, past_key_values: Any = None, **kwargs: Any) -> Any:
        if past_key_values is not None:
            kwargs["cache"] = past_key_values
        return forward(self, *args, **kwargs)

    def reduce(self: Any, protocol: int) -> tuple[Any, ...]:
        return (*(maker or ()), *object.__reduce_ex__(self, protocol)[2:])

    def save(self: Any, destination: Any, prefix: str, keep_vars: bool) -> None:
        stock._save_to_state_dict(self, destination, prefix, keep_vars)
        if hasattr(destination, "_metadata"):
            destination._metadata[prefix[:-1]][_UNITS] = _units_of(self)

    def load(self: Any, state: Any, prefix: str, metadata: Any, *others: Any) -> None:
        if metadata.get(_UNITS) not in (None, _units_of(self)):
            others[-1].append(
                f"{prefix[:-1]} keeps other units than the model that these weights come from; "
                "load them into a model that was extracted with the same plan."
            )
        stock._load_from_state_dict(self, state, prefix, metadata, *others)

    added = {"forward": call, "_save_to_state_dict": save, "_load_from_state_dict": load}
    added |= {"__reduce_ex__": reduce} if maker else {}
    return type(f"Slim{stock.__name__}", (stock,), added)


def hook_inside_(
    module: nn.Module, name: str, function: Callable[..., Any], forward: Forward
) -> None:
    """Let a module run a function in the middle of its `forward`, in place.

    Args:
        module: The module, whose class is replaced.
        name: The attribute where `forward` looks for the function.
        function: The function.
        forward: Does what the stock `forward` does, and calls the function.
    """
    vars(module)[name] = function
    become_(module, slim_class(type(module), forward))  # type: ignore[arg-type]


def unhook_inside_(module: nn.Module, name: str, stock: type[nn.Module]) -> None:
    """Give a module its own class `stock` back, and forget its function, if there is one."""
    become_(module, stock)
    vars(module).pop(name, None)


def become_(module: nn.Module, kind: type[nn.Module]) -> None:
    """Give a module another class, and its `forward` wherever accelerate's hooks keep it.

    A hook that was put on a module keeps the `forward` of its class on the module itself, where it
    comes before that of any class. So does a hook that was removed.

    Args:
        module: The module.
        kind: The class.
    """
    stock, own = type(module), vars(module)
    module.__class__ = kind
    for name in ("forward", "_old_forward"):
        if getattr(own.get(name), "__func__", None) is stock.forward:
            own[name] = MethodType(kind.forward, module)


def _units_of(module: nn.Module) -> str | None:
    """Return a digest of the buffers that say which units a cut attention keeps, or None."""
    buffers = [
        module._buffers[name] for name in ("couples", "gain", KEPT_HEADS) if name in module._buffers
    ]
    values = [value.tolist() for value in buffers if value is not None and not value.is_meta]
    return hashlib.sha256(repr(values).encode()).hexdigest()[:16] if values else None


def stock_class(module: nn.Module) -> type:
    """Return the class of which a module from `slim_class` is an instance, too."""
    return type(module).__mro__[1]
