"""Hold weights that torchao has quantised as plain tensors, and as JSON that says how to join them.

The JSON is what torchao's own encoder for safetensors says of a weight. Nothing in a file names a
class to import: the classes of `_KINDS` are made, from values of the classes of `_VALUES`.
"""

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from solpath.errors import ConfigError, UnsupportedModelError
from solpath.reading import DTYPES, Expected, whole
from solpath.running.memory import parts_of

WAY = (
    "save the model before quantising it, and quantise what load returns, which gives the same "
    "weights"
)
"""The way out for weights that cannot be saved, for the messages."""
_KINDS = ("Int8Tensor", "IntxUnpackedToInt8Tensor")
_VALUES = ("torch.dtype", "QuantizeTensorToInt8Kwargs", "PerRow", "PerTensor", "MappingType")
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}
_FLOATS = {name for name, dtype in _DTYPES.items() if dtype.is_floating_point}
_PARTS = {"qdata": {"int8"}, "scale": _FLOATS, "zero_point": {"int8", *_FLOATS}}

Description = Mapping[str, Any]
"""How the parts of a weight are joined: ``kind``, ``attributes`` and ``parts``, all plain JSON."""


def is_quantized(tensor: Tensor) -> bool:
    """Return whether torchao has quantised a tensor, of whatever kind."""
    home = type(tensor).__module__.partition(".")[0]
    return home == "torchao" and is_traceable_wrapper_subclass(tensor)


def described(name: str, weight: Any) -> dict[str, Any]:
    """Return how to join the parts of a weight, once it is sure that this gives the weight again.

    Args:
        name: The name of the weight, for the message.
        weight: A weight that torchao has quantised. Its parts are those of `parts_of`.

    Raises:
        UnsupportedModelError: It is of a kind that cannot be saved, or has settings that cannot.
    """
    kind = type(weight).__name__
    if kind not in _KINDS:
        raise UnsupportedModelError(
            f"{name} is a {kind} of torchao, not one of {', '.join(_KINDS)}, which can be saved; "
            f"{WAY}."
        )
    tensors = {part.removeprefix("."): tensor for part, tensor in parts_of(weight).items()}
    parts = {part: str(tensor.dtype).removeprefix("torch.") for part, tensor in tensors.items()}
    try:
        text = json.dumps(weight, cls=_torchao().TensorSubclassAttributeJSONEncoder)
        result = {"kind": kind, "attributes": json.loads(text)["_data"], "parts": parts}
        check_description(result)
        expected = parts_expected(name, result, weight.dtype, tuple(weight.shape))
        for part, tensor in tensors.items():
            if (found := tuple(tensor.shape)) != (wanted := expected[f"{name}.{part}"][1]):
                raise ValueError(f"{part} has the shape {[*found]}, not {[*wanted]}")
        again: Any = joined(result, tensors)
        if again.__tensor_flatten__() != weight.__tensor_flatten__():
            raise ValueError(f"{weight.__tensor_flatten__()[1]} has no exact JSON")
    except (ValueError, TypeError, ImportError) as error:
        raise UnsupportedModelError(
            f"{name} is a {kind} of torchao with settings that cannot be saved: {error}; {WAY}."
        ) from error
    return result


def check_description(value: Any) -> None:
    """Raise `ValueError` unless a value that was read describes a weight of a known kind."""
    if not isinstance(value, dict) or value.keys() != {"kind", "attributes", "parts"}:
        raise ValueError("it has other fields than kind, attributes and parts")
    kind, attributes, parts = value["kind"], value["attributes"], value["parts"]
    if kind not in _KINDS:
        raise ValueError(f"kind is {kind!r}, not one of {', '.join(_KINDS)}")
    if not isinstance(parts, dict) or not {"qdata", "scale"} <= parts.keys() <= _PARTS.keys():
        raise ValueError(f"parts is {parts!r}, which are not those of a {kind}")
    for part, dtype in parts.items():
        if not isinstance(dtype, str) or dtype not in _PARTS[part]:
            raise ValueError(f"parts.{part} is {dtype!r}, not one of {sorted(_PARTS[part])}")
    if not isinstance(attributes, dict) or not isinstance(attributes.get("block_size"), list):
        raise ValueError("attributes.block_size is missing or not a list")
    for size in attributes["block_size"]:
        whole(size, 1)
    for field in attributes.values():
        _check_value(field)


def _check_value(value: Any) -> None:
    """Raise `ValueError` if torchao would make anything but `_VALUES` of a value that was read."""
    if isinstance(value, dict):
        if value.get("_type", _VALUES[0]) not in _VALUES:
            raise ValueError(f"attributes has a {value['_type']!r}, not one of {_VALUES}")
        for field in value.values():
            _check_value(field)
    elif isinstance(value, list):
        for field in value:
            _check_value(field)


def untie_(model: nn.Module, quantized: Mapping[str, Description]) -> None:
    """Give weights of their own, without data, to the layers whose weights are quantised.

    Quantising a weight that two layers share leaves the other one its floats.

    Args:
        model: A model without data, which is changed in place.
        quantized: Name of a weight to how its parts are joined.

    Raises:
        ValueError: The model has no such weight.
    """
    known = dict(model.named_parameters(remove_duplicate=False))
    for name in quantized:
        if name not in known:
            raise ValueError(f"quantized names {name!r}, which is no weight of the model")
        path, _, leaf = name.rpartition(".")
        empty = nn.Parameter(torch.empty_like(known[name]), requires_grad=False)
        model.get_submodule(path)._parameters[leaf] = empty


def with_parts(expected: Expected, quantized: Mapping[str, Description]) -> Expected:
    """Return the tensors that are stored: of a quantised weight, its parts.

    Args:
        expected: Name to (dtype, shape), of weights as wholes.
        quantized: Name of a weight to how its parts are joined.

    Raises:
        ValueError: A description does not fit the shape or dtype of its weight.
    """
    result = {name: entry for name, entry in expected.items() if name not in quantized}
    for name, description in quantized.items():
        result |= parts_expected(name, description, *expected[name])
    return result


def parts_expected(
    name: str, description: Description, dtype: torch.dtype, shape: tuple[int, ...]
) -> Expected:
    """Return (dtype, shape) of the parts of one weight, by their names; see `with_parts`."""
    block = description["attributes"]["block_size"]
    if len(block) != len(shape) or any(size % b for size, b in zip(shape, block, strict=True)):
        raise ValueError(f"block_size of {name} is {block}, which does not divide {[*shape]}")
    own = {"_type": "torch.dtype", "_data": str(dtype).removeprefix("torch.")}
    if description["attributes"].get("dtype") != own:
        raise ValueError(f"dtype of {name} is not {own['_data']}, that of the model")
    blocks = tuple(size // b for size, b in zip(shape, block, strict=True))
    return {
        f"{name}.{part}": (_DTYPES[kind], shape if part == "qdata" else blocks)
        for part, kind in description["parts"].items()
    }


def joined(description: Description, parts: Mapping[str, Tensor]) -> Tensor:
    """Return the weight of torchao that some tensors are the parts of; no data is copied.

    Args:
        description: A checked description.
        parts: Name of a part to tensor.

    Raises:
        ValueError: The description does not describe a weight of torchao.
    """
    from torchao.quantization import MappingType, PerRow, PerTensor
    from torchao.quantization.quantize_.workflows import QuantizeTensorToInt8Kwargs

    kind, attributes = description["kind"], description["attributes"]
    try:
        weight: Any = _torchao().object_from_dict({"_type": kind, "_data": {**attributes, **parts}})
        names, settings = weight.__tensor_flatten__()
    except (TypeError, AttributeError, AssertionError) as error:
        raise ValueError(f"{kind}: {error}") from error
    inputs = getattr(weight, "act_quant_kwargs", None)
    known = inputs is None or (
        type(inputs) is QuantizeTensorToInt8Kwargs
        and type(inputs.granularity) in (PerRow, PerTensor)
        and type(inputs.mapping_type) is MappingType
        and type(inputs.reduce_range) is bool
    )
    known &= getattr(weight, "activation_quantization", None) in (None, "int8_asym_per_token")
    known &= type(getattr(weight, "reduce_range", False)) is bool
    if not known or {*names} != parts.keys() or settings.keys() != attributes.keys():
        raise ValueError(f"{kind}: attributes is {attributes!r}, which torchao would not write")
    if kind == "IntxUnpackedToInt8Tensor":
        weight.block_size = tuple(weight.block_size)  # JSON has lists only
    return weight  # type: ignore[no-any-return]


def check_torchao(place: Any) -> None:
    """Raise `ConfigError` if torchao, which a saved model needs, is missing.

    Args:
        place: The file or folder of the model, for the message.
    """
    try:
        _torchao()
    except ImportError as error:
        raise ConfigError(
            f"{place} holds weights that torchao has quantised, which need a torchao that can "
            f"make them ({error}); install it with: pip install torchao."
        ) from error


def _torchao() -> Any:
    """Return torchao's module for safetensors, which its tensors and transformers refer to."""
    from torchao.prototype.safetensors import safetensors_utils

    return safetensors_utils
