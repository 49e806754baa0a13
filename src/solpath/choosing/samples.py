"""The samples that a size is chosen by: which are the same, and which belong together."""

from collections.abc import Container, Hashable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from torch import Tensor, nn

from solpath.choosing.bounds import Array
from solpath.data.preparation import Preparation
from solpath.data.samples import rows_of, sample_digests
from solpath.data.source import batch_size
from solpath.errors import BatchError


class Samples:
    """The distinct samples of batches, which can be read again and must be the same then.

    Iterating yields the number and the distinct samples of every judged batch that has any.

    Args:
        batches: The batches.
        prepare: Checks and completes them.
        groups: What every row of them is from, in their order; None if each is a draw of its own.
        seen: Digests of the samples that the search ran on.

    Attributes:
        grouped: Whether groups were given.
        repeated: Number of samples that were left out because they repeat others.

    Raises:
        BatchError: There are no batches, not as many groups as rows, or the search ran on a sample.
    """

    def __init__(
        self,
        batches: Sequence[Any],
        prepare: Preparation,
        groups: Iterable[Hashable] | None,
        seen: Container[int],
    ) -> None:
        groups = None if groups is None else _comparable(groups)
        self._batches, self._prepare = batches, prepare
        self._kept: dict[int, list[int]] = {}
        self._digests: dict[int, list[int]] = {}
        self._known: dict[int, tuple[int, int]] = {}
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
        self._check_fresh(seen)
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

    def _check_fresh(self, seen: Container[int]) -> None:
        """Raise `BatchError` if the search ran on one of the samples."""
        found = [place for digest, place in self._known.items() if digest in seen]
        if found:
            raise BatchError(
                f"{self._prepare.place(*found[0])} was seen by the search, the first of "
                f"{len(found):,} such among {len(self._known):,} samples; what a path was searched "
                "on cannot judge its members, so leave them out."
            )

    def _judging_groups(self) -> Iterator[Hashable]:
        """Yield the group of every sample that judges."""
        for i, kept in self._kept.items():
            own = self._groups[i]
            yield from (own[row] for row in kept)


def _comparable(groups: Iterable[Hashable]) -> list[Hashable]:
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
