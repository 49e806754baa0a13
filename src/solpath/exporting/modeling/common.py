"""What the models of all families share: sizes of their own in every layer."""

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig


class CutModel:
    """Comes before a stock class of models: its layers get sizes of their own once it is built."""

    def __init__(self, config: PreTrainedConfig, **kwargs: Any) -> None:
        with dense_sizes(config):
            super().__init__(config, **kwargs)  # type: ignore[call-arg]
        self.cut_layers(config)
        self.post_init()  # type: ignore[attr-defined]

    def cut_layers(self, config: Any) -> None:
        """Exchange the modules whose sizes differ."""
        raise NotImplementedError


class CutConfig:
    """Comes before a stock class of configurations: only the sizes of the dense model are checked.

    Stock classes want a number of heads that divides the hidden size.
    """

    def validate(self) -> None:
        """Do what the stock class does, to the sizes of the dense model."""
        with dense_sizes(self):
            super().validate()  # type: ignore[misc]


@contextlib.contextmanager
def dense_sizes(config: Any) -> Iterator[None]:
    """Let stock classes read the sizes of the dense model from a configuration."""
    by_layer = config.to_dict().get("per_layer_config")
    config.per_layer_config = None
    try:
        yield
    finally:
        config.per_layer_config = by_layer


def dense(config: Any) -> Any:
    """Return a copy of a configuration that has the sizes of the dense model alone."""
    config = copy.copy(config)
    config.per_layer_config = None
    return config


def resize(
    module: nn.Module,
    name: str,
    inputs: int,
    outputs: int,
    kind: Callable[[int, int, bool], nn.Module] = nn.Linear,
) -> None:
    """Give a module a linear layer of other sizes under the name of one that it has."""
    bias = getattr(module, name).bias is not None
    delattr(module, name)
    if not outputs:
        setattr(module, name, no_channels)
    else:
        setattr(module, name, kind(inputs, outputs, bias) if inputs else Constant(outputs, bias))


def no_channels(states: Tensor) -> Tensor:
    """Do what a linear layer without outputs does. Kernels take none."""
    return states[..., :0]


class Constant(nn.Module):
    """A linear layer without inputs: its bias, or zeros. Kernels take none."""

    weight = None

    def __init__(self, outputs: int, bias: bool) -> None:
        super().__init__()
        self.outputs = outputs
        self.bias = nn.Parameter(torch.zeros(outputs)) if bias else None

    def forward(self, states: Tensor) -> Tensor:
        """``[..., any] -> [..., outputs]``."""
        zeros = states.new_zeros(*states.shape[:-1], self.outputs)
        return zeros if self.bias is None else zeros + self.bias


def check_whole(module: Any) -> None:
    """Refuse to run where vLLM has spread the heads over devices, which would mix up tokens."""
    served = getattr(module, "attn", None)  # what vLLM attends with
    if served is not None and served.num_heads != module.heads:
        raise ValueError("the heads of a layer stay together: serve with tensor_parallel_size=1.")


def by_head(states: Tensor, heads: int, width: int) -> Tensor:
    """``[batch, tokens, heads * width] -> [batch, heads, tokens, width]``."""
    return states.view(*states.shape[:-1], heads, width).transpose(1, 2)


def padded(states: Tensor, width: int) -> Tensor:
    """Add zeros at the end of the last dimension, which change no result of an attention."""
    return nn.functional.pad(states, (0, width - states.shape[-1]))
