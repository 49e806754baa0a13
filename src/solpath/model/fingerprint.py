"""Tell which model a path belongs to, by a digest of the weights that can be cut.

A digest is one of numbers, not of how they are held: a bfloat16 checkpoint and its float32 copy
have the same one. docs/file-formats.md says how it is made.
"""

import hashlib
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import torch
from torch import Tensor, nn

from solpath.errors import FingerprintError, UnsupportedModelError
from solpath.model.discovery import find_blocks
from solpath.model.linear import linear_map
from solpath.model.plain import check_floats
from solpath.model.weights import weight_reader
from solpath.pair import Fingerprint, Pair
from solpath.planning.plan import Plan, plan_of
from solpath.reading import tensors_digest, values_as_bytes

_VERSION = 2
_CHUNK = 2**18  # numbers that are looked at together; part of what a digest of version 2 means
_GLANCE = 2**8


def fingerprint(
    model: nn.Module,
    pairs: Sequence[Pair],
    *,
    version: int = _VERSION,
    read: Callable[[str], Tensor] | None = None,
) -> Fingerprint:
    """Return the class name of `model` and a digest of the weights of every pair.

    Weights that accelerate has off-loaded are read one after the other from where they are. The
    digest of a pair without data, on the meta device, is ``"meta"``.

    Args:
        model: The dense model. It is only read.
        pairs: The pairs of the model.
        version: See `Fingerprint`.
        read: Reads a parameter of the model by its name. None is a `weight_reader`.

    Returns:
        The fingerprint, which does not depend on the device of the model. In version 2 it does not
        depend on the dtype either, as long as no number is rounded.
    """
    read, layout = read or weight_reader(model), parameters_of(model, pairs)
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:  # hashing releases the GIL
        if version == 1:
            raw = pool.map(lambda names: _raw_digest(map(read, names)), layout.values())
            digests = dict(zip(layout, raw, strict=True))
            return Fingerprint(type(model).__name__, digests, _dtypes(model, layout), version)
        names = list(dict.fromkeys(name for group in layout.values() for name in group))
        found = pool.map(lambda name: values_digest(read(name)), names)
        return combined(model, pairs, dict(zip(names, found, strict=True)))


def parameters_of(model: nn.Module, pairs: Sequence[Pair]) -> dict[str, list[str]]:
    """Return the names of the weights and biases of every pair, by its name.

    Args:
        model: The dense model. It is only looked at.
        pairs: The pairs of the model.
    """
    names = {id(value): name for name, value in model.named_parameters(remove_duplicate=False)}
    return {
        pair.name: [
            names[id(parameter)]
            for path in dict.fromkeys(side.module for side in pair.sides)
            for parameter in linear_map(model, path).parameters().values()
        ]
        for pair in pairs
    }


def combined(model: nn.Module, pairs: Sequence[Pair], digests: Mapping[str, str]) -> Fingerprint:
    """Return the fingerprint of a model from the digests of its parameters.

    Args:
        model: The dense model. Its weights are not read.
        pairs: The pairs of the model.
        digests: Parameter name to `values_digest`, for all that `parameters_of` names.
    """
    layout, made = parameters_of(model, pairs), {}
    for pair, names in layout.items():
        text = "\n".join(digests[name] for name in names)
        empty = "meta" in (digests[name] for name in names)
        made[pair] = "meta" if empty else hashlib.sha256(text.encode()).hexdigest()[:16]
    return Fingerprint(type(model).__name__, made, _dtypes(model, layout), _VERSION)


def _dtypes(model: nn.Module, layout: Mapping[str, Sequence[str]]) -> str:
    known = dict(model.named_parameters(remove_duplicate=False))
    dtypes = {known[name].dtype for names in layout.values() for name in names}
    return ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))


def values_digest(values: Tensor) -> str:
    """Return a digest of the shape and the numbers of a tensor, whatever dtype holds them.

    Args:
        values: A tensor of floats on any device.

    Returns:
        A SHA-256 in hexadecimal, or ``"meta"`` for a tensor without data.

    Example:
        >>> values = torch.randn(3, 5).bfloat16()
        >>> values_digest(values) == values_digest(values.float()) == values_digest(values.double())
        True
        >>> values_digest(values) == values_digest(torch.randn(3, 5))
        False
    """
    if values.is_meta:
        return "meta"
    digest = hashlib.sha256(str([*values.shape]).encode())
    for chunk in values.detach().contiguous().flatten().split(_CHUNK):  # type: ignore[no-untyped-call]
        narrow = _narrowest(chunk.cpu())
        digest.update(str(narrow.dtype).encode())
        digest.update(values_as_bytes(narrow))
    return digest.hexdigest()


def _narrowest(values: Tensor) -> Tensor:
    """Return the same numbers in the first of bfloat16, float16, float32 and float64 that can."""
    if values.dtype == torch.float64:
        values = _if_equal(values, torch.float32)
    if values.dtype in (torch.float32, torch.float16):
        values = _if_equal(values, torch.bfloat16)
    return _if_equal(values, torch.float16) if values.dtype == torch.float32 else values


def _if_equal(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Return `values` in another dtype, or as they are if that would change a number."""
    wide = torch.promote_types(values.dtype, torch.float32)
    whole = torch.int64 if wide == torch.float64 else torch.int32
    for some in (values[:_GLANCE], values):  # the first few settle nearly all of them
        part = some.to(wide)
        narrow = part.to(dtype)
        if not torch.equal(narrow.to(wide).view(whole), part.view(whole)):
            return values
    return narrow


def check_fingerprint(
    expected: Fingerprint,
    known_pairs: Sequence[Pair],
    model: nn.Module,
    pairs: tuple[Pair, ...],
) -> None:
    """Raise `FingerprintError` unless `model` is the one that a path or plan was made for.

    Args:
        expected: The fingerprint in the path or plan.
        known_pairs: The pairs in it.
        model: The model at hand.
        pairs: The pairs of `model`.

    Raises:
        FingerprintError: The class, the pairs or the weights differ; the message says which.
    """
    check_same(expected, fingerprint(model, pairs, version=expected.version))
    check_pairs(known_pairs, pairs)


def check_same(expected: Fingerprint, found: Fingerprint) -> None:
    """Raise `FingerprintError` unless two fingerprints are of one model.

    Args:
        expected: The fingerprint in a path or plan.
        found: That of the model at hand, of the same version.

    Raises:
        FingerprintError: The class, the pairs or the weights differ; the message says which.
    """
    if difference := expected.differences(found):
        raise FingerprintError(f"the plan is for another model: {difference}.")


def check_pairs(known_pairs: Sequence[Pair], pairs: Sequence[Pair]) -> None:
    """Raise `FingerprintError` unless every pair of a path or plan is one of the model at hand.

    Args:
        known_pairs: The pairs in the path or plan. Those that no batch reached are not among them.
        pairs: The pairs of the model.

    Raises:
        FingerprintError: A pair is missing or described otherwise; the message says which.
    """
    found = {pair.name: pair for pair in pairs}
    for pair in known_pairs:
        if found.get(pair.name) != pair:
            state = "described otherwise" if pair.name in found else "missing"
            raise FingerprintError(
                f"the plan is for another model: its pair {pair.name} is {state} in this one."
            )


def check_cut_from(dense: nn.Module, plan: Plan, name: str) -> None:
    """Raise `FingerprintError` unless a smaller model may have been cut from this dense one.

    The weights of the dense model may have been rounded, packed or trained since. Those of the
    first pair are looked at, and a warning says if they are others of the same dtype.

    Args:
        dense: The dense model at hand, or another model that was cut from it.
        plan: The plan of the smaller model.
        name: What messages call the smaller model.

    Raises:
        FingerprintError: The class or the pairs differ; the message says which.
    """
    known, own = plan.fingerprint, plan_of(dense)
    if own is not None:
        words = known.differences(own.fingerprint)
    else:
        words = known.differences(replace(known, architecture=type(dense).__name__))
        words = words or _other_pairs(plan, dense)
    if words:
        raise FingerprintError(
            f"{name} was not cut from this dense model: {words}; pass the one that it is from."
        )
    if own is None and (pair := _other_weights(plan, dense)):
        warnings.warn(
            f"{name} was cut from a dense model with other weights, those of {pair} among them, "
            "and will be fitted to this one.",
            stacklevel=5,
        )


def _other_pairs(plan: Plan, dense: nn.Module) -> str:
    """Return in words how the pairs of a dense model are not those of a plan, or nothing."""
    try:
        blocks = find_blocks(dense, checked=True)
    except UnsupportedModelError:  # packed layers are of other classes
        return ""
    found = {pair.name: pair for block in blocks for pair in block.pairs}
    known = plan.fingerprint.digests
    words = plan.fingerprint.differences(
        replace(plan.fingerprint, digests={name: known.get(name, "") for name in found})
    )
    for pair in plan.pairs if not words else ():
        for field, value in vars(pair).items():
            if (here := getattr(found[pair.name], field)) != value:
                return f"the {field} of {pair.name} is {here}, not {value}"
    return words


def _other_weights(plan: Plan, dense: nn.Module) -> str:
    """Return the name of the first pair, if its weights are not those of a plan, or nothing."""
    known = plan.fingerprint
    try:
        check_floats(dense)
        found = fingerprint(dense, plan.pairs[:1], version=known.version)
    except UnsupportedModelError:
        return ""
    [(name, digest)] = found.digests.items()
    same = digest == known.digests[name] or "meta" in (digest, known.digests[name])
    return "" if same or found.dtype != known.dtype else name


def weights_digest(model: nn.Module) -> str:
    """Return the first 16 hexadecimal digits of a SHA-256 of all weights and saved buffers."""
    read = weight_reader(model)
    return tensors_digest({name: read(name) for name in model.state_dict()})[:16]


def _raw_digest(weights: Iterable[Tensor]) -> str:
    """Return the digest of version 1: of the bytes of weights, one after the other."""
    sha256 = hashlib.sha256()
    for values in weights:
        if values.is_meta:
            return "meta"
        sha256.update(values_as_bytes(values))
    return sha256.hexdigest()[:16]
