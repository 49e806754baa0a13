"""The samples that a size is chosen by: which are the same, and which belong together."""

import hashlib
from collections.abc import Container, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from solpath.choosing.bounds import Array
from solpath.data.preparation import Preparation
from solpath.data.source import batch_size
from solpath.errors import BatchError

_SIDES = ("decoder_", "pixel_", "")  # each with a mask of its own


class Samples:
    """The distinct samples of batches, which can be read again and must be the same then.

    Iterating yields the number and the distinct samples of every judged batch that has any.

    Args:
        batches: The batches.
        prepare: Checks and completes them.
        groups: What every row of them is from, in their order; None if each is a draw of its own.

    Attributes:
        grouped: Whether groups were given.
        repeated: Number of samples that were left out because they repeat others.

    Raises:
        BatchError: There are no batches, or as many groups as rows.
    """

    def __init__(
        self, batches: Sequence[Any], prepare: Preparation, groups: Iterable[Hashable] | None
    ) -> None:
        groups = None if groups is None else _listed(groups)
        self._batches, self._prepare = batches, prepare
        self._kept: dict[int, list[int]] = {}
        self._digests: dict[int, list[bytes]] = {}
        self._known: dict[bytes, tuple[int, int]] = {}
        self._groups: dict[int, list[Hashable]] = {}
        self.grouped = groups is not None
        self.repeated = rows = 0
        for i in range(len(batches)):
            given = batches[i]
            self._digests[i] = sample_digests(prepare(i, given))
            self._kept[i] = [
                row
                for row, digest in enumerate(self._digests[i])
                if self._known.setdefault(digest, (i, row)) == (i, row)
            ]
            self.repeated += len(self._digests[i]) - len(self._kept[i])
            if groups is not None:
                own = groups[rows : rows + batch_size(given)]
                skipped = prepare.skipped.get(i, ())
                self._groups[i] = [group for row, group in enumerate(own) if row not in skipped]
            rows += batch_size(given)
        if not self._known:
            raise BatchError("batches is empty; give at least one held-out batch.")
        if groups is not None and len(groups) != rows:
            raise BatchError(
                f"groups has {len(groups):,} entries for {rows:,} rows of batches; give one for "
                "each row."
            )

    @property
    def count(self) -> int:
        """Number of samples that judge."""
        return sum(map(len, self._kept.values()))

    @property
    def draws(self) -> int:
        """Number of independent draws: that of the groups, if there are any."""
        return len(set(self._judging_groups())) if self.grouped else self.count

    @property
    def unit(self) -> str:
        """What a draw is called."""
        return "group" if self.grouped else "sample"

    def place(self, index: int, row: int | None = None) -> str:
        """Return the words for a row of a batch that was yielded, see `Preparation.place`."""
        return self._prepare.place(index, None if row is None else self._kept[index][row])

    def first(self) -> Any:
        """Return the first batch, whole."""
        return self._prepare(0, self._batches[0])

    def judge_from(self, start: int) -> None:
        """Leave out the batches before number `start`, and all samples of the groups in them."""
        before = {group for i in range(start) for group in self._groups.get(i, ())}
        for i in self._kept:
            if i < start:
                self._kept[i] = []
            elif before:
                own = self._groups[i]
                self._kept[i] = [row for row in self._kept[i] if own[row] not in before]

    def drawn(self, losses: Array) -> Array:
        """Return the losses of the draws, ``[draws]``: the mean over the samples of each.

        Args:
            losses: The losses of the samples, in the order in which they are yielded.
        """
        if not self.grouped:
            return losses
        numbers: dict[Hashable, int] = {}
        group = [numbers.setdefault(one, len(numbers)) for one in self._judging_groups()]
        means: Array = np.bincount(group, losses) / np.bincount(group)
        return means

    def check_apart(self, batches: Sequence[Any], model: nn.Module) -> None:
        """Raise `BatchError` if one of the samples is in other batches, too."""
        prepare = Preparation(model, name="compensation batch")
        for i, batch in enumerate(batches):
            for row, digest in enumerate(sample_digests(prepare(i, batch))):
                if digest in self._known:
                    index, own = self._known[digest]
                    raise BatchError(
                        f"{prepare.place(i, row)} is also {self._prepare.place(index, own)}; what "
                        "members were fitted on cannot judge them, so give batches apart."
                    )

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        for i, kept in self._kept.items():
            if not kept:
                continue
            batch = self._prepare(i, self._batches[i])
            if sample_digests(batch) != self._digests[i]:
                raise BatchError(
                    f"batch {i} has other samples than when it was read first, so members cannot "
                    "be compared; give list(batches)."
                )
            yield i, rows_of(batch, kept)

    def _judging_groups(self) -> Iterator[Hashable]:
        """Yield the group of every sample that judges."""
        for i, kept in self._kept.items():
            own = self._groups[i]
            yield from (own[row] for row in kept)


def _listed(groups: Iterable[Hashable]) -> list[Hashable]:
    """Return groups as values that are equal where they mean the same."""
    given: Any = groups
    if isinstance(given, str):
        raise BatchError(f"groups must be a list with an entry for every row, got {given!r:.40}.")
    found: list[Any] = given.tolist() if hasattr(given, "tolist") else list(given)
    for i, group in enumerate(found):
        if not isinstance(group, Hashable) or isinstance(group, Tensor):
            raise BatchError(
                f"entry {i} of groups is a {type(group).__name__}; give numbers or strings."
            )
        if group is None or group != group:
            raise BatchError(f"entry {i} of groups is {group!r}; give every row a group.")
    return found


def sample_digests(batch: Any) -> list[bytes]:
    """Return a digest of every sample of a batch: of its inputs, without labels and padding.

    Samples with equal digests are equal inputs. Padding is what the attention mask of the batch
    leaves out, so a text has the same digest in a batch of longer ones.

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
    common = hashlib.blake2b(digest_size=16)
    for name, value in sorted(named.items()):
        if (
            isinstance(value, Tensor)
            and value.is_floating_point()
            and name not in (*rows, "labels")
        ):
            common.update(_bytes(name, value.detach().cpu()))
    found = []
    for i in range(size):
        digest = common.copy()
        for name, value in rows.items():
            mask = masks.get(next(side for side in _SIDES if name.startswith(side)))
            row = value[i]
            if mask is not None and value.shape[:2] == mask.shape:
                row = row[mask[i] != 0]
            if not row.is_floating_point():
                row = row.long()
            digest.update(_bytes(name, row))
        found.append(digest.digest())
    return found


def batches_apart(batches: Iterable[Any], known: Container[bytes]) -> Iterator[Any]:
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


def _bytes(name: str, value: Tensor) -> bytes:
    data: bytes = value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return repr((name, tuple(value.shape))).encode() + data
