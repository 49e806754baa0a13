"""Cut the linear layers of a model, or of a part of one, and let its attentions run with them."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from solpath.arch import is_foreign
from solpath.errors import UnsupportedModelError
from solpath.model.discovery import Site
from solpath.model.linear import layer_at, linear_map
from solpath.model.pickling import slimmed
from solpath.model.placed import copied
from solpath.model.slicing import cut_linear, resize_
from solpath.nn.slim import KEPT_HEADS
from solpath.pair import Pair, Side
from solpath.running.forward import device_of
from solpath.running.placement import home_of

Model = TypeVar("Model", bound=nn.Module)


def cut_model(
    model: Model,
    pairs: Sequence[Pair],
    sites: Iterable[Site],
    kept: Mapping[str, Tensor],
    gains: Mapping[str, Tensor],
    heads: Mapping[str, Tensor] | None = None,
) -> Model:
    """Return a copy of a model that keeps some units of its pairs, without accelerate's hooks.

    Args:
        model: The model, or any module that has the layers at their paths. It is left untouched.
        pairs: Its pairs.
        sites: Its attentions.
        kept: Pair name to the kept units of every kept head, int64 ``[kept heads, r]``, ascending.
        gains: See `Plan.gains`.
        heads: See `Plan.heads`. None is none.

    Raises:
        UnsupportedModelError: An attention would lose whole heads, and cannot.
    """
    heads = heads or {}
    # The copy finds the cut parameters in `memo`, so a matrix that is cut is never copied whole.
    cut = {pair.name for pair in pairs if kept[pair.name].numel() < pair.units}
    layers = channels_kept(pairs, kept, heads)
    slim = [site for site in sites if cut & {pair.name for pair in site.pairs}]
    for site in slim:
        if site.vo.name in heads and (not site.table.by_head or is_foreign(site.model_type)):
            raise UnsupportedModelError(
                f"{site.path} cannot lose whole heads; plan without whole_groups, or protect "
                f"{site.path}."
            )
    home = home_of(model)
    memo: dict[int, Any] = {}
    for path, (order, axis) in layers.items():
        for key, parameter in cut_linear(linear_map(model, path), order, axis).items():
            parameter.data = parameter.data.to(home or parameter.device)
            memo[key] = parameter
    result = copied(model, memo, home)
    for layer in {layer_at(result, path) for path in layers}:
        resize_(layer)
    for site in slim:
        _slim_(result, site, kept, gains, heads)
    return result


def channels_kept(
    pairs: Sequence[Pair], kept: Mapping[str, Tensor], heads: Mapping[str, Tensor]
) -> dict[str, tuple[Tensor, int]]:
    """Return what is kept of every layer that a cut pair touches.

    Args:
        pairs: The pairs of a model.
        kept: Pair name to the kept units of every kept head, int64 ``[kept heads, r]``, ascending.
        heads: See `Plan.heads`.

    Returns:
        Path of the layer to its channels that stay, int64, ascending, and to the axis they lie on,
        0 for outputs and 1 for inputs.
    """
    layers: dict[str, list[tuple[Pair, Side]]] = defaultdict(list)
    for pair in pairs:
        for side in pair.sides:
            layers[side.module].append((pair, side))
    result = {}
    for path, sides in layers.items():
        if any(kept[pair.name].numel() < pair.units for pair, _ in sides):
            index = [
                pair.channel_index(side, kept[pair.name], heads.get(pair.name))
                for pair, side in sides
            ]
            result[path] = torch.cat(index).sort().values, int(sides[0][1].axis)
    return result


def _slim_(
    model: nn.Module,
    site: Site,
    kept: Mapping[str, Tensor],
    gains: Mapping[str, Tensor],
    heads: Mapping[str, Tensor],
) -> None:
    """Give an attention whose projections were cut a `forward` that runs with their widths."""
    if site.table.forward is None:
        return
    attention = model.get_submodule(site.path)
    device = device_of(attention)
    buffers: dict[str, Tensor] = {}
    if site.qk and site.table.rotary:
        buffers["couples"] = kept[site.qk.name]
    if site.qk and site.qk.norms:
        whole = torch.ones(site.qk.heads, site.qk.left[0].repeat, dtype=torch.float64)
        gain = gains.get(site.qk.name, whole)
        buffers["gain"] = gain[heads.get(site.qk.name, torch.arange(len(gain)))].flatten()
    if site.vo.name in heads:
        buffers[KEPT_HEADS] = heads[site.vo.name]
    for name, value in buffers.items():
        value = value if device.type == "meta" else value.to(device)
        attention.register_buffer(name, value, persistent=False)
    attention.__class__ = slimmed(type(attention), site.model_type, site.table)
