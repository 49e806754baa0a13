"""Hooks on modules that are removed when a block ends, whatever happens in it."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

from torch import nn

from solpath.nn.experts import experts_forward
from solpath.nn.pooling import pooling_forward
from solpath.nn.slim import Forward, hook_inside_, unhook_inside_
from solpath.running.modes import undoing

# What torch has no hook for: the attribute that holds the function, and a `forward` that calls it.
_INSIDE: dict[str, tuple[str, Forward]] = {
    "query": ("on_query", pooling_forward),
    "neurons": ("on_neurons", experts_forward),
}


class Hook(NamedTuple):
    """A function that a module calls when it runs.

    Attributes:
        module: The module that calls the function.
        when: ``"before"`` the module runs, as ``function(module, args)``; ``"call"`` likewise, as
            ``function(module, args, kwargs)``; ``"after"`` it has run, as ``function(module, args,
            output)``; ``"query"``, as ``function(query)`` on the projected query of an
            `nn.MultiheadAttention`; or ``"neurons"``, on those of every expert (see `OnNeurons`).
        function: The function. Its result replaces the inputs, the output, the query or the
            neurons. None leaves inputs and outputs untouched; on others it is not allowed. No two
            hooks may share one.
    """

    module: nn.Module
    when: Literal["before", "call", "after", "query", "neurons"]
    function: Callable[..., Any]


@contextmanager
def hooked(hooks: Iterable[Hook]) -> Iterator[None]:
    """Register hooks, and remove every one of them when the block ends.

    If a hook cannot be registered, or the iterable fails on the way, no hook is left behind.

    Args:
        hooks: The hooks, in the order in which they are registered.

    Example:
        >>> seen = []
        >>> with hooked([Hook(model.classifier, "before", lambda module, args: seen.extend(args))]):
        ...     outputs = model(**batch)
        >>> seen[0].shape
        torch.Size([8, 32])
    """
    found: list[tuple[Hook, type[nn.Module]]] = []

    def remove() -> None:
        for hook, stock in reversed(found):
            _unregister_(hook, stock)

    with undoing(remove):
        for hook in hooks:
            found.append((hook, type(hook.module)))
            if hook.when == "before":
                hook.module.register_forward_pre_hook(hook.function)
            elif hook.when == "call":
                hook.module.register_forward_pre_hook(hook.function, with_kwargs=True)
            elif hook.when == "after":
                hook.module.register_forward_hook(hook.function)
            else:
                name, forward = _INSIDE[hook.when]
                hook_inside_(hook.module, name, hook.function, forward)
        yield


def _unregister_(hook: Hook, stock: type[nn.Module]) -> None:
    """Remove a hook, whether it is registered, about to be, or removed already.

    torch's own handles cannot do that: a Ctrl-C during a registration leaves the hook but no
    handle. Every hook has a function of its own, by which it is found.
    """
    module = hook.module
    if hook.when in _INSIDE:
        unhook_inside_(module, _INSIDE[hook.when][0], stock)
        return
    registered = module._forward_hooks if hook.when == "after" else module._forward_pre_hooks
    for key in [key for key, function in registered.items() if function is hook.function]:
        module._forward_pre_hooks_with_kwargs.pop(key, None)
        del registered[key]
