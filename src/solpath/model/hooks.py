"""Hooks that are gone after the block, whatever happens in it."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

from torch import nn
from torch.utils.hooks import RemovableHandle

from solpath.nn.pooling import QueryHook


class Hook(NamedTuple):
    """A function that a module calls.

    Attributes:
        module: what calls it.
        when: ``"before"`` it runs, as ``function(module, args)``; ``"after"``, as
            ``function(module, args, output)``; or on the projected ``"query"`` of a
            `nn.MultiheadAttention`, as ``function(query)``.
        function: what it returns takes the place of what it was given, unless that is None.
    """

    module: nn.Module
    when: Literal["before", "after", "query"]
    function: Callable[..., Any]


@contextmanager
def hooked(hooks: Iterable[Hook]) -> Iterator[None]:
    """Register hooks, and remove every one of them when the block ends.

    A hook that cannot be registered, or an iterable that fails on the way, leaves none behind.
    """
    handles: list[RemovableHandle | QueryHook] = []
    try:
        for module, when, function in hooks:
            if when == "before":
                handles.append(module.register_forward_pre_hook(function))
            elif when == "after":
                handles.append(module.register_forward_hook(function))
            else:
                assert isinstance(module, nn.MultiheadAttention)
                handles.append(QueryHook(module, function))
        yield
    finally:
        for handle in handles:
            handle.remove()
