"""Tell which model a path belongs to, by a digest of the weights that can be cut."""

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import nn

from solpath.errors import FingerprintError
from solpath.model.linear import LinearMap, linear_map
from solpath.pair import Fingerprint, Pair
from solpath.reading import tensors_digest, values_as_bytes


def fingerprint(model: nn.Module, pairs: tuple[Pair, ...]) -> Fingerprint:
    """Return the class name of `model` and a digest of the weights of every pair.

    The digest of a pair on the meta device, where weights have no data, is ``"meta"``.

    Args:
        model: The dense model. It is only read.
        pairs: The pairs of the model.

    Returns:
        The fingerprint, which does not depend on the device of the model.
    """

    def digest(pair: Pair) -> str:
        sha256 = hashlib.sha256()
        for linear in _layers(model, pair):
            for parameter in linear.parameters().values():
                if parameter.is_meta:
                    return "meta"
                sha256.update(values_as_bytes(parameter))
        return sha256.hexdigest()[:16]

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:  # hashing releases the GIL
        digests = pool.map(digest, pairs)
        return Fingerprint(
            type(model).__name__, {p.name: d for p, d in zip(pairs, digests, strict=True)}
        )


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
    difference = expected.differences(fingerprint(model, pairs))
    if difference:
        raise FingerprintError(f"the plan is for another model: {difference}.")
    check_pairs(known_pairs, pairs)


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


def weights_digest(model: nn.Module) -> str:
    """Return the first 16 hexadecimal digits of a SHA-256 of all weights and saved buffers."""
    return tensors_digest(model.state_dict())[:16]


def _layers(model: nn.Module, pair: Pair) -> list[LinearMap]:
    return [linear_map(model, path) for path in dict.fromkeys(s.module for s in pair.sides)]
