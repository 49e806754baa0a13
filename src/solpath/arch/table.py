"""What the table of an architecture says, and the registry of all tables."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from torch import nn

from solpath.errors import UnsupportedModelError

_MODULES = {
    "albert": "albert",
    "audio-spectrogram-transformer": "vit",
    "bart": "whisper",
    "beit": "vit",
    "bert": "bert",
    "bert-generation": "bert",
    "big_bird": "rembert",
    "blenderbot": "whisper",
    "blenderbot-small": "whisper",
    "bloom": "bloom",
    "camembert": "bert",
    "clip": "clip",
    "clip_text_model": "clip",
    "clip_vision_model": "clip",
    "cohere": "cohere",
    "cohere2": "cohere",
    "data2vec-audio": "wav2vec2",
    "data2vec-text": "bert",
    "data2vec-vision": "yolos",
    "deberta-v2": "deberta",
    "deit": "vit",
    "dinov2": "vit",
    "dinov2_with_registers": "vit",
    "dinov3_vit": "dinov3",
    "distilbert": "distilbert",
    "electra": "bert",
    "ernie": "bert",
    "ernie4_5": "cohere",
    "esm": "esm",
    "eurobert": "llama",
    "falcon": "falcon",
    "gemma": "llama",
    "gemma2": "gemma2",
    "gemma3": "gemma3",
    "gemma3_text": "gemma3",
    "gpt2": "gpt2",
    "gpt_neox": "gpt_neox",
    "gpt_oss": "moe",
    "granite": "llama",
    "helium": "cohere",
    "hubert": "wav2vec2",
    "ijepa": "vit",
    "layoutlm": "bert",
    "llama": "llama",
    "llava": "llava",
    "m2m_100": "whisper",
    "marian": "whisper",
    "mbart": "whisper",
    "megatron-bert": "rembert",
    "ministral": "llama",
    "ministral3": "ministral3",
    "mistral": "llama",
    "mixtral": "moe",
    "modernbert": "modernbert",
    "mpnet": "mpnet",
    "mt5": "t5",
    "olmo": "llama",
    "olmo2": "olmo2",
    "olmo3": "olmo2",
    "opt": "opt",
    "pegasus": "whisper",
    "phi": "phi",
    "phi3": "phi3",
    "plbart": "whisper",
    "qwen2": "llama",
    "qwen2_5_vl": "qwen_vl",
    "qwen2_moe": "moe",
    "qwen2_vl": "qwen_vl",
    "qwen3": "qwen3",
    "qwen3_moe": "moe",
    "qwen3_vl": "qwen_vl",
    "rembert": "rembert",
    "roberta": "bert",
    "roberta-prelayernorm": "bert",
    "seed_oss": "llama",
    "siglip": "siglip",
    "siglip2": "siglip",
    "siglip2_text_model": "siglip",
    "siglip2_vision_model": "siglip",
    "siglip_text_model": "siglip",
    "siglip_vision_model": "siglip",
    "smollm3": "llama",
    "starcoder2": "starcoder2",
    "swin": "swin",
    "swinv2": "swinv2",
    "t5": "t5",
    "timm/SwinTransformer": "timm",
    "timm/VisionTransformer": "timm",
    "timm/VisionTransformerDistilled": "timm",
    "umt5": "t5",
    "videomae": "yolos",
    "vit": "vit",
    "vit_mae": "vit",
    "vit_msn": "vit",
    "vivit": "vit",
    "wav2vec2": "wav2vec2",
    "wavlm": "wav2vec2",
    "whisper": "whisper",
    "xlm-roberta": "bert",
    "xlm-roberta-xl": "bert",
    "yolos": "yolos",
}
UNSUITED = {
    "ViTMAEForPreTraining": "its logits are pixels, not classes; prune the ViTMAEModel in it",
    "VideoMAEForPreTraining": "its logits are pixels, not classes; prune the VideoMAEModel in it",
}
"""Classes of known types that are refused, and why."""

REFUSED = {
    "deberta": "one layer projects the queries, keys and values of a head side by side",
    "gemma3n": "its values are normed, and its MLPs compare each neuron with all others",
    "gemma3n_text": "its values are normed, and its MLPs compare each neuron with all others",
    "led": "it attends in overlapping blocks",
    "longformer": "it attends in overlapping blocks",
    "longt5": "it attends in overlapping blocks",
    "nllb-moe": "its experts have no gate, and most of its neurons are in them",
    "switch_transformers": "its experts have no gate, and most of its neurons are in them",
    "xmod": "it has adapters inside its blocks",
}
"""Types that are refused, and why."""

TIMM_WRAPPER = "timm_wrapper"
"""The ``config.model_type`` of the models of transformers that wrap any model of timm."""

_REGISTERED: dict[str, tuple["Stack", ...]] = {}


@dataclass(frozen=True)
class Attention:
    """Where one attention of a block is. Names of layers are dotted and relative to the block.

    Attributes:
        module: The attention module, whose `forward` is replaced once its projections are cut.
        query, key, value, output: Its linear layers. A fused projection is named three times; its
            outputs are then the queries, the keys and the values, in this order.
        by_group: Whether a fused projection has the outputs of each key-value head together: its
            queries, its key, its value. Otherwise all queries come first, then all keys.
        forward: The function that replaces the `forward` of the module after cutting. None keeps
            the module's own, which must then read all widths from the layers.
        heads: The attribute of the module that counts its query heads; dots are allowed.
        kv_heads: The attribute that counts its key-value heads; empty if there are as many as query
            heads.
        rotary: Whether queries and keys have rotary couples, in the half-split layout.
        interleaved: Whether the two channels of a couple are neighbours instead.
        rotated: The function that counts the channels of a head that are rotated, given the
            attention module. They come first. None if all are.
        norms: The modules that norm each head of the query and of the key; empty if there are none.
        norm_dim: The dimension of the input of the norms that runs over heads: -2 or -3.
        kind: The name of the class that the module must have, where other classes have the same
            layers but compute something else; empty if there are none.
        identity: The modules inside the attention that must be `nn.Identity`, None or absent,
            because cutting would change what they do.
        unset: The attributes that must be false or None for the same reason; dots are allowed.
        qk: Whether queries and keys are a pair. Otherwise they stay whole.
        cached: Whether generation caches its keys and values, one of each per generated token.
        by_head: Whether whole key-value heads may leave: the `forward` asks
            `solpath.nn.attention.heads_left` for their number.
        name: What its pairs are called, after the name of the block.

    Example:
        >>> attention = lookup("bert")[0].attentions[0]
        >>> attention.query, attention.output
        ('attention.self.query', 'attention.output.dense')
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
    interleaved: bool = False
    rotated: Callable[[Any], int] | None = None
    norms: tuple[str, ...] = ()
    norm_dim: int = -2
    kind: str = ""
    identity: tuple[str, ...] = ()
    unset: tuple[str, ...] = ()
    qk: bool = True
    cached: bool = False
    by_group: bool = False
    by_head: bool = False
    name: str = "attention"


@dataclass(frozen=True)
class Mlp:
    """Where the MLP of a block is. Names of layers are dotted and relative to the block.

    Attributes:
        left: The layers before the neurons: fc1, or gate and up. A fused layer is named twice: its
            first half is the one, its second half the other.
        right: The layer after the neurons: fc2, or down.
        identity: The modules of the block that must be `nn.Identity`, None or absent, because
            cutting would change what they do.
    """

    left: tuple[str, ...]
    right: str
    identity: tuple[str, ...] = ()


@dataclass(frozen=True)
class Experts:
    """Where the experts of a mixture are, as tensors ``gate_up_proj`` and ``down_proj``.

    Attributes:
        module: The dotted name of the module that holds them, relative to the block.
        kind: The name of the class that it must have. The class tells how its tensors are laid out,
            see `use_experts_implementation` of transformers.
    """

    module: str
    kind: str


@dataclass(frozen=True)
class Stack:
    """One list of equal blocks in a model.

    Attributes:
        blocks: The dotted name of the list, or of a single block, relative to the base model. A
            ``*`` stands for every index of a list of lists.
        attentions: The attentions of a block, in the order in which they run.
        mlps: The MLP of a block. Where a family has several forms of it, each has an entry, and the
            one whose layers a block has is taken.
        experts: The experts of a block, likewise. A block that has some needs no MLP beside them.

    Example:
        >>> Stack("layers", attentions=(), mlps=(Mlp(left=("fc1",), right="fc2"),)).blocks
        'layers'
    """

    blocks: str
    attentions: tuple[Attention, ...]
    mlps: tuple[Mlp, ...]
    experts: tuple[Experts, ...] = ()


def register(model_type: str, *stacks: Stack) -> None:
    """Add or replace the table of one type of model.

    The first search, and the first `extract`, of a model with such a table compares every kind of
    its blocks masked with the same block cut, and refuses a table that is wrong; see
    `solpath.check_table`.

    Args:
        model_type: The ``config.model_type`` of the models; for timm, ``timm/`` and the class name.
        stacks: Where the prunable layers are. A stack that a model lacks is skipped (one tower of
            two, an encoder without its decoder), but the model must have at least one of them.

    Example:
        Leave the attentions of BERT dense, then put its own table back:

        >>> whole = lookup("bert")
        >>> register("bert", Stack("encoder.layer", attentions=(), mlps=whole[0].mlps))
        >>> {pair.kind for pair in solpath.find_pairs(model)}
        {'mlp'}
        >>> register("bert", *whole)
    """
    _REGISTERED[model_type] = stacks


def is_foreign(model_type: str | None) -> bool:
    """Return whether the table of a type was registered and is not the one that solpath has."""
    if model_type not in _REGISTERED:
        return False
    return model_type not in _MODULES or _REGISTERED[model_type] != _own(model_type)


def known_model_types() -> list[str]:
    """Return every ``config.model_type`` and every class of timm that can be pruned, sorted."""
    return sorted({*_MODULES, *_REGISTERED})


def type_of(model: nn.Module) -> Any:
    """Return the type under which the table of a model is listed, or None if it has no type.

    It is the ``config.model_type``. For a model of timm, wrapped or not, it is ``timm/`` and the
    name of the class.
    """
    inner = getattr(model, "timm_model", model)
    if type(inner).__module__.partition(".")[0] == "timm":
        return f"timm/{type(inner).__name__}"
    return getattr(getattr(model, "config", None), "model_type", None)


def lookup(model_type: str | None) -> tuple[Stack, ...]:
    """Return the table of one type of model, as `type_of` gives it.

    Raises:
        UnsupportedModelError: The type is unknown. The message lists the known types.
    """
    if model_type in _REGISTERED:
        return _REGISTERED[model_type]
    if reason := REFUSED.get(model_type or ""):
        raise UnsupportedModelError(f"model_type {model_type!r} cannot be pruned: {reason}.")
    if model_type not in _MODULES:
        raise UnsupportedModelError(
            f"model_type {model_type!r} is not known; known: {', '.join(known_model_types())}. "
            "solpath.arch.register adds one."
        )
    return _own(model_type)


def _own(model_type: str) -> tuple[Stack, ...]:
    """Return the table that solpath has of a type."""
    tables = import_module(f"solpath.arch.{_MODULES[model_type]}").TABLES
    stacks: tuple[Stack, ...] = tables[model_type]
    return stacks
