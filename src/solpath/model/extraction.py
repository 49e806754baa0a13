"""Cut a model to a plan: make a new model with smaller matrices."""

from typing import TypeVar, overload

from torch import nn

from solpath.model.basis import rotated
from solpath.model.checking import check_for_plan
from solpath.model.cutting import cut_model
from solpath.model.discovery import survey
from solpath.model.fingerprint import check_fingerprint, check_pairs
from solpath.model.placed import copied
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
        check: Whether to compare the model's weights with the plan's fingerprint first, and, once
            for every kind of block of a model whose table was registered, the masked block with the
            one that is cut; see `check_table`.

    Returns:
        A member of the family: a model of its own, on the device of `model`.

    Raises:
        FingerprintError: The plan belongs to another model (the message says what differs), or it
            was read from a saved model and lacks the basis of a pair that it cuts.
        UnsupportedModelError: The model cannot be cut or was cut already; see `find_pairs`. Or its
            table was registered, and is wrong or could not be checked; see `check_table`.
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
        check_fingerprint(plan.fingerprint, plan.pairs, model, pairs)
        check_for_plan(model, plan)
    else:
        check_pairs(plan.pairs, pairs)
    kept = {pair.name: plan.units_of(pair) for pair in pairs}
    with rotated(model, pairs, plan.rotations()):
        result = cut_model(model, pairs, sites, kept, plan.gains)
    setattr(result, EXTRACTED, plan)
    return result


def copy_extracted(model: Model) -> Model:
    """Return a deep copy of a model, whole in memory on the device that `model` runs on.

    The plan that it was cut to, if any, stays the same object.
    """
    plan = plan_of(model)
    return copied(model, {id(plan): plan}, device_of(model))
