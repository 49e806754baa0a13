"""Cut a model to a plan: make a new model with smaller matrices."""

import copy
from collections import defaultdict
from typing import Any, TypeVar, overload

import torch
from torch import Tensor, nn

from solpath.arch import type_of
from solpath.model.basis import rotated
from solpath.model.discovery import Site, survey
from solpath.model.fingerprint import check_fingerprint
from solpath.model.linear import linear_map
from solpath.model.pickling import slimmed
from solpath.model.slicing import cut_linear, resize_
from solpath.pair import Pair, Side
from solpath.planning.plan import EXTRACTED, Plan, plan_of
from solpath.pretrained import Name, as_model
from solpath.running.claims import claimed
from solpath.running.forward import device_of
from solpath.running.modes import contained

Model = TypeVar("Model", bound=nn.Module)


@overload
def extract(model: Model, plan: Plan, *, check: bool = True) -> Model: ...


@overload
def extract(model: Name, plan: Plan, *, check: bool = True) -> nn.Module: ...


@contained
def extract(model: nn.Module | Name, plan: Plan, *, check: bool = True) -> nn.Module:
    """Return a copy of `model` that keeps only the units of `plan`.

    The copy is used like the original: it has the same forward signature, kinds of outputs,
    `config` and names in its `state_dict`. Layers that keep every unit are copied bit for bit. Its
    attribute ``solpath_plan`` is the plan, and its ``save_pretrained`` does what `save` does.
    `model` is left untouched.

    Args:
        model: The dense model that the plan was made for, or its folder or hub id, which is loaded
            on the CPU.
        plan: From `SolutionPath.plan`.
        check: Whether to compare the model's weights with the plan's fingerprint first.

    Returns:
        A member of the family: a model of its own, on the device of `model`.

    Raises:
        FingerprintError: The plan belongs to another model (the message says what differs), or it
            was read from a saved model and lacks the basis of a pair that it cuts.
        UnsupportedModelError: The model cannot be cut or was cut already; see `find_pairs`.
        FileError: A folder or id was given and cannot be read; see `from_pretrained`.
        ConfigError: The model needs timm, which is not installed, or asks timm for more than a
            model; see `from_pretrained`.
        ModelInUseError: The model is masked or searched, or another thread works on it.

    Example:
        >>> small = solpath.extract(model, path.plan(sparsity=0.5))
        >>> round(small.solpath_plan.achieved.sparsity, 1)
        0.5
        >>> small(**batch).logits.shape == model(**batch).logits.shape
        True
    """
    model = as_model(model)
    with claimed(model, doing="cut"):
        return _extract(model, plan, check)


def _extract(model: Model, plan: Plan, check: bool) -> Model:
    pairs, sites = survey(model)
    if check:
        check_fingerprint(plan.fingerprint, model, pairs)

    # deepcopy finds the cut parameters in `memo`, so a matrix that is cut is never copied whole.
    cut = {pair.name for pair in pairs if plan.units_of(pair).shape[1] < pair.width}
    layers = _sides_of_layers(pairs, cut)
    with rotated(model, pairs, plan.rotations()):
        memo: dict[int, Any] = {}
        for path, sides in layers.items():
            index = [pair.channel_index(side, plan.units_of(pair)) for pair, side in sides]
            order = torch.cat(index).sort().values
            memo |= cut_linear(linear_map(model, path), order, sides[0][1].axis)
        result = copy.deepcopy(model, memo)
    for path in layers:
        resize_(result.get_submodule(path))
    for site in sites:
        if cut & {pair.name for pair in site.pairs}:
            _slim_(result, site, plan)
    setattr(result, EXTRACTED, plan)
    return result


def copy_extracted(model: Model) -> Model:
    """Return a deep copy of a model. The plan that it was cut to, if any, stays the same object."""
    plan = plan_of(model)
    return copy.deepcopy(model, {id(plan): plan})


def _sides_of_layers(pairs: tuple[Pair, ...], cut: set[str]) -> dict[str, list[tuple[Pair, Side]]]:
    """Return every layer that a cut pair touches, by path, with all pairs and sides in it."""
    layers: dict[str, list[tuple[Pair, Side]]] = defaultdict(list)
    for pair in pairs:
        for side in pair.sides:
            layers[side.module].append((pair, side))
    return {
        path: sides for path, sides in layers.items() if any(pair.name in cut for pair, _ in sides)
    }


def _slim_(model: nn.Module, site: Site, plan: Plan) -> None:
    """Give an attention whose projections were cut a `forward` that runs with their widths."""
    if site.table.forward is None:
        return
    attention = model.get_submodule(site.path)
    device = device_of(attention)
    buffers: dict[str, Tensor] = {}
    if site.qk and site.table.rotary:
        buffers["couples"] = plan.units_of(site.qk)
    if site.qk and site.qk.norms:
        whole = torch.ones(site.qk.heads, site.qk.left[0].repeat, dtype=torch.float64)
        buffers["gain"] = plan.gains.get(site.qk.name, whole).flatten()
    for name, value in buffers.items():
        value = value if device.type == "meta" else value.to(device)
        attention.register_buffer(name, value, persistent=False)
    attention.__class__ = slimmed(type(attention), type_of(model), site.table)
