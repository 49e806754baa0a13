"""Put a model into the mode that a piece of work needs, and leave it as it was found.

Every function of the package that runs a model enters one of these blocks. What a block changes
(training flags, gradient flags, torch's random state) comes back bit for bit, whatever happens
inside.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


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
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for module, training in flags.items():
            module.training = training


@contextmanager
def inferring(*models: nn.Module) -> Iterator[None]:
    """Run models in eval mode without gradients; flags and torch's random state come back.

    Example:
        >>> with inferring(model):
        ...     print(model(**batch).logits.requires_grad)
        False
    """
    with evaluating(*models), keeping_random_state(), torch.no_grad():
        yield


@contextmanager
def differentiating(model: nn.Module) -> Iterator[None]:
    """Take gradients with respect to activations: eval mode, frozen parameters, gradients on.

    Flags and torch's random state come back.
    """
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    with evaluating(model), keeping_random_state(), torch.enable_grad():
        try:
            for parameter, _ in flags:
                parameter.requires_grad_(False)
            yield
        finally:
            for parameter, flag in flags:
                parameter.requires_grad_(flag)


@contextmanager
def keeping_random_state() -> Iterator[None]:
    """Restore torch's random state, on the CPU and on the GPUs, after the block.

    Seeding torch seeds every GPU, so all of them are restored once CUDA is in use.
    """
    used = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    with torch.random.fork_rng(range(torch.cuda.device_count()) if used else ()):
        yield
