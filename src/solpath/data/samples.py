"""Tell the samples of batches apart: by digests of what a model gets of each."""

import hashlib
from collections.abc import (
    Callable,
    Container,
    Hashable,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
    Set,
)
from typing import Any

import numpy as np
import torch
from torch import Tensor

from solpath.data.preparation import Preparation
from solpath.data.source import batch_size

_SIDES = ("decoder_", "pixel_", "")  # each with a mask of its own


class Recording:
    """Prepares batches, and keeps the digests of their samples when a batch is new.

    Args:
        prepare: Called with the number of a batch and the batch. What it returns is the batch.
    """

    def __init__(self, prepare: Callable[[int, Any], Any]) -> None:
        self._prepare = prepare
        self._numbers: set[int] = set()
        self._new: list[int] = []

    def __call__(self, index: int, batch: Any) -> Any:
        """Return the batch, prepared.

        Args:
            index: Its number. A batch of a number that was there before is not looked at.
            batch: What a user gave.
        """
        batch = self._prepare(index, batch)
        if index not in self._numbers:
            self._new += sample_digests(batch)
            self._numbers.add(index)
        return batch

    def take(self) -> Tensor:
        """Return the digests of the samples that came since the last call, int64 ``[samples]``."""
        new, self._new = self._new, []
        return torch.tensor(new, dtype=torch.int64)


def union(new: Tensor, known: Tensor | None = None) -> Tensor:
    """Return digests in ascending order, each once.

    Args:
        new: Digests of samples, int64 ``[samples]``.
        known: Others, which are in ascending order already, each once.
    """
    added = np.unique(new.numpy())
    if known is None:
        return torch.from_numpy(added)
    place = np.searchsorted(known.numpy(), added)
    absent = place == np.searchsorted(known.numpy(), added, side="right")
    return torch.from_numpy(np.insert(known.numpy(), place[absent], added[absent]))


def sample_digests(batch: Any) -> list[int]:
    """Return a digest of every sample of a batch: of its inputs, without labels and padding.

    Samples with equal digests are equal inputs: numbers of 64 bits, which other inputs share by
    chance alone. Padding is what the attention mask of the batch leaves out, so a text has the same
    digest in a batch of longer ones. What a model fills in by itself does not count: positions from
    0 on, token types of 0, a mask that leaves nothing out. A single input counts without its name,
    as a bare tensor.

    Args:
        batch: A mapping of tensors, or a tensor. A tensor of floats without a row for every sample,
            such as the patches of all images end to end, counts for every sample; what else has no
            row for each does not count.

    Example:
        >>> short, long = {"input_ids": torch.tensor([[5, 6]])}, {
        ...     "input_ids": torch.tensor([[5, 6, 0]]), "attention_mask": torch.tensor([[1, 1, 0]])}
        >>> sample_digests(short) == sample_digests(long)
        True
    """
    size = batch_size(batch)
    named = dict(batch) if isinstance(batch, Mapping) else {"input": batch}
    rows = {
        name: value.detach().cpu()
        for name, value in sorted(named.items())
        if isinstance(value, Tensor) and value.shape[:1] == (size,) and name != "labels"
    }
    masks = {
        side: rows.pop(f"{side}attention_mask")
        for side in _SIDES
        if f"{side}attention_mask" in rows and rows[f"{side}attention_mask"].dim() == 2
    }
    common = hashlib.blake2b(digest_size=8)
    for name, value in sorted(named.items()):
        if (
            isinstance(value, Tensor)
            and value.is_floating_point()
            and name not in (*rows, "labels")
        ):
            _add(common, name, value.detach().cpu())
    found = []
    for i in range(size):
        digest = common.copy()
        counted = {}
        for name, value in rows.items():
            mask = masks.get(next(side for side in _SIDES if name.startswith(side)))
            row = value[i]
            if mask is not None and value.shape[:2] == mask.shape:
                row = row[mask[i] != 0]
            if not _is_filled_in(name, row):
                counted[name] = row if row.is_floating_point() else row.long()
        for name, row in counted.items():
            _add(digest, name if len(counted) > 1 else "input", row)
        found.append(int.from_bytes(digest.digest(), "little", signed=True))
    return found


def batches_apart(batches: Iterable[Any], known: Container[int]) -> Iterator[Any]:
    """Yield batches without the samples that are known; one of which none is left is left out.

    Args:
        batches: The batches.
        known: Digests of samples, from `sample_digests`.

    Example:
        >>> batch = {"input_ids": torch.tensor([[5, 6], [7, 8]])}
        >>> known = sample_digests({"input_ids": torch.tensor([[5, 6]])})
        >>> [part] = batches_apart([batch], known)
        >>> part["input_ids"]
        tensor([[7, 8]])
    """
    for batch in batches:
        rows = [i for i, digest in enumerate(sample_digests(batch)) if digest not in known]
        if rows:
            yield rows_of(batch, rows)


def unseen_samples(
    batches: Sequence[Any],
    seen: Set[int],
    prepare: Preparation,
    *,
    most: int,
    groups: Sequence[Hashable] | None = None,
) -> tuple[list[int], int]:
    """Return the numbers of the first samples that were not seen, and how many were left out.

    Numbers run over all batches. Without groups no more batches are read than are needed.

    Args:
        batches: The batches.
        seen: Digests of the samples that were seen.
        prepare: Checks and completes the batches.
        most: The most samples to return.
        groups: What every sample is from. One that was seen stands for all of its group.

    Example:
        >>> batches = [{"input_ids": torch.tensor([[5, 6], [7, 8]])}] * 2
        >>> seen, _ = sample_digests(batches[0])
        >>> unseen_samples(batches, {seen}, Preparation(model), most=9)
        ([1, 3], 2)
    """
    group: list[Hashable] = []
    known: set[Hashable] = set()
    for i, batch in enumerate(batches):
        if groups is None and len(group) - len(known) >= most:
            break
        first, size = len(group), batch_size(batch)
        group += range(first, first + size) if groups is None else groups[first : first + size]
        digests = sample_digests(prepare(i, batch))
        rows = [row for row in range(size) if row not in prepare.skipped.get(i, ())]
        known |= {group[first + row] for row, one in zip(rows, digests, strict=True) if one in seen}
    kept = [number for number, one in enumerate(group) if one not in known]
    return kept[:most], len(group) - len(kept)


def rows_of(batch: Any, rows: list[int]) -> Any:
    """Return some samples of a batch.

    Args:
        batch: A mapping of tensors, or a tensor.
        rows: The numbers of the samples.
    """
    size = batch_size(batch)
    if len(rows) == size:
        return batch

    def part(value: Any) -> Any:
        return value[rows] if isinstance(value, Tensor) and value.shape[:1] == (size,) else value

    if isinstance(batch, Mapping):
        return {name: part(value) for name, value in batch.items()}
    return part(batch)


def _is_filled_in(name: str, row: Tensor) -> bool:
    """Return whether an input of a sample is what models take where it is not given."""
    if name.endswith("position_ids"):
        return torch.equal(row, torch.arange(row.numel(), dtype=row.dtype))
    if name.endswith("token_type_ids"):
        return not row.any()
    return name.endswith("mask") and bool(row.all())


def _add(digest: Any, name: str, value: Tensor) -> None:
    digest.update(repr((name, tuple(value.shape))).encode())
    digest.update(value.contiguous().reshape(-1).view(torch.uint8).numpy())
