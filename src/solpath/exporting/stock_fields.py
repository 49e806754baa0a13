"""Which fields of a stock configuration set the widths of a model, and to what a plan sets them.

A stock class builds all its layers from a few numbers. A `Field` names one of them and the pairs
that it rules. `fit` gives every field the least value that holds what a plan keeps, and says where
in the layers of that size every kept head and unit stands. The rest of such a layer is filled with
zeros: a head whose values and outputs are zero adds nothing.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from solpath.exporting.stock_rotary import Table, smaller_tables
from solpath.pair import Pair

Settings = dict[str, Any]
"""A configuration as plain values, from its ``to_dict``."""


@dataclass(frozen=True)
class Field:
    """A number of a configuration that sets the width of some pairs.

    Attributes:
        kind: What it sets: the neurons of MLPs or of experts, or the channels of heads, which are
            as many for queries and keys as for values.
        name: The name of the field.
        inside: A part of the paths of the layers that it rules. The first field that fits a layer
            rules it.
        part: The configuration inside the configuration that has the field; empty for itself.
        count: For heads, the name of the field that sets the number of query heads; empty if no
            field does while heads keep their width.
        value: Returns the least value of the field that gives these layers as many neurons at
            least, from the configuration and the pairs' dotted paths and widths. None if the field
            is the width itself.
    """

    kind: Literal["mlp", "experts", "heads"]
    name: str
    inside: str = ""
    part: str = ""
    count: str = ""
    value: Callable[[Settings, Mapping[str, int]], float] | None = None

    def rules(self, pair: Pair) -> bool:
        """Return whether it sets the width of a pair."""
        kind = "heads" if pair.kind in ("qk", "vo") else pair.kind
        return kind == self.kind and self.inside in pair.right.module


def _dinov2_ratio(settings: Settings, widths: Mapping[str, int]) -> int:
    """Count the multiples of the hidden size, of which a gated MLP takes two thirds."""
    hidden, wanted, ratio = settings["hidden_size"], max(widths.values()), 1
    gated = settings["use_swiglu_ffn"]
    while (_two_thirds(hidden * ratio) if gated else hidden * ratio) < wanted:
        ratio += 1
    return ratio


def _two_thirds(width: int) -> int:
    return (int(width * 2 / 3) + 7) // 8 * 8


def _swin_ratio(settings: Settings, widths: Mapping[str, int]) -> float:
    """Return the least ratio, which every stage multiplies with its own width and rounds down."""

    def stage(path: str) -> int:
        return int(path.partition("layers.")[2].partition(".")[0])

    sizes = {path: int(settings["embed_dim"]) << stage(path) for path in widths}
    ratio = max(max(width, 1) / sizes[path] for path, width in widths.items())
    while any(int(ratio * sizes[path]) < width for path, width in widths.items()):
        ratio = math.nextafter(ratio, math.inf)
    return ratio


def _vision_ratio(settings: Settings, widths: Mapping[str, int]) -> int:
    return max(1, -(-max(widths.values()) // int(settings["embed_dim"])))


def _aligned(name: str) -> Callable[[Settings, Mapping[str, int]], int]:
    """Round up to what the grouped products of experts take: rows of 16 bytes, of 2 a number."""
    return lambda settings, widths: min(-(-max(*widths.values(), 1) // 8) * 8, settings[name])


_MLP = Field("mlp", "intermediate_size")
_HEADS = Field("heads", "head_dim", count="num_attention_heads")
_TWO_SIDES = (
    Field("mlp", "encoder_ffn_dim", inside="encoder.layers"),
    Field("mlp", "decoder_ffn_dim", inside="decoder.layers"),
)
_T5 = (Field("mlp", "d_ff"), Field("heads", "d_kv"))
_DINOV2 = (Field("mlp", "mlp_ratio", value=_dinov2_ratio), _HEADS)
_SWIN = (Field("mlp", "mlp_ratio", value=_swin_ratio),)
_EXPERTS, _ONLY_EXPERTS = (
    Field("experts", name, value=_aligned(name))
    for name in ("moe_intermediate_size", "intermediate_size")
)
_FIELDS: dict[str, tuple[Field, ...]] = {
    **dict.fromkeys(
        (
            "audio-spectrogram-transformer", "beit", "cohere", "cohere2", "deit", "ernie4_5",
            "eurobert", "gemma", "gemma2", "gemma3_text", "granite", "ijepa", "llama",
            "ministral", "mistral", "olmo", "qwen2", "qwen3", "seed_oss", "smollm3", "starcoder2",
            "vit", "vit_mae", "vit_msn", "vivit",
        ),
        (_MLP, _HEADS),
    ),
    **dict.fromkeys(
        (
            "bart", "blenderbot", "blenderbot-small", "m2m_100", "marian", "mbart", "pegasus",
            "plbart", "whisper",
        ),
        _TWO_SIDES,
    ),
    **dict.fromkeys(("mt5", "t5", "umt5"), _T5),
    **dict.fromkeys(("dinov2", "dinov2_with_registers"), _DINOV2),
    **dict.fromkeys(("swin", "swinv2"), _SWIN),
    "bloom": (),
    "distilbert": (Field("mlp", "hidden_dim"),),
    "falcon": (Field("mlp", "ffn_hidden_size"),),
    "gpt2": (Field("mlp", "n_inner"),),
    "gpt_oss": (_ONLY_EXPERTS, _HEADS),
    "mixtral": (_ONLY_EXPERTS, _HEADS),
    "opt": (Field("mlp", "ffn_dim"),),
    "qwen2_moe": (
        Field("mlp", "shared_expert_intermediate_size", inside="shared_expert"), _MLP, _EXPERTS,
        _HEADS,
    ),
    "qwen2_vl_vision": (Field("mlp", "mlp_ratio", value=_vision_ratio),),
    "qwen3_moe": (_MLP, _EXPERTS, _HEADS),
}  # fmt: skip

DIVIDED = ("eurobert", "gemma3_text", "llama")
"""Types whose number of heads must divide the hidden size, though heads have a width of their own.
"""

_POOLED = ("siglip_vision_model", "siglip2_vision_model")
"""Types whose one field also sets the width of a head that is not pruned, if they have one."""

_TOWERS = {"text_model": "text_config", "vision_model": "vision_config"}
_LANGUAGE = {"language_model": "text_config"}
_PARTS: dict[str, dict[str, str]] = {
    **dict.fromkeys(("clip", "siglip", "siglip2"), _TOWERS),
    **dict.fromkeys(("gemma3", "llava"), _LANGUAGE | {"vision_tower": "vision_config"}),
    **dict.fromkeys(
        ("qwen2_vl", "qwen2_5_vl", "qwen3_vl"), _LANGUAGE | {"visual": "vision_config"}
    ),
}
"""Types of several parts: a part of the paths of its layers, to the configuration it is built from.
"""


def fields_of(settings: Settings, *, pooling: bool = False) -> tuple[Field, ...]:
    """Return the fields of a configuration that set widths.

    Args:
        settings: The configuration.
        pooling: Whether a head that pools images is pruned with the blocks before it.

    Example:
        >>> [field.name for field in fields_of({"model_type": "t5"})]
        ['d_ff', 'd_kv']
    """
    kind = settings.get("model_type", "")
    if kind in _POOLED and settings["vision_use_head"] and not pooling:
        return ()
    if kind not in _PARTS:
        return _FIELDS.get(kind, (_MLP,))
    return tuple(
        replace(found, inside=inside, part=part)
        for inside, part in _PARTS[kind].items()
        for found in fields_of(settings[part], pooling=kind in ("siglip", "siglip2"))
    )


@dataclass(frozen=True)
class Place:
    """Where the kept units of a pair stand in a stock model.

    Attributes:
        field: The field that sets the width there. None if none does, and the width is the dense
            one.
        index: Index of every kept unit, int64 ``[kept heads, r]``.
        heads: Index of every kept head, int64 ``[kept heads]``.
        count: The field that sets the number of heads there. None if they are the dense ones.
    """

    field: Field | None
    index: Tensor
    heads: Tensor
    count: Field | None = None


@dataclass
class Fit:
    """A stock configuration for a plan.

    Attributes:
        settings: The configuration.
        places: Pair name to where its units stand.
        couples: Name of a rotary table to the dense couples that stay in it, int64 ``[couples]``.
            It is empty if heads keep all couples.
    """

    settings: Settings
    places: dict[str, Place]
    couples: dict[str, Tensor] = field(default_factory=dict)


def fit(
    settings: Settings,
    pairs: Sequence[Pair],
    kept: Mapping[str, Tensor],
    heads: Mapping[str, Tensor],
    tables: Mapping[str, Table],
    *,
    any_count: bool = False,
) -> Fit:
    """Return the stock configuration that holds what a plan keeps.

    Every head keeps as many units as all others, and every attention as many heads.

    Args:
        settings: The dense configuration, which is left untouched.
        pairs: The pairs of the dense model.
        kept: Pair name to the kept units of every kept head, int64 ``[kept heads, r]``.
        heads: Pair name to the kept heads, int64 ``[kept heads]``; all, if it is not there.
        tables: From `read_tables`.
        any_count: Whether the number of heads need not divide the hidden size, though the class of
            the model wants that; see `DIVIDED`.

    Raises:
        ExportError: A rotary table changes with the length of the sequence.
    """
    result = Fit(settings, {})
    for pair in pairs:
        own = heads.get(pair.name, torch.arange(pair.heads))
        result.places[pair.name] = Place(None, kept[pair.name], own)
    left = list(pairs)
    for found in fields_of(settings):
        ruled = [pair for pair in left if found.rules(pair)]
        left = [pair for pair in left if pair not in ruled]
        part = {**(result.settings[found.part] if found.part else result.settings)}
        narrow = any(kept[pair.name].shape[1] < pair.width for pair in ruled)
        lost = found.count and any(pair.name in heads for pair in ruled)
        if narrow and found.kind == "heads":
            _fit_heads(result, part, found, ruled, kept, tables)
        elif narrow:
            widths = {pair.right.module: kept[pair.name].shape[1] for pair in ruled}
            value = found.value or (lambda _, widths: max(*widths.values(), 1))
            part[found.name] = value(part, widths)
            for pair in ruled:
                _place(result, pair, field=found, index=_first(kept[pair.name]))
        if lost:
            _fit_count(result, part, found, ruled, kept, any_count)
        result.settings = {**result.settings, found.part: part} if found.part else part
    return result


def _place(result: Fit, pair: Pair, **changes: Any) -> None:
    """Change where the units of a pair stand."""
    result.places[pair.name] = replace(result.places[pair.name], **changes)


def _first(kept: Tensor) -> Tensor:
    """Return the indices 0, 1, 2, … for the units of every head, in place of those they had."""
    return torch.arange(kept.shape[1]).expand(kept.shape[0], -1)


def _fit_heads(
    result: Fit,
    part: Settings,
    found: Field,
    pairs: Sequence[Pair],
    kept: Mapping[str, Tensor],
    tables: Mapping[str, Table],
) -> None:
    """Set the width of heads and their rotary tables in `part`, and place the units of attentions.

    Nothing changes if there are rotary couples and no tables for them.
    """
    rotary = [pair for pair in pairs if pair.channels > 1]
    plain = [pair for pair in pairs if pair.channels == 1]
    if any(pair.name not in tables for pair in rotary):
        return
    width = max(1, *(kept[pair.name].shape[1] for pair in plain))
    known = {tables[pair.name].name: tables[pair.name] for pair in rotary}
    couples = {
        name: _union([kept[pair.name] for pair in rotary if tables[pair.name].name == name])
        for name in known
    }
    if rotary:
        count = max(-(-width // 2), *(len(index) for index in couples.values()))
        width = 2 * count
        couples = {name: _extend(index, count) for name, index in couples.items()}
        if count < rotary[0].width:
            part["rope_parameters"] = smaller_tables(part, known.values(), couples)
            result.couples.update(couples)
    part[found.name] = width
    for pair in plain:
        _place(result, pair, field=found, index=_first(kept[pair.name]))
    for pair in rotary:
        index = torch.searchsorted(couples[tables[pair.name].name], kept[pair.name].contiguous())
        _place(result, pair, field=found, index=index)


def _fit_count(
    result: Fit,
    part: Settings,
    found: Field,
    pairs: Sequence[Pair],
    kept: Mapping[str, Tensor],
    any_count: bool,
) -> None:
    """Set the number of heads in `part`, and place those that are kept one after the other."""
    count = max(len(kept[pair.name]) for pair in pairs if kept[pair.name].shape[1])
    repeat = part[found.count] // pairs[0].heads
    if part["model_type"] in DIVIDED and not any_count:
        while part["hidden_size"] % (count * repeat):
            count += 1
    if not part.get(found.name):  # the width was implied by the number
        part[found.name] = next(pair.width for pair in pairs if pair.kind == "vo")
    part[found.count] = count * repeat
    if "num_key_value_heads" in part:
        part["num_key_value_heads"] = count
    for pair in pairs:
        _place(result, pair, count=found, heads=torch.arange(len(kept[pair.name])))


def _union(kept: Sequence[Tensor]) -> Tensor:
    return torch.tensor(sorted({i for index in kept for i in index.flatten().tolist()})).long()


def _extend(couples: Tensor, count: int) -> Tensor:
    """Add couples that nothing uses until there are `count`, and return them in ascending order."""
    free = torch.tensor([i for i in range(count) if i not in couples.tolist()], dtype=torch.int64)
    return torch.cat([couples, free[: count - len(couples)]]).sort().values
