"""Rebuild an extracted model without data from its configuration and plan, then give it data."""

import contextlib
import copy
import inspect
import threading
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    _global_module_registration_hooks,
    register_module_module_registration_hook,
)

from solpath.arch import TIMM_WRAPPER, known_model_types, timm
from solpath.arch.building import (
    CONSTRUCTOR_OPTIONS,
    NOT_A_SIZE,
    drop_data_,
    without_weights,
)
from solpath.errors import SolpathError
from solpath.model.discovery import find_pairs
from solpath.model.extraction import extract
from solpath.planning.plan import EXTRACTED, Plan
from solpath.reading import Expected, Header, dtype_name
from solpath.running.modes import entered, undoing
from solpath.storing.quantized import untie_

if TYPE_CHECKING:
    from transformers import PreTrainedModel

AUTO_MARK = {"quant_method": "solpath"}
"""What `config.json` says under ``quantization_config``, so that transformers calls solpath."""

_SMALL = 2**20
_MODULES, _MODULES_PER_TENSOR = 1000, 10  # most of them hold no tensor, at most this many


def resolve(name: str, model_type: str) -> type["PreTrainedModel"]:
    """Return the model class that transformers has under `name`.

    Raises:
        SolpathError: solpath cannot cut `model_type`, or transformers has no such class of that
            type.
    """
    import transformers

    known = [*known_model_types(), TIMM_WRAPPER]
    if model_type not in known:
        raise SolpathError(f"model_type {model_type!r} is not one of {known}.")
    found = getattr(transformers, name, None)
    if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
        raise SolpathError(f"class {name!r} is not a model of transformers.")
    if getattr(found.config_class, "model_type", None) != model_type:
        raise SolpathError(f"class {name!r} is not of model_type {model_type!r}.")
    return found


def check_sizes(config: Mapping[str, Any], headers: Collection[Header]) -> None:
    """Refuse a configuration with whole numbers that the weight files cannot account for.

    This keeps a forged configuration from allocating memory without limit. No number may be above
    the largest dimension of any tensor, or above 2**20 where that is larger. How many layers the
    numbers may stand for is checked while they are built, see `build_skeleton`.

    Args:
        config: The configuration, as read.
        headers: The headers of all weight files.

    Raises:
        SolpathError: A number is too large.
    """
    shapes = [shape for header in headers for _, shape in header.values()]
    largest = max(_SMALL, max((size for shape in shapes for size in shape), default=0))
    left: list[tuple[str, Any]] = list(config.items())
    while left:
        name, value = left.pop()
        if isinstance(value, dict):
            left += value.items()
        elif isinstance(value, list):
            left += [(name, item) for item in value]
        elif isinstance(value, int) and abs(value) > largest and name not in NOT_A_SIZE:
            raise SolpathError(
                f"{name} is {value}, but no tensor in the weight files has a size above {largest}."
            )


@contextlib.contextmanager
def _modules_for(tensors: int) -> Iterator[None]:
    """Refuse to build many more modules than some tensors can be spread over.

    However a configuration counts its layers, each of them is built, and asks here first.
    """
    thread, most, built = threading.get_ident(), _MODULES + _MODULES_PER_TENSOR * tensors, 0

    def count(module: nn.Module, name: str, part: nn.Module | None) -> None:
        nonlocal built
        if threading.get_ident() == thread:
            built += 1
            if built > most:
                raise SolpathError(
                    f"the configuration asks for more than {most} modules, but the weight files "
                    f"hold {tensors} tensors."
                )

    def remove() -> None:  # torch's own handle is lost if a Ctrl-C comes during the registration
        hooks = _global_module_registration_hooks
        for key in [key for key, hook in hooks.items() if hook is count]:
            del hooks[key]

    with undoing(remove):
        register_module_module_registration_hook(count)
        yield


def build_skeleton(
    model_class: Any, config: Mapping[str, Any], head: Mapping[str, Any], plan: Plan, tensors: int
) -> tuple[nn.Module, Expected]:
    """Build the extracted model on the meta device, without data.

    Args:
        model_class: The class, from `resolve`.
        config: The configuration, from `config.json`.
        head: The fields of `solpath.json`.
        plan: The plan that the model was cut to.
        tensors: The number of tensors in the weight files.

    Returns:
        The model, and the name, dtype and shape of every tensor that the weight files must hold,
        of quantised ones as wholes.

    Raises:
        SolpathError: Configuration, options and plan do not describe one model of this class, or
            one with far more layers than there are tensors.
        ValueError: A quantised weight is none of the model.
    """
    if config.get("model_type") != head["model_type"]:
        raise SolpathError(
            f"model_type is {config.get('model_type')!r}, not {head['model_type']!r}."
        )
    known = inspect.signature(model_class.__init__).parameters
    if unknown := set(head["options"]) - set(known):
        raise SolpathError(f"options has {unknown.pop()!r}, which {head['class']} does not take.")
    if head["model_type"] == TIMM_WRAPPER:
        timm.check_settings(config)
    values = {name: value for name, value in config.items() if value != AUTO_MARK}
    settings = model_class.config_class.from_dict(copy.deepcopy(values))
    parts = [settings, *(getattr(settings, name) for name in settings.sub_configs)]
    dtypes = [(part, part.dtype) for part in parts if part is not None]
    with entered(without_weights(), _modules_for(tensors)):
        dense = model_class._from_config(
            settings,
            dtype=getattr(torch, head["dtype"]),
            attn_implementation=head["attention"],
            experts_implementation=head.get("experts", "eager"),
            **head["options"],
        )
    drop_data_(dense)
    dense.tie_weights()
    for part, dtype in dtypes:  # building sets them to the dtype of the model
        part.dtype = dtype
    return dense, cut_skeleton_(dense, head, plan)


def cut_skeleton_(model: nn.Module, head: Mapping[str, Any], plan: Plan) -> Expected:
    """Cut a dense model without data, in place.

    Args:
        model: The model, on the meta device.
        head: The fields of `solpath.json`.
        plan: The plan to cut it to.

    Returns:
        The name, dtype and shape of every tensor that the weight files must hold, of quantised
        ones as wholes.

    Raises:
        SolpathError: The plan is not for this model, or the model has a tensor that cannot be
            saved.
        ValueError: A quantised weight is none of the model.
    """
    pairs = find_pairs(model)
    if tuple(pair for pair in pairs if pair.name not in plan.unreached) != plan.pairs:
        raise SolpathError(f"plan: its pairs are not those of this {head['class']}.")
    whole = replace(plan, dropped_rotations=())  # a rotation changes no shape
    vars(model).update(vars(extract(model, whole, check=False)))
    setattr(model, EXTRACTED, plan)
    untie_(model, head.get("quantized", {}))
    for path, module in model.named_modules():
        if stray := [key for key, v in vars(module).items() if isinstance(v, Tensor) and v.is_meta]:
            raise SolpathError(f"{path}.{stray[0]} is a tensor but no parameter or buffer.")
    return {
        name: (tensor.dtype, tuple(tensor.shape))
        for name, tensor in state_of(model).items()
        if tensor.is_meta
    }


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """Return all parameters and buffers by name. Tied ones appear once.

    Buffers that a `state_dict` leaves out are among them.
    """
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def expect_buffers(
    expected: Expected, headers: Mapping[str, Header], dtype: torch.dtype
) -> Expected:
    """Let floating-point buffers be stored in the model's dtype or in the one they are built in.

    Args:
        expected: Name to (dtype, shape) as built.
        headers: The headers of all weight files.
        dtype: The dtype of the model.

    Returns:
        `expected`, with `dtype` for every floating-point buffer that is stored in it.
    """
    found = {name: entry[0] for header in headers.values() for name, entry in header.items()}
    return {
        name: (
            dtype if built.is_floating_point and found.get(name) == dtype_name(dtype) else built,
            shape,
        )
        for name, (built, shape) in expected.items()
    }


def assign_(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Give a skeleton its data. Tied parameters stay tied, and buffers without data stay as built.

    Args:
        model: The skeleton, which is changed in place.
        tensors: Name to data, for every parameter and for the buffers that are stored.
    """
    made: dict[int, nn.Parameter] = {}
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        for leaf, old in module._parameters.items():
            if old is None:
                continue
            if id(old) not in made:
                made[id(old)] = nn.Parameter(tensors[prefix + leaf], old.requires_grad)
            module._parameters[leaf] = made[id(old)]
        for leaf in module._buffers:
            if prefix + leaf in tensors:
                module._buffers[leaf] = tensors[prefix + leaf]


def constructor_options(model: nn.Module) -> dict[str, bool]:
    """Return the constructor arguments that the configuration lacks, read off the model."""
    known = inspect.signature(type(model).__init__).parameters
    result = {}
    for name, path in CONSTRUCTOR_OPTIONS.items():
        if name in known:
            part: Any = model
            for step in path:
                part = getattr(part, step, None)
            result[name] = part is not None
    return result


def check_same(
    name: str, state: Mapping[str, Tensor], built: Mapping[str, Tensor], dtype: Any
) -> None:
    """Check that `load` would build tensors of these names, dtypes and shapes.

    Args:
        name: The name of the model's class, for the messages.
        state: The tensors of the model.
        built: The tensors of a skeleton built from its configuration and plan.
        dtype: The dtype of the model, which any tensor may have.

    Raises:
        SolpathError: A tensor differs, or is on one side only.
    """
    if wrong := sorted(set(state) ^ set(built)):
        where = "the model has" if wrong[0] in state else "only a model built from its config has"
        raise SolpathError(
            f"{name} cannot be rebuilt from its config and plan: {where} {wrong[0]}."
        )
    for key, tensor in state.items():
        other = built[key]
        if tensor.shape != other.shape or tensor.dtype not in (other.dtype, dtype):
            raise SolpathError(
                f"{name} cannot be rebuilt from its config and plan: {key} is {tensor.dtype} "
                f"{list(tensor.shape)}, not {other.dtype} {list(other.shape)}."
            )
