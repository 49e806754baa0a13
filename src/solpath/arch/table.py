"""What an architecture's table says, and the registry of tables."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

from torch import Tensor, nn

from solpath.errors import UnsupportedModelError

_MODULES = {
    "bert": "bert",
    "camembert": "bert",
    "electra": "bert",
    "roberta": "bert",
    "xlm-roberta": "bert",
    "deit": "vit",
    "vit": "vit",
    "llama": "llama",
}
_REGISTERED: dict[str, "Architecture"] = {}


@dataclass(frozen=True)
class Attention:
    """Where one block's attention is, relative to the block.

    Attributes:
        module: the attention module that `slim_` rewrites.
        query, key, value, output: its linear layers.
        rotary: whether queries and keys are rotated (half-split couples).
    """

    module: str
    query: str
    key: str
    value: str
    output: str
    rotary: bool = False


@dataclass(frozen=True)
class Mlp:
    """Where one block's MLP is, relative to the block.

    Attributes:
        left: fc1, or gate and up.
        right: fc2, or down.
    """

    left: tuple[str, ...]
    right: str


@dataclass(frozen=True)
class Architecture:
    """Everything solpath knows of a family of models.

    Attributes:
        blocks: path of the list of blocks, relative to the base model.
        attention: where the attention is in a block.
        mlp: where the MLP is in a block.
        slim_: ``slim_(attention, kept_qk)`` lets an attention module whose projections were cut
            run with unequal widths, in place. `kept_qk` is int64 ``[heads, r]``.
    """

    blocks: str
    attention: Attention
    mlp: Mlp
    slim_: Callable[[nn.Module, Tensor], None]


def register(model_type: str, architecture: Architecture) -> None:
    """Add or replace the table of one ``config.model_type``."""
    _REGISTERED[model_type] = architecture


def known_model_types() -> list[str]:
    """Every ``config.model_type`` that can be pruned, sorted."""
    return sorted({*_MODULES, *_REGISTERED})


def lookup(model_type: str | None) -> Architecture:
    """The table of a model type.

    Raises:
        UnsupportedModelError: unknown type; the message lists the known ones.
    """
    if model_type in _REGISTERED:
        return _REGISTERED[model_type]
    if model_type not in _MODULES:
        raise UnsupportedModelError(
            f"model_type {model_type!r} is not known; known: {', '.join(known_model_types())}. "
            "solpath.arch.register adds one."
        )
    architecture = import_module(f"solpath.arch.{_MODULES[model_type]}").ARCHITECTURE
    assert isinstance(architecture, Architecture)
    return architecture
