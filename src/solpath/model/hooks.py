"""Hooks on modules that are removed when a block ends, whatever happens in it."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

from torch import nn
from torch.utils.hooks import RemovableHandle

from solpath.nn.pooling import QueryHook


class Hook(NamedTuple):
    """A function that a module calls when it runs.

    Attributes:
        module: The module that calls the function.
        when: ``"before"`` the module runs, as ``function(module, args)``; ``"call"`` likewise, as
            ``function(module, args, kwargs)``; ``"after"`` it has run, as ``function(module, args,
            output)``; or ``"query"``, as ``function(query)`` on the projected query of an
            `nn.MultiheadAttention`.
        function: The function. Its result replaces the inputs, the output or the query. None leaves
            inputs and outputs untouched; on a query it is not allowed.
    """

    module: nn.Module
    when: Literal["before", "call", "after", "query"]
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
    handles: list[RemovableHandle | QueryHook] = []
    try:
        for module, when, function in hooks:
            if when == "before":
                handles.append(module.register_forward_pre_hook(function))
            elif when == "call":
                handles.append(module.register_forward_pre_hook(function, with_kwargs=True))
            elif when == "after":
                handles.append(module.register_forward_hook(function))
            else:
                assert isinstance(module, nn.MultiheadAttention)
                handles.append(QueryHook(module, function))
        yield
    finally:
        for handle in handles:
            handle.remove()
