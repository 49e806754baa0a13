"""Put a model into the mode that a piece of work needs, and leave it as it was found.

Every function of the package that runs a model enters one of these blocks. What a block changes
(training flags, gradient flags, torch's random state and settings) comes back bit for bit, whatever
happens inside, a Ctrl-C at any line among it.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import wraps
from typing import Any, TypeVar, cast

import torch
from torch import nn
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack, _pop_mode

from solpath.errors import UnsupportedModelError

Function = TypeVar("Function", bound=Callable[..., Any])

_AUTOCAST = ("cpu", "cuda", "mps", "xpu")


class _Undo:
    """A function that undoes a change, and does nothing once it has returned."""

    def __init__(self, function: Callable[[], object]) -> None:
        self._function, self._done = function, False

    def __call__(self) -> None:
        if not self._done:
            self._function()
            self._done = True


class _Pending(threading.local):
    """The changes that this thread has not undone yet, the oldest first."""

    def __init__(self) -> None:
        self.undos: list[_Undo] = []


_pending = _Pending()


@contextmanager
def undoing(undo: Callable[[], object]) -> Iterator[None]:
    """Call `undo` when the block ends, and again in case a Ctrl-C ended the first call.

    Enter the block before the first change, so that nothing lies between a change and its undoing.

    Args:
        undo: It may be called before any change was made, and twice.

    Example:
        >>> names = {"new"}
        >>> with undoing(lambda: names.discard("new")):
        ...     print(len(names))
        1
        >>> len(names)
        0
    """
    one, pending = _Undo(undo), _pending.undos
    try:
        try:
            pending.append(one)
            yield
        finally:
            one()
    finally:
        one()
        if one in pending:
            pending.remove(one)


def contained(function: Function) -> Function:
    """Let a public function run in `plain_torch`, and leave nothing behind but its result.

    A Ctrl-C between a block and its end skips the end: Python keeps the block until the traceback
    is dropped, in an interactive session for a long time. So what the blocks inside have not undone
    by then is undone when the function ends.

    Args:
        function: The function.

    Example:
        >>> contained(lambda: torch.is_inference_mode_enabled())()
        False
    """

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        kept = len(_pending.undos)
        try:
            try:
                with plain_torch():
                    return function(*args, **kwargs)
            finally:
                _undo_from(kept)
        finally:
            _undo_from(kept)

    return cast("Function", call)


def _undo_from(kept: int) -> None:
    """Undo the pending changes of this thread, the newest first, up to the first `kept`."""
    while len(_pending.undos) > kept:
        _pending.undos[-1]()
        _pending.undos.pop()


@contextmanager
def entered(*blocks: AbstractContextManager[Any]) -> Iterator[None]:
    """Enter blocks of torch that change the process, so that a Ctrl-C cannot skip their end.

    A ``with`` statement skips it if the Ctrl-C comes before its first line.

    Args:
        blocks: They end in reverse order.

    Example:
        >>> with entered(torch.device("meta")):
        ...     print(torch.ones(2).device)
        meta
    """
    stack = ExitStack()
    with undoing(stack.close):
        for block in blocks:
            stack.enter_context(block)
        yield


def _autocast_nesting() -> int:
    """Return how many autocast blocks are open: weights cast in them are kept while any is."""
    _, found = torch.autocast_increment_nesting(), torch.autocast_decrement_nesting()
    return found


@contextmanager
def plain_torch() -> Iterator[None]:
    """Give the block the settings of torch that a fresh process has; the caller's come back.

    Inside, an ``inference_mode``, an ``autocast``, another default dtype and another default device
    of the caller have no effect. So every public function that computes gives the same values and
    ordinary tensors, whatever block it is called in. Gradients stay on or off as they are.

    Example:
        >>> with torch.autocast("cpu", torch.bfloat16), plain_torch():
        ...     print((torch.ones(2, 2) @ torch.ones(2, 2)).dtype)
        torch.float32
    """
    dtype, grad = torch.get_default_dtype(), torch.is_grad_enabled()
    modes = len(_get_current_dispatch_mode_stack())
    casting = {k: (torch.is_autocast_enabled(k), torch.get_autocast_dtype(k)) for k in _AUTOCAST}
    caching, nesting = torch.is_autocast_cache_enabled(), _autocast_nesting()

    def restore() -> None:
        while len(_get_current_dispatch_mode_stack()) > modes:
            _pop_mode()  # a Ctrl-C inside torch left it
        torch.set_default_dtype(dtype)
        for kind, (on, low) in casting.items():
            torch.set_autocast_enabled(kind, on)
            torch.set_autocast_dtype(kind, low)
        torch.set_autocast_cache_enabled(caching)
        while _autocast_nesting() > nesting:  # a Ctrl-C at the edge of an autocast block left it
            if torch.autocast_decrement_nesting() == 0:
                torch.clear_autocast_cache()
        torch.set_grad_enabled(grad)

    inference = torch.is_inference_mode_enabled()
    device = torch.empty(0).device  # get_default_device of torch 2.6 sees no `with` block
    blocks: list[AbstractContextManager[Any]] = []
    blocks += [torch.inference_mode(False)] if inference else []
    blocks += [torch.device("cpu")] if device.type != "cpu" else []
    with undoing(restore), entered(*blocks):
        torch.set_grad_enabled(grad)  # leaving inference mode turned gradients on
        for kind in casting:
            torch.set_autocast_enabled(kind, False)
        if dtype != torch.float32:
            torch.set_default_dtype(torch.float32)
        yield


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Put models into eval mode; the training flag of every module comes back.

    Example:
        >>> layer = torch.nn.Dropout()
        >>> with evaluating(layer):
        ...     print(layer.training)
        False
        >>> layer.training
        True
    """
    flags = {module: module.training for model in models for module in model.modules()}

    def restore() -> None:
        for module, training in flags.items():
            module.training = training

    with undoing(restore):
        for model in models:
            model.eval()
        yield


@contextmanager
def inferring(*models: nn.Module) -> Iterator[None]:
    """Run models in eval mode without gradients; flags and torch's random state come back.

    Example:
        >>> with inferring(model):
        ...     print(model(**batch).logits.requires_grad)
        False
    """
    with evaluating(*models), keeping_random_state(), gradients(False):
        yield


@contextmanager
def differentiating(model: nn.Module) -> Iterator[None]:
    """Take gradients with respect to activations: eval mode, frozen parameters, gradients on.

    Flags and torch's random state come back.

    Raises:
        UnsupportedModelError: A parameter was made in `torch.inference_mode`.
    """
    if any(parameter.is_inference() for parameter in model.parameters()):
        raise UnsupportedModelError(
            f"the weights of this {type(model).__name__} were made in torch.inference_mode, so no "
            "gradient goes through them; build or load the model outside of it."
        )
    flags = [
        (module, name, parameter, parameter.requires_grad)
        for module in model.modules()
        for name, parameter in module._parameters.items()
        if parameter is not None
    ]

    def restore() -> None:
        for module, name, parameter, flag in flags:
            parameter.requires_grad_(flag)
            now = module._parameters.get(name)  # accelerate off-loads by new parameters
            if now is not None and now is not parameter:
                now.requires_grad_(flag)

    with evaluating(model), keeping_random_state(), gradients(True), undoing(restore):
        for _, _, parameter, _ in flags:
            parameter.requires_grad_(False)
        yield


@contextmanager
def gradients(on: bool) -> Iterator[None]:
    """Turn gradients on or off in the block.

    Args:
        on: Whether operations in the block can be differentiated.
    """
    found = torch.is_grad_enabled()
    with undoing(lambda: torch.set_grad_enabled(found)):
        torch.set_grad_enabled(on)
        yield


@contextmanager
def keeping_random_state() -> Iterator[None]:
    """Restore torch's random state, on the CPU and on the GPUs, after the block.

    Seeding torch seeds every GPU, so all of them are restored once CUDA is in use.
    """
    cpu = torch.get_rng_state()
    used = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    gpus = torch.cuda.get_rng_state_all() if used else []

    def restore() -> None:
        torch.set_rng_state(cpu)
        if gpus:
            torch.cuda.set_rng_state_all(gpus)

    with undoing(restore):
        yield
