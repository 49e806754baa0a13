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
    """Put models in eval mode; the training flag of every module comes back."""
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
    """Run models without gradients: eval mode, and a random state that comes back."""
    with evaluating(*models), keeping_random_state(*models), torch.no_grad():
        yield


@contextmanager
def differentiating(model: nn.Module) -> Iterator[None]:
    """Take gradients by activations: eval mode, weights that need none, gradients switched on."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    with evaluating(model), keeping_random_state(model), torch.enable_grad():
        try:
            for parameter, _ in flags:
                parameter.requires_grad_(False)
            yield
        finally:
            for parameter, flag in flags:
                parameter.requires_grad_(flag)


@contextmanager
def keeping_random_state(*models: nn.Module) -> Iterator[None]:
    """Restore torch's random state, on the CPU and on the models' devices, after the block."""
    devices = {p.device for model in models for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(sorted(devices, key=str)):
        yield
