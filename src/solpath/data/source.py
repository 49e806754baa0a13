"""Batches addressed by step, from any iterable of batches, repeated when it is short."""

import hashlib
import operator
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from solpath.data.foreign import batching_hint, foreign_kind
from solpath.errors import BatchError


def derive_seed(*parts: object) -> int:
    """Return a 63-bit seed made from `parts`, the same in every process and on every machine."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def check_batches(batches: Any, name: str = "batches") -> None:
    """Raise `BatchError` unless `batches` can be an iterable of batches. Nothing is read.

    Args:
        batches: What a user gave. A single batch, a data set or table of another library, and what
            cannot be iterated are refused by name, with what to give instead.
        name: The name of the argument, for the message.
    """
    kind = type(batches).__name__
    if foreign_kind(batches):
        raise BatchError(f"{name} is a {kind}; {batching_hint(batches)}.")
    if isinstance(batches, str | bytes | os.PathLike):
        raise BatchError(
            f"{name} must be an iterable of batches, got a single {kind}; make batches of a file "
            "of texts with solpath.text_batches(file, tokenizer)."
        )
    if isinstance(batches, Mapping | Tensor):
        raise BatchError(
            f"{name} must be an iterable of batches, got a single {kind}; wrap it in a list."
        )
    if not hasattr(batches, "__iter__") and not hasattr(batches, "__getitem__"):
        raise BatchError(f"{name} must be an iterable of batches, got a {kind}.")


def check_ends(batches: Any, name: str = "batches") -> None:
    """Raise `BatchError` unless `batches` is known to end, for work that needs all of it.

    One that is known to be empty is refused, too.

    Args:
        batches: What a user gave. It is known to end if it, or what it runs over, has a length. A
            generator has none, and nobody can tell an endless one from a long one.
        name: The name of the argument, for the message.
    """
    check_batches(batches, name)
    length = operator.length_hint(batches, -1)
    if length == 0:
        raise BatchError(_EMPTY.format(name))
    if length < 0:
        raise BatchError(
            f"{name} is a {type(batches).__name__} without a length, which may never end, and all "
            f"of it is needed; give list({name}) if it ends, or "
            f"list(itertools.islice({name}, 100)) for the first 100."
        )


class BatchSource:
    """Batches by step number: ``source[k]`` is batch k of the endless repetition of `batches`.

    A sequence is indexed. Another iterable that can be repeated, such as a `DataLoader`, is
    iterated once per epoch. Torch's global generator, and one of a loader's own, are seeded from
    `seed` and the epoch before each, so that shuffling is reproducible; going back to an earlier
    step starts again from the first epoch. Of both, only the batch of the last step is kept. An
    iterator that runs only once is read as far as the steps need, and never further, so it may be
    endless. What was read of it is kept, and repeated if it ends.

    Args:
        batches: The iterable of batches.
        seed: Seeds the epochs.
        prepare: Called with the number of a batch among `batches` (or the step, where that is not
            known) and the batch. What it returns is the batch.

    Raises:
        BatchError: There are no batches, or `batches` is a single batch. An iterator without
            batches raises it at the first step.
    """

    def __init__(
        self, batches: Iterable[Any], seed: int, prepare: Callable[[int, Any], Any] | None = None
    ) -> None:
        check_batches(batches)
        self._stream = batches if isinstance(batches, Iterator) else None
        self._batches: Any = [] if self._stream is not None else batches
        self._seed, self._prepare = seed, prepare
        self._epoch, self._position = -1, 0
        self._iterator: Iterator[Any] = iter(())
        self._read_last: Any = None  # batch number `_position` - 1 of an iterable
        self._last: Any = None
        self._step = -1  # whose batch `_last` is
        if self.length == 0:
            raise BatchError(_EMPTY.format("batches"))

    @property
    def length(self) -> int | None:
        """The number of batches before they repeat; None if it is not known, or not yet."""
        known = self._stream is None and isinstance(self._batches, Sequence)
        return len(self._batches) if known else None

    @property
    def largest(self) -> float:
        """How many numbers the largest batch holds for every one in the first.

        It is 1 where batches are not known before they are read.
        """
        if type(self._batches) not in (list, tuple) or self._stream is not None:
            return 1.0
        sizes = [sum(v.numel() for v in _values(b) if isinstance(v, Tensor)) for b in self._batches]
        return max(sizes) / max(sizes[0], 1)

    def __getitem__(self, step: int) -> Any:
        """Return the batch of this step."""
        if step != self._step:
            batch = self._read(step)
            if self._prepare is not None:
                index = self.index(step)
                batch = self._prepare(step if index is None else index, batch)
            self._last, self._step = batch, step
        return self._last

    def index(self, step: int) -> int | None:
        """Return the number of a step's batch among those that repeat, once it has been read.

        None is returned if that is not known, because every epoch may have other batches: also of
        a sequence that is no list or tuple, whose items may be drawn anew whenever they are read.
        """
        return step % len(self._batches) if type(self._batches) in (list, tuple) else None

    def _read(self, step: int) -> Any:
        while self._stream is not None and step >= len(self._batches):
            batch = next(self._stream, _END)
            if batch is _END:
                self._stream = None
            else:
                self._batches.append(batch)
        if isinstance(self._batches, Sequence):
            if not self._batches:
                raise BatchError(_EMPTY.format("batches"))
            return self._batches[step % len(self._batches)]
        if step < self._position - 1:
            self._epoch, self._position, self._iterator = -1, 0, iter(())
        while self._position <= step:
            self._advance()
        return self._read_last

    def _advance(self) -> None:
        """Read the next batch; start the next epoch if this one is over."""
        batch = next(self._iterator, _END)
        if batch is _END:
            self._epoch += 1
            seed = derive_seed(self._seed, "epoch", self._epoch)
            torch.manual_seed(seed)
            for generator in _generators(self._batches):
                generator.manual_seed(seed)
            self._iterator = iter(self._batches)
            batch = next(self._iterator, _END)
            if batch is _END:
                raise BatchError(_EMPTY.format("batches"))
        self._read_last = batch
        self._position += 1


def _generators(loader: Any) -> list[torch.Generator]:
    """Return the generators that a `DataLoader` and its samplers shuffle with, if it has any."""
    samplers = [getattr(loader, name, None) for name in ("sampler", "batch_sampler")]
    inner = [getattr(sampler, "sampler", None) for sampler in samplers]
    found = [getattr(part, "generator", None) for part in (loader, *samplers, *inner)]
    return [one for one in found if isinstance(one, torch.Generator)]


_END = object()
_EMPTY = "{} is empty; give at least one batch."


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


def work_of(batch: Any) -> tuple[int, str]:
    """Return how much there is to compute in a batch, and in which unit.

    It is the number of tokens of text, padding left out, and of all else the number of samples. No
    device is waited for: where the attention mask is not in the memory of the CPU, padding counts.

    Args:
        batch: A mapping of tensors, or a tensor.

    Example:
        >>> mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
        >>> work_of({"input_ids": torch.ones_like(mask), "attention_mask": mask})
        (4, 'tokens')
        >>> work_of({"pixel_values": torch.zeros(2, 3, 8, 8)})
        (2, 'samples')
    """
    named = batch if isinstance(batch, Mapping) else {}
    ids, mask = named.get("input_ids"), named.get("attention_mask")
    if not isinstance(ids, Tensor) or "pixel_values" in named:
        return batch_size(batch), "samples"
    if isinstance(mask, Tensor) and mask.device.type == "cpu" and mask.shape == ids.shape:
        return int(mask.count_nonzero()), "tokens"
    return ids.numel(), "tokens"


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
    source: BatchSource, step: int, rank: int, world: int
) -> tuple[Any, int, int, int]:
    """Return the samples of a batch that belong to one of several processes.

    Args:
        source: The batches.
        step: The number of the batch.
        rank: The number of this process, from 0.
        world: The number of processes.

    Returns:
        The samples of this process, the index of its first sample, the index after its last one,
        and the number of samples in the whole batch.

    Raises:
        BatchError: A tensor was made in `torch.inference_mode`, or the batch has fewer samples than
            processes.
    """
    batch = source[step]
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
