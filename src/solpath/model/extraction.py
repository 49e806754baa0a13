"""Cut a model to a plan: make a new model with smaller matrices."""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar, cast, overload

import torch
from torch import Tensor, nn

from solpath.errors import BudgetError
from solpath.model.basis import rotated
from solpath.model.checking import check_for_plan
from solpath.model.cutting import channels_kept, cut_model
from solpath.model.discovery import survey
from solpath.model.fingerprint import check_fingerprint, check_pairs
from solpath.model.linear import layer_at, linear_map
from solpath.model.placed import copied
from solpath.model.slicing import cut_linear
from solpath.pair import Pair
from solpath.planning.plan import EXTRACTED, Plan, check_plan, plan_of
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
        check: Whether to compare the model's weights with the plan's fingerprint first, and, once
            for every kind of block of a model whose table was registered, the masked block with the
            one that is cut; see `check_table`.

    Returns:
        A member of the family: a model of its own, on the device of `model`.

    Raises:
        FingerprintError: The plan belongs to another model (the message says what differs), or it
            was read from a saved model and lacks the basis of a pair that it cuts.
        BudgetError: The plan keeps a number of bytes, and the model is in another dtype than that
            of the search.
        UnsupportedModelError: The model cannot be cut or was cut already; see `find_pairs`. Or its
            table was registered, and is wrong or could not be checked; see `check_table`.
        FileError: A folder or id was given and cannot be read; see `from_pretrained`.
        ConfigError: The model needs timm, which is not installed, or asks timm for more than a
            model; see `from_pretrained`. Or `plan` is no plan.
        ModelInUseError: The model is masked or searched, or another thread works on it.

    Example:
        >>> small = solpath.extract(model, path.plan(sparsity=0.5))
        >>> round(small.solpath_plan.achieved.sparsity, 1)
        0.5
        >>> small(**batch).logits.shape == model(**batch).logits.shape
        True
    """
    check_plan(plan)
    model = as_model(model)
    with claimed(model, doing="cut"):
        return _extract(model, plan, check)


def _extract(model: Model, plan: Plan, check: bool) -> Model:
    pairs, sites = survey(model)
    if check:
        check_fingerprint(plan.fingerprint, plan.pairs, model, pairs)
        check_for_plan(model, plan)
        plan = in_dtype_of(model, plan)
    else:
        check_pairs(plan.pairs, pairs)
    kept = {pair.name: plan.units_of(pair) for pair in pairs}
    with rotated(model, pairs, plan.rotations()):
        result = cut_model(model, pairs, sites, kept, plan.gains, plan.heads)
    setattr(result, EXTRACTED, plan)
    return result


def in_dtype_of(model: nn.Module, plan: Plan) -> Plan:
    """Return a plan with the bytes of a model that holds the weights of the search in any dtype.

    Args:
        model: The dense model.
        plan: A plan for it. It is returned as it is if it was made in the dtype of the model.

    Raises:
        BudgetError: The plan was asked for a number of bytes, which another dtype does not come to.
    """
    known = [getattr(torch, name, None) for name in plan.fingerprint.dtype.split(", ")]
    dtype = next(model.parameters()).dtype
    if len(known) != 1 or known[0] in (None, dtype):
        return plan
    before, after = known[0].itemsize, dtype.itemsize
    for measure in ("bytes", "cache"):
        if plan.asked.get(measure, 0) > 1:
            raise BudgetError(
                f"the plan keeps {plan.asked[measure]:,} of {measure} in {known[0]}, and this model"
                f" is in {dtype}, of {after} bytes a number in place of {before}; plan by a share, "
                f"such as path.plan({measure}=0.5)."
            )
    sizes = plan.achieved
    more = sizes.params * (after - before)
    sizes = replace(sizes, bytes=sizes.bytes + more, cache=sizes.cache * after // before)
    return replace(plan, achieved=sizes)


def cut_reader(
    model: nn.Module, plan: Plan, read: Callable[[str], Tensor]
) -> Callable[[str], Tensor]:
    """Return a function that reads the weights of the smaller model one by one.

    Every weight is turned and cut on its own, to the bits that `extract` would give it, and nothing
    of it is kept.

    Args:
        model: The dense model, whose parameters are on the meta device. While a weight is cut, it
            is the only one that the model has; so call the function in one thread at a time.
        plan: A plan of `model`.
        read: Reads a parameter or buffer of the dense model by its name.

    Returns:
        Name of a parameter or buffer of the smaller model to its value.
    """
    pairs, _ = survey(model)
    channels = channels_kept(pairs, {pair.name: plan.units_of(pair) for pair in pairs}, plan.heads)
    rotations = plan.rotations()
    inside: dict[str, list[Pair]] = defaultdict(list)  # layer to its pairs
    for pair in pairs:
        for path in dict.fromkeys(side.module for side in pair.sides):
            inside[path].append(pair)
    layers = {id(p): path for path in inside for p in layer_at(model, path).parameters(False)}
    for path in inside:  # experts are one module, whose layers are its parameters
        layers |= {id(p): path for p in linear_map(model, path).parameters().values()}
    places = {name: layers[id(p)] for name, p in model.named_parameters() if id(p) in layers}

    def read_cut(name: str) -> Tensor:
        value = read(name)
        if name not in places:
            return value
        path, leaf = places[name], name.rpartition(".")[2]
        parameters = layer_at(model, path)._parameters
        empty = parameters[leaf]
        parameters[leaf] = nn.Parameter(value, requires_grad=False)
        try:
            with rotated(model, inside[path], rotations):
                turned = parameters[leaf]
                linear = linear_map(model, path)
                small = cut_linear(linear, *channels[path]) if path in channels else {}
        finally:
            parameters[leaf] = empty
        return small.get(id(turned), cast("nn.Parameter", turned)).detach()

    return read_cut


def copy_extracted(model: Model) -> Model:
    """Return a deep copy of a model, whole in memory on the device that `model` runs on.

    The plan that it was cut to, if any, stays the same object.
    """
    plan = plan_of(model)
    return copied(model, {id(plan): plan}, device_of(model))
