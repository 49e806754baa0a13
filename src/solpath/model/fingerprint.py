"""Tell which model a path belongs to, by a digest of the weights that can be cut."""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn

from solpath.errors import FingerprintError
from solpath.model.linear import LinearMap, linear_map
from solpath.pair import Fingerprint, Pair


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


def check_fingerprint(expected: Fingerprint, model: nn.Module, pairs: tuple[Pair, ...]) -> None:
    """Raise `FingerprintError` unless `model` is the one that a path or plan was made for.

    Args:
        expected: The fingerprint in the path or plan.
        model: The model at hand.
        pairs: The pairs of `model`.

    Raises:
        FingerprintError: The class, the pairs or the weights differ; the message says which.
    """
    difference = expected.differences(fingerprint(model, pairs))
    if difference:
        raise FingerprintError(f"the plan is for another model: {difference}.")


def weights_digest(model: nn.Module) -> str:
    """Return the first 16 hexadecimal digits of a SHA-256 of all weights and saved buffers."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(values_as_bytes(tensor))
    return digest.hexdigest()[:16]


def _layers(model: nn.Module, pair: Pair) -> list[LinearMap]:
    return [linear_map(model, path) for path in dict.fromkeys(s.module for s in pair.sides)]


def values_as_bytes(tensor: Tensor) -> Any:
    """Return the values of a tensor as an array of bytes, for a digest."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
