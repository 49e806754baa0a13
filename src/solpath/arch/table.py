"""What an architecture's table says, and the registry of tables."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from torch import nn

from solpath.errors import UnsupportedModelError

_MODULES = {
    "audio-spectrogram-transformer": "vit",
    "beit": "vit",
    "bert": "bert",
    "camembert": "bert",
    "clip": "clip",
    "clip_text_model": "clip",
    "clip_vision_model": "clip",
    "data2vec-vision": "yolos",
    "deit": "vit",
    "dinov2": "vit",
    "dinov2_with_registers": "vit",
    "dinov3_vit": "dinov3",
    "distilbert": "distilbert",
    "electra": "bert",
    "gemma3": "gemma3",
    "gemma3_text": "gemma3",
    "gpt2": "gpt2",
    "ijepa": "vit",
    "llama": "llama",
    "mistral": "llama",
    "opt": "opt",
    "qwen2": "llama",
    "qwen3": "qwen3",
    "roberta": "bert",
    "siglip": "siglip",
    "siglip2": "siglip",
    "siglip2_text_model": "siglip",
    "siglip2_vision_model": "siglip",
    "siglip_text_model": "siglip",
    "siglip_vision_model": "siglip",
    "swin": "swin",
    "t5": "t5",
    "timm/SwinTransformer": "timm",
    "timm/VisionTransformer": "timm",
    "timm/VisionTransformerDistilled": "timm",
    "videomae": "yolos",
    "vit": "vit",
    "vit_mae": "vit",
    "vit_msn": "vit",
    "vivit": "vit",
    "whisper": "whisper",
    "xlm-roberta": "bert",
    "yolos": "yolos",
}
UNSUITED = {
    "ViTMAEForPreTraining": "its logits are pixels, not classes; prune the ViTMAEModel in it",
    "VideoMAEForPreTraining": "its logits are pixels, not classes; prune the VideoMAEModel in it",
}
"""Classes of known types that are refused, and why."""

TIMM_WRAPPER = "timm_wrapper"
"""``config.model_type`` of the models of transformers that wrap any model of timm."""

_REGISTERED: dict[str, tuple["Stack", ...]] = {}


@dataclass(frozen=True)
class Attention:
    """Where one attention of a block is. Paths of layers are relative to the block.

    Attributes:
        module: the attention module, whose `forward` is replaced once its projections are cut.
        query, key, value, output: its linear layers. A fused projection is named three times; its
            outputs are those of the query, the key and the value, in this order.
        forward: takes the place of the module's own `forward` after cutting; None when that reads
            all widths from the layers.
        heads: attribute of the attention module that counts its heads, dots allowed.
        kv_heads: likewise for its key-value heads; empty when there are as many as heads.
        rotary: whether queries and keys are rotated (half-split couples).
        norms: modules that norm each head of the query and of the key, if there are any.
        norm_dim: the dimension of their input that runs over heads, -2 or -3.
        kind: name of the class the module must have, where a family has several with the same
            layers; empty when it has one.
        identity: modules of the attention that must be `nn.Identity`, None or absent, because
            cutting would change what they do.
        cached: whether generation caches its keys and values, one per generated token.
        name: what its pairs are called, after the name of the block.
    """

    module: str
    query: str
    key: str
    value: str
    output: str
    forward: Callable[..., Any] | None = None
    heads: str = "num_attention_heads"
    kv_heads: str = ""
    rotary: bool = False
    norms: tuple[str, ...] = ()
    norm_dim: int = -2
    kind: str = ""
    identity: tuple[str, ...] = ()
    cached: bool = False
    name: str = "attention"


@dataclass(frozen=True)
class Mlp:
    """Where one block's MLP is, relative to the block.

    Attributes:
        left: fc1, or gate and up.
        right: fc2, or down.
        identity: modules of the block that must be `nn.Identity`, None or absent, because cutting
            would change what they do.
    """

    left: tuple[str, ...]
    right: str
    identity: tuple[str, ...] = ()


@dataclass(frozen=True)
class Stack:
    """One list of equal blocks in a model.

    Attributes:
        blocks: path of the list, or of a single block, relative to the base model; ``*`` stands
            for every index of a list of lists.
        attentions: the attentions of a block, in the order they run.
        mlps: its MLP. Where a family has several forms of it, one entry each: the form whose
            layers a block has is taken, the larger one where a form is part of another.
    """

    blocks: str
    attentions: tuple[Attention, ...]
    mlps: tuple[Mlp, ...]


def register(model_type: str, *stacks: Stack) -> None:
    """Add or replace the table of one type of model.

    Args:
        model_type: of the models' configuration; for timm, ``timm/`` and the name of the class.
        stacks: where the prunable layers are. A stack that a model does not have is skipped
            (a head without the decoder, one tower of two), but it must have one of them.
    """
    _REGISTERED[model_type] = stacks


def known_model_types() -> list[str]:
    """Every ``config.model_type``, and every class of timm, that can be pruned, sorted."""
    return sorted({*_MODULES, *_REGISTERED})


def type_of(model: nn.Module) -> Any:
    """The type of a model that its table is listed under; None if it has none.

    It is ``config.model_type``, or for a model of timm, wrapped or not, ``timm/`` and its class.
    """
    inner = getattr(model, "timm_model", model)
    if type(inner).__module__.partition(".")[0] == "timm":
        return f"timm/{type(inner).__name__}"
    return getattr(getattr(model, "config", None), "model_type", None)


def lookup(model_type: str | None) -> tuple[Stack, ...]:
    """The table of one type of model, see `type_of`.

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
    tables = import_module(f"solpath.arch.{_MODULES[model_type]}").TABLES
    stacks: tuple[Stack, ...] = tables[model_type]
    return stacks
