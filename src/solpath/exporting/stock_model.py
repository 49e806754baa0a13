"""Make a stock model from an extracted one, and say what stands in the way."""

import contextlib
import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException

from solpath.arch.building import drop_data_, without_weights
from solpath.errors import ExportError
from solpath.exporting.stock_fields import Field, Fit, fit
from solpath.exporting.stock_rotary import read_tables
from solpath.exporting.stock_weights import one_gain, stock_state
from solpath.model.counting import count_costs
from solpath.model.discovery import survey
from solpath.pair import Pair
from solpath.planning.plan import Plan
from solpath.running.forward import Batch
from solpath.storing.skeleton import constructor_options


@dataclass(frozen=True)
class Padding:
    """What of a stock model is zero, beside what its plan keeps.

    Attributes:
        units: Pair name to the units that every head has too many. Sublayers of which nothing
            stays are not among them.
        heads: Pair name to the heads that are too many, in the same way.
        sizes: What was counted, to the number in the dense model and in the stock model.
        padded: What was counted, to how much of it is zero.
    """

    units: Mapping[str, int]
    heads: Mapping[str, int]
    sizes: Mapping[str, tuple[int, int]]
    padded: Mapping[str, int]


def stock_model(model: Any, plan: Plan, batch: Batch, *, pad: bool) -> tuple[nn.Module, Padding]:
    """Return the stock model of an extracted one, and what of it is zero.

    Args:
        model: The extracted model, in float32. It is left untouched; weights in which nothing
            differs are shared with it.
        plan: Its plan.
        batch: Inputs to count multiply-accumulates on.
        pad: Whether layers may be filled up with zeros to one width.

    Raises:
        ExportError: A stock class cannot hold the model, or only with `pad`.
    """
    settings = model.config.to_dict()
    settings.pop("quantization_config", None)
    dense = _build(model, settings)
    pairs, sites = survey(dense)
    kept = {pair.name: plan.units_of(pair) for pair in pairs}
    tables = read_tables(model, sites)
    for site in sites:
        if site.qk is not None and site.qk.norms:
            one_gain(model, site)
    twin = _twin(model)
    found = fit(settings, pairs, kept, plan.heads, tables, any_count=twin is not None)
    if twin is not None and settings["hidden_size"] % found.settings["num_attention_heads"]:
        target = _build(model, _as_mistral(found.settings), twin)
    else:
        target = _build(model, found.settings)
    others, other_sites = survey(target)
    padding = _padding(dense, target, (pairs, others), kept, batch)
    if (padding.units or padding.heads) and not pad:
        raise ExportError(_refusal(type(model).__name__, found, pairs, kept, padding))
    both = (sites, other_sites), (pairs, others)
    state = stock_state(model, target, *both, kept, plan.heads, found, tables)
    target.load_state_dict(state, strict=True, assign=True)
    target.tie_weights()
    if model.can_generate() and model.generation_config is not None:
        target.generation_config = copy.deepcopy(model.generation_config)
    return target.eval(), padding


def _twin(model: Any) -> Any:
    """Return the class of Mistral that computes what a LLaMA does, or None if there is none.

    It takes any number of heads, where LLaMA wants one that divides the hidden size.
    """
    import transformers

    config = model.config
    if config.model_type != "llama" or config.attention_bias or config.mlp_bias:
        return None
    twin = getattr(transformers, type(model).__name__.replace("Llama", "Mistral"), None)
    same = twin is not None and twin.base_model_prefix == type(model).base_model_prefix
    return twin if same else None


def _as_mistral(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the configuration of a LLaMA without biases as one of Mistral."""
    own = ("architectures", "attention_bias", "mlp_bias", "pretraining_tp")
    others = {name: value for name, value in settings.items() if name not in own}
    return others | {"model_type": "mistral", "sliding_window": None}


def _build(model: Any, settings: Mapping[str, Any], twin: Any = None) -> Any:
    """Return a model without data from a configuration as plain values, of the class of `model`.

    Of `twin`, if one is given.
    """
    kind = twin or type(model)
    config = kind.config_class.from_dict(copy.deepcopy(dict(settings)))
    with without_weights():
        built = kind(config, **constructor_options(model))
    drop_data_(built)
    built.tie_weights()
    return built


def _padding(
    dense: nn.Module,
    target: nn.Module,
    pairs: tuple[Sequence[Pair], Sequence[Pair]],
    kept: Mapping[str, Tensor],
    batch: Batch,
) -> Padding:
    """Count what of a stock model is zero. Both models are on the meta device.

    Multiply-accumulates are left out of a model whose forward pass asks what its inputs are.
    """
    alive = [wide for wide in pairs[1] if kept[wide.name].shape[1]]
    units = {p.name: p.width - kept[p.name].shape[1] for p in alive}
    heads = {p.name: p.heads - len(kept[p.name]) for p in alive}

    def zeros(costs: Mapping[str, int]) -> int:
        return sum((p.units - kept[p.name].numel()) * costs[p.name] for p in pairs[1])

    numbers = [sum(p.numel() for p in built.parameters()) for built in (dense, target)]
    sizes = {"parameters": (numbers[0], numbers[1])}
    padded = {"parameters": zeros({pair.name: pair.cost for pair in pairs[1]})}
    sample = {name: value[:1].to("meta") for name, value in batch.items()}
    with contextlib.suppress(DataDependentOutputException):
        costs = [count_costs(m, p, sample) for m, p in zip((dense, target), pairs, strict=True)]
        sizes["multiply-accumulates"] = costs[0].dense["macs"], costs[1].dense["macs"]
        padded["multiply-accumulates"] = zeros(costs[1].unit["macs"])
    units, heads = ({name: n for name, n in found.items() if n} for found in (units, heads))
    return Padding(units, heads, sizes, padded)


def _refusal(
    kind: str,
    found: Fit,
    pairs: Sequence[Pair],
    kept: Mapping[str, Tensor],
    padding: Padding,
) -> str:
    """Say what a stock class cannot hold, what can be done, and what padding costs."""
    reasons = [_reason_of_heads(found, kept, padding.heads)] if padding.heads else []
    for rule in dict.fromkeys(_group(found, pair) for pair in pairs if pair.name in padding.units):
        ruled = [pair for pair in pairs if _group(found, pair) == rule]
        reasons.append(_reason(rule, ruled, kept, {p.name for p in ruled} & {*padding.units}))
    whole = {name: dense for name, (dense, _) in padding.sizes.items()}
    costs = " and ".join(
        f"{count:,} {name} ({count / whole[name]:.1%} of the dense ones)"
        for name, count in padding.padded.items()
    )
    return (
        f"a stock {kind} cannot hold this plan: {'; '.join(reasons)}. With pad=True the rest is "
        f"filled with zeros, which is exact and pads {costs} back."
    )


def _reason_of_heads(found: Fit, kept: Mapping[str, Tensor], padded: Mapping[str, int]) -> str:
    """Say why attentions that have lost heads do not fit, and what helps."""
    first = next(iter(padded))
    rule, most = found.places[first].count, len(kept[first]) + padded[first]
    if rule is None:
        return (
            f"it has no field for the number of its heads alone, and {first} keeps "
            f"{len(kept[first])} of {most}; plan without whole_groups"
        )
    counts = {n: len(kept[n]) for n, place in found.places.items() if place.count == rule}
    low, high = min(counts, key=counts.__getitem__), max(counts, key=counts.__getitem__)
    if counts[low] < counts[high]:
        return (
            f"its attentions keep {counts[low]} ({low}) to {counts[high]} ({high}) key-value "
            f"heads, and the field {rule.count} is one number; plan with the constraint uniform"
        )
    part = found.settings[rule.part] if rule.part else found.settings
    return (
        f"its number of heads must divide the hidden size of {part['hidden_size']}, and of "
        f"{most} key-value heads it keeps {counts[low]}; plan another size"
    )


_Group = tuple[str, Field | None]  # the kind of pairs, and the field that sets their width


def _group(found: Fit, pair: Pair) -> _Group:
    kind = "heads" if pair.kind in ("qk", "vo") else pair.kind
    return kind, found.places[pair.name].field


def _reason(
    group: _Group, pairs: Sequence[Pair], kept: Mapping[str, Tensor], padded: set[str]
) -> str:
    """Say why pairs that one field rules, or none, do not fit, and which constraint helps."""
    kind, rule = group
    what = {"heads": "heads", "mlp": "MLPs", "experts": "experts"}[kind]
    first = next(pair for pair in pairs if pair.name in padded)
    if rule is None:
        suffix = "qk', '*.vo" if kind == "heads" else kind
        width = kept[first.name].shape[1]
        return (
            f"it has no field for the width of its {what}, and {first.name} keeps {width} of "
            f"{first.width}; plan with protect=['*.{suffix}']"
        )
    channels = {p.name: p.channels * kept[p.name].shape[1] for p in pairs}
    widths = sorted({*channels.values()} - {0})
    where = f"inside {rule.part}" if rule.part else ""
    field = " ".join(filter(None, (f"the field {rule.name}", where)))
    if len(widths) > 1:
        low, high = (
            (min(channels, key=lambda n: (channels[n] == 0, channels[n]))),
            max(channels, key=channels.__getitem__),
        )
        reason = (
            f"its {what} have widths of {channels[low]} ({low}) to {channels[high]} ({high}), and "
            f"{field} is one number; plan with the constraint uniform"
        )
        if kind == "heads":
            reason += ", and equal widths of queries, keys and values"
        return reason
    if kind == "heads" and any(pair.channels > 1 for pair in pairs):
        return (
            f"its heads keep different rotary couples ({first.name}), and one table serves all of "
            "them; plan with the constraint shared_couples"
        )
    return f"{field} has no value for the {widths[0]} units of {first.name}; plan with " + (
        "multiple_of=8" if kind == "experts" else f"protect=['*.{kind}'], or whole ratios"
    )
