"""Batches: any iterable of what the model takes, addressed by step and cycled when short."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from solpath.errors import BatchError


def derive_seed(*parts: object) -> int:
    """A 63-bit seed from its parts; the same on every machine and process."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def check_batches(batches: Iterable[Any]) -> None:
    """Raise `BatchError` for a single batch in place of several."""
    if isinstance(batches, Mapping | Tensor | str):
        raise BatchError(
            f"batches must be an iterable of batches, got a single {type(batches).__name__}; "
            "wrap it in a list."
        )


class BatchSource:
    """Batches by step number: ``source[k]`` is batch k of the endless repetition of `batches`.

    The last batch stays at hand. A sequence is indexed. Another re-iterable (a `DataLoader`) is
    iterated once per epoch, with torch's global generator seeded by (seed, epoch), so that
    shuffling is reproducible; going back starts again. A one-shot iterator is kept in memory, so
    that it can be repeated.
    """

    def __init__(self, batches: Iterable[Any], seed: int) -> None:
        check_batches(batches)
        if isinstance(batches, Iterator):
            batches = list(batches)
        self._batches = batches
        self._seed = seed
        self._epoch, self._position = -1, 0
        self._iterator: Iterator[Any] = iter(())
        self._last: Any = None  # batch number `_position` - 1
        self.length: int | None = len(batches) if isinstance(batches, Sequence) else None
        if self.length == 0:
            raise BatchError("batches is empty; give at least one batch.")

    def __getitem__(self, step: int) -> Any:
        """Batch of this step."""
        if step == self._position - 1:
            return self._last
        if isinstance(self._batches, Sequence):
            self._last = self._batches[step % len(self._batches)]
            self._position = step + 1
            return self._last
        if step < self._position:
            self._epoch, self._position, self._iterator = -1, 0, iter(())
        while self._position <= step:
            self._advance()
        return self._last

    def _advance(self) -> None:
        """Read the next batch, of the next epoch if this one is over."""
        end = object()
        batch = next(self._iterator, end)
        if batch is end:
            self._epoch += 1
            torch.manual_seed(derive_seed(self._seed, "epoch", self._epoch))
            self._iterator = iter(self._batches)
            batch = next(self._iterator, end)
            if batch is end:
                raise BatchError("batches is empty; give at least one batch.")
        self._last = batch
        self._position += 1


def batch_size(batch: Any) -> int:
    """Samples in a batch: the first dimension of its first tensor.

    Raises:
        BatchError: no tensor, or no samples.
    """
    for value in _values(batch):
        if isinstance(value, Tensor) and value.dim() > 0:
            if not len(value):
                raise BatchError("a batch has no samples.")
            return len(value)
    raise BatchError(f"a batch is a dict of tensors or a tensor, got {type(batch).__name__}.")


def shapes_of(batch: Any) -> dict[str, tuple[int, ...]]:
    """Name to shape of every tensor of a batch; a bare tensor is called ``input``."""
    named = batch.items() if isinstance(batch, Mapping) else [("input", batch)]
    return {name: tuple(value.shape) for name, value in named if isinstance(value, Tensor)}


def check_device(batch: Any, device: torch.device) -> None:
    """Raise `BatchError` if a tensor of the batch is not on `device`."""
    named = batch.items() if isinstance(batch, Mapping) else [("the batch", batch)]
    for name, value in named:
        if isinstance(value, Tensor) and value.device != device:
            raise BatchError(
                f"{name} is on {value.device}, the model on {device}; "
                "move the batches to the model's device first."
            )


def slice_samples(batch: Any, low: int, high: int) -> Any:
    """Samples ``low:high`` of a batch. Tensors without the batch dimension are kept whole."""
    size = batch_size(batch)
    if (low, high) == (0, size):
        return batch

    def part(value: Any) -> Any:
        batched = isinstance(value, Tensor) and value.dim() > 0 and len(value) == size
        return value[low:high] if batched else value

    if isinstance(batch, Mapping):
        return {name: part(value) for name, value in batch.items()}
    return part(batch)


def local_samples(
    source: BatchSource, step: int, device: torch.device, rank: int, world: int
) -> tuple[Any, int, int, int]:
    """What one of `world` processes takes of a batch.

    Returns:
        Its samples, the numbers of its first and of the first after them, and all samples.

    Raises:
        BatchError: a tensor is on another device, or there are fewer samples than processes.
    """
    batch = source[step]
    check_device(batch, device)
    size = batch_size(batch)
    if size < world:
        raise BatchError(f"batch {step} has {size} samples for {world} processes.")
    low, high = size * rank // world, size * (rank + 1) // world
    return slice_samples(batch, low, high), low, high, size


def _values(batch: Any) -> Iterable[Any]:
    return batch.values() if isinstance(batch, Mapping) else (batch,)
