"""Cut a model to a plan: a new model with really smaller matrices."""

import copy
from typing import TypeVar, overload

from torch import nn

from solpath.arch import lookup
from solpath.discover import EXTRACTED, find_pairs, fingerprint
from solpath.errors import FingerprintError
from solpath.plan import Plan
from solpath.pretrained import Name, as_model
from solpath.slicing import slice_linear

Model = TypeVar("Model", bound=nn.Module)


@overload
def extract(model: Model, plan: Plan, *, check: bool = True) -> Model: ...


@overload
def extract(model: Name, plan: Plan, *, check: bool = True) -> nn.Module: ...


def extract(model: nn.Module | Name, plan: Plan, *, check: bool = True) -> nn.Module:
    """A copy of `model` that keeps only the units of `plan`.

    The copy has the class behaviour of the original: forward signature, outputs, `config`,
    `state_dict`. Layers that keep every unit are copied bit for bit. Its attribute
    ``solpath_plan`` is the plan. `model` is left untouched.

    Args:
        model: the dense model the plan was made for, or its folder or hub id, which is loaded on
            the CPU.
        plan: from `SolutionPath.plan`.
        check: compare the model's weights with the plan's fingerprint first.

    Raises:
        FingerprintError: the plan belongs to another model; the message says what differs.
        UnsupportedModelError: the model cannot be cut, or was cut already.

    Example:
        >>> small = solpath.extract(model, path.plan(sparsity=0.5))  # doctest: +SKIP
    """
    model = as_model(model)
    pairs = find_pairs(model)
    if check:
        difference = plan.fingerprint.differences(fingerprint(model, pairs))
        if difference:
            raise FingerprintError(f"the plan is for another model: {difference}.")

    # The copy finds the cut layers in `memo`, so a dense layer that is cut is never copied whole.
    memo: dict[int, object] = {}
    cut: set[str] = set()
    for pair in pairs:
        kept = plan.kept[pair.name]
        if kept.shape[1] == pair.width:
            continue
        cut.add(pair.name)
        for side in pair.sides:
            linear = model.get_submodule(side.module)
            assert isinstance(linear, nn.Linear)
            memo[id(linear)] = slice_linear(linear, pair.channel_index(side, kept), side.axis)
    result = copy.deepcopy(model, memo)

    architecture = lookup(getattr(model.config, "model_type", None))
    for qk, vo, mlp in zip(pairs[::3], pairs[1::3], pairs[2::3], strict=True):
        if cut & {qk.name, vo.name}:
            block = mlp.name.removesuffix(".mlp")
            attention = result.get_submodule(f"{block}.{architecture.attention.module}")
            architecture.slim_(attention, plan.kept[qk.name])
    setattr(result, EXTRACTED, plan)
    return result
