"""Put the weights of an extracted model into a stock model of equal or larger widths.

Kept channels go where a `Fit` places them; all others are zero, so they add nothing. What a stock
attention would compute otherwise is put right in its weights:

- A scale s' of the logits in place of s: the queries are multiplied by s / s'.
- Norms over heads of d' channels in place of d: they divide by the root of Σx² / d' + ε. With
  queries and keys multiplied by c = √(d'/d), that is the root of Σx² / d + ε, of which the norm of
  the dense head takes its share; the weights of the norms are divided by c.
- The gain of normed queries, one for all heads of an attention: it multiplies the weight of the
  norm.
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from solpath.errors import ExportError
from solpath.exporting.stock_fields import Fit
from solpath.exporting.stock_rotary import Table
from solpath.model.cutting import channels_kept
from solpath.model.discovery import Site
from solpath.model.linear import LinearMap, linear_map
from solpath.pair import Pair, Side

_Part = tuple[Pair, Side, Pair, Side]  # a pair and a side of the dense model, and of the target


def stock_state(
    small: nn.Module,
    target: nn.Module,
    sites: tuple[Sequence[Site], Sequence[Site]],
    pairs: tuple[Sequence[Pair], Sequence[Pair]],
    kept: Mapping[str, Tensor],
    heads: Mapping[str, Tensor],
    fit: Fit,
    tables: Mapping[str, Table],
) -> dict[str, Tensor]:
    """Return the weights of a stock model, by their names.

    Args:
        small: The extracted model. It is only looked at.
        target: The stock model, which may be on the meta device. It is only looked at.
        sites: The attentions of the dense model and those of `target`.
        pairs: The pairs of the dense model and those of `target`.
        kept: Pair name to the kept units of every kept head, int64 ``[kept heads, r]``.
        heads: Pair name to the kept heads, int64 ``[kept heads]``; all, if it is not there.
        fit: Where they stand in `target`.
        tables: The rotary tables of the dense model.

    Returns:
        Names of `target` to new tensors, or to those of `small` where nothing differs.

    Raises:
        ExportError: Queries have gains that differ between heads, or a weight is missing.
    """
    names = {id(parameter): name for name, parameter in target.named_parameters()}
    changed = {}
    channels = channels_kept(pairs[0], kept, heads)
    factors = _factors(small, target, *sites)
    for path, parts in _layers(*pairs).items():
        source, wanted = linear_map(small, path), linear_map(target, path)
        order = channels[path][0] if path in channels else None
        for leaf, parameter in wanted.parameters().items():
            if leaf == "bias" and parts[0][1].axis == 1:
                continue
            old = source.read(source.parameters()[leaf])
            value = _laid_out(_rows(source, old, parts[0][1].axis), parameter, wanted, parts, order,
                              kept, heads, fit, factors)  # fmt: skip
            changed[names[id(parameter)]] = value
    for site in sites[0]:
        changed |= _norms(small, target, site, fit, tables)
    return _checked(small.state_dict(), target.state_dict(), changed)


def _layers(dense: Sequence[Pair], target: Sequence[Pair]) -> dict[str, list[_Part]]:
    """Return the parts of all layers, by the path of the layer."""
    layers: dict[str, list[_Part]] = defaultdict(list)
    for pair, other in zip(dense, target, strict=True):
        for side, wanted in zip(pair.sides, other.sides, strict=True):
            layers[side.module].append((pair, side, other, wanted))
    return layers


def _rows(linear: LinearMap, value: Tensor, axis: int) -> Tensor:
    """Return the channels of a weight or bias as its first dimension, those of experts in a row."""
    if linear.neurons is None:
        return value.movedim(linear.dim(axis), 0) if value.dim() > 1 else value
    value = value.movedim(linear.dim(axis), 1) if value.dim() > 2 else value
    return value.flatten(0, 1)


def _laid_out(
    rows: Tensor,
    parameter: nn.Parameter,
    wanted: LinearMap,
    parts: Sequence[_Part],
    order: Tensor | None,
    kept: Mapping[str, Tensor],
    heads: Mapping[str, Tensor],
    fit: Fit,
    factors: Mapping[tuple[str, str], float],
) -> Tensor:
    """Return the value of a parameter of the stock model, zero but for the channels in `rows`."""
    result = torch.zeros(parameter.shape, dtype=rows.dtype)
    axis = parts[0][1].axis
    new = _rows(wanted, result, axis)
    flat = new.clone()
    for pair, side, other, place in parts:
        index = pair.channel_index(side, kept[pair.name], heads.get(pair.name))
        if order is not None:  # channels of the extracted layer, in ascending order
            index = torch.searchsorted(order, index)
        units, slots = fit.places[pair.name].index, fit.places[pair.name].heads
        if units.numel() and (int(units.max()) >= other.width or int(slots.max()) >= other.heads):
            raise ExportError(f"{place.module} of the stock model is too narrow for {pair.name}.")
        factor = factors.get((pair.name, side.module), 1.0)
        values = rows[index]
        if factor != 1.0:
            values = (values.double() * factor).to(values.dtype)
        flat[other.channel_index(place, units, slots)] = values
    if wanted.neurons is None:
        return flat.movedim(0, wanted.dim(axis)) if flat.dim() > 1 else flat
    flat = flat.view(result.shape[0], -1, *flat.shape[1:])
    return flat.movedim(1, wanted.dim(axis)) if flat.dim() > 2 else flat


def _factors(
    small: nn.Module, target: nn.Module, dense: Sequence[Site], others: Sequence[Site]
) -> dict[tuple[str, str], float]:
    """Return what queries and keys are multiplied by, by the pair and the path of the layer."""
    factors: dict[tuple[str, str], float] = {}
    for site, other in zip(dense, others, strict=True):
        if site.qk is None or other.qk is None:
            continue
        if site.qk.norms:
            c = math.sqrt(other.qk.width / site.qk.width)
            factors |= {(site.qk.name, side.module): c for side in site.qk.sides}
        else:
            ratio = _scale(small, site) / _scale(target, other)
            factors[site.qk.name, site.qk.left[0].module] = ratio
    return factors


def _scale(model: nn.Module, site: Site) -> float:
    return float(getattr(model.get_submodule(site.path), "scaling", None) or 1.0)


def _norms(
    small: nn.Module, target: nn.Module, site: Site, fit: Fit, tables: Mapping[str, Table]
) -> dict[str, Tensor]:
    """Return the weights of the norms over the heads of an attention, by their names."""
    if site.qk is None or not site.qk.norms:
        return {}
    gain = one_gain(small, site)
    scale = gain * _scale(small, site) / _scale(target, site)
    if gain == scale == 1.0 and not fit.couples:
        return {}
    result = {}
    for norm, factor in zip(site.qk.norms, (scale, 1.0), strict=True):
        old: Any = small.get_submodule(norm.module)
        wide: Any = target.get_submodule(norm.module)
        width, count = len(wide.weight) // 2, len(old.weight) // 2
        index = torch.arange(count)
        if fit.couples:
            index = fit.couples[tables[site.qk.name].name]
        index = torch.cat((index, index + count))
        factor = factor / math.sqrt(width / count)
        plus = _plus_one(old)
        values = (old.weight.detach().double()[index] + plus) * factor - plus
        result[f"{norm.module}.weight"] = values.to(old.weight.dtype)
    return result


def _plus_one(norm: nn.Module) -> float:
    """Return what a norm adds to its weight: 1 for those of Gemma, 0 for those of LLaMA."""
    weight: Any = norm.weight
    probe = torch.full_like(weight.detach(), 3.0)
    with torch.no_grad():
        unit: Tensor = torch.func.functional_call(norm, {"weight": torch.zeros_like(probe)}, probe)
    return float(unit.abs().max() > 0.5)


def one_gain(small: nn.Module, site: Site) -> float:
    """Return the gain of the normed queries of an attention.

    Raises:
        ExportError: It differs between heads.
    """
    gain = small.get_submodule(site.path)._buffers.get("gain")
    if gain is None:
        return 1.0
    if float(gain.max() - gain.min()) > 1e-12 * float(gain.max()):
        raise ExportError(
            f"the heads of {site.path} have gains of {float(gain.min()):.3f} to "
            f"{float(gain.max()):.3f}, and a stock class has one norm of queries for all heads; "
            "plan with protect=['*.qk'], or export to a format that holds them."
        )
    return float(gain[0])


def _checked(
    state: Mapping[str, Tensor], wanted: Mapping[str, Tensor], changed: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return the whole state, of which `changed` is new and all else is taken over."""
    if extra := sorted(set(state) - set(wanted)):
        raise ExportError(f"a stock class has no {extra[0]}; remove it, or merge it, first.")
    result = {}
    for name, value in wanted.items():
        found = changed.get(name, state.get(name))
        if found is None or found.shape != value.shape:
            shape = None if found is None else list(found.shape)
            raise ExportError(f"{name} is {shape}, but {list(value.shape)} in a stock class.")
        result[name] = found
    return result
