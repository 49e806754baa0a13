"""Batches addressed by step, from any iterable of batches, repeated when it is short."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from solpath.errors import BatchError


def derive_seed(*parts: object) -> int:
    """Return a 63-bit seed made from `parts`, the same in every process and on every machine."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def check_batches(batches: Iterable[Any]) -> None:
    """Raise `BatchError` if `batches` is a single batch instead of an iterable of batches."""
    if isinstance(batches, Mapping | Tensor | str):
        raise BatchError(
            f"batches must be an iterable of batches, got a single {type(batches).__name__}; "
            "wrap it in a list."
        )


class BatchSource:
    """Batches by step number: ``source[k]`` is batch k of the endless repetition of `batches`.

    Only the batch of the last step is kept. A sequence is indexed. Another iterable that can be
    repeated, such as a `DataLoader`, is iterated once per epoch, and torch's global generator is
    seeded from `seed` and the epoch before each, so that its shuffling is reproducible; going back
    to an earlier step starts again from the first epoch. An iterator that runs only once is read
    into memory.

    Args:
        batches: The iterable of batches.
        seed: Seeds the epochs.

    Attributes:
        length: The number of batches in a sequence; None if it is not known.

    Raises:
        BatchError: There are no batches, or `batches` is a single batch.
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
        """Return the batch of this step."""
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
        """Read the next batch; start the next epoch if this one is over."""
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
    """Return the number of samples in a batch: the first dimension of its first tensor.

    Raises:
        BatchError: The batch holds no tensor or no samples.
    """
    for value in _values(batch):
        if isinstance(value, Tensor) and value.dim() > 0:
            if not len(value):
                raise BatchError("a batch has no samples.")
            return len(value)
    raise BatchError(f"a batch is a dict of tensors or a tensor, got {type(batch).__name__}.")


def shapes_of(batch: Any) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor in a batch, by name. A bare tensor is called ``input``."""
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
    """Return the samples ``low:high`` of a batch, without copying them.

    A tensor whose first dimension is not the number of samples is kept whole.
    """
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
    """Return the samples of a batch that belong to one of several processes.

    Args:
        source: The batches.
        step: The number of the batch.
        device: The device that the batch must be on.
        rank: The number of this process, from 0.
        world: The number of processes.

    Returns:
        The samples of this process, the index of its first sample, the index after its last one,
        and the number of samples in the whole batch.

    Raises:
        BatchError: A tensor is on another device or was made in `torch.inference_mode`, or the
            batch has fewer samples than processes.
    """
    batch = source[step]
    check_device(batch, device)
    _check_gradients(batch)
    size = batch_size(batch)
    if size < world:
        raise BatchError(f"batch {step} has {size} samples for {world} processes.")
    low, high = size * rank // world, size * (rank + 1) // world
    return slice_samples(batch, low, high), low, high, size


def _check_gradients(batch: Any) -> None:
    """Raise `BatchError` if autograd would refuse a tensor of the batch."""
    named = batch.items() if isinstance(batch, Mapping) else [("the batch", batch)]
    for name, value in named:
        if isinstance(value, Tensor) and value.is_inference():
            raise BatchError(
                f"{name} was made in torch.inference_mode, so no gradient can be taken on it; make "
                "the batches outside of it, or clone() them there."
            )


def _values(batch: Any) -> Iterable[Any]:
    return batch.values() if isinstance(batch, Mapping) else (batch,)
