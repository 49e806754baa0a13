"""Sequences of batches, which are read from lists, data sets and streams only when asked for."""

import operator
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from itertools import islice
from typing import Any, Literal, TypeAlias, overload

import torch
from torch import Tensor

from solpath.config import check_count
from solpath.data.foreign import batching_hint, foreign_kind
from solpath.errors import BatchError, ConfigError, FileError, SolpathError

Tensors: TypeAlias = dict[str, Tensor]
"""A batch: argument of the model to tensor."""
Source: TypeAlias = str | os.PathLike[str] | Iterable[Any]
"""A folder or file, or an iterable of samples: a list, a data set, a stream."""


OnError: TypeAlias = Literal["raise", "skip"]
"""What happens to a sample that cannot be read: its error is raised, or it is left out."""
_NAMED = 3  # samples that a warning names
_UNREADABLE = (OSError, ValueError, SyntaxError)  # what decoders raise on damaged data


class Batches(Sequence[Tensors]):
    """A sequence of batches. A batch is read each time it is asked for, and is not kept.

    ``list(batches)`` reads all batches once and keeps them. ``batches[:100]`` reads nothing yet; a
    slice with a step reads its batches at once. The last batch may be shorter than the others.

    Args:
        make: Turns indices of samples into a batch.
        order: The indices of the samples, in the order of the batches.
        batch_size: The number of samples per batch.
    """

    def __init__(
        self, make: Callable[[Sequence[int]], Tensors], order: Sequence[int], batch_size: int
    ) -> None:
        self._make, self._order, self.batch_size = make, order, batch_size

    @property
    def samples(self) -> int:
        """The number of samples in all batches."""
        return len(self._order)

    def select(self, samples: Iterable[int]) -> "Batches":
        """Return batches of some samples, by their numbers in the order of these batches."""
        return Batches(self._make, [self._order[i] for i in samples], self.batch_size)

    def __len__(self) -> int:
        return -(-len(self._order) // self.batch_size)

    @overload
    def __getitem__(self, index: int) -> Tensors: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Tensors]: ...
    def __getitem__(self, index: int | slice) -> Tensors | Sequence[Tensors]:
        places = range(len(self))[index]
        if not isinstance(places, range):
            start = places * self.batch_size
            return self._make(self._order[start : start + self.batch_size])
        if places.step != 1:
            return [self[place] for place in places]
        part = self._order[places.start * self.batch_size : places.stop * self.batch_size]
        return Batches(self._make, part, self.batch_size)


class Broken:
    """The samples of one source that cannot be read: raised, or left out, counted and reported.

    Args:
        on_error: ``"raise"`` or ``"skip"``.

    Raises:
        ConfigError: `on_error` is something else.
    """

    def __init__(self, on_error: OnError) -> None:
        if on_error not in ("raise", "skip"):
            raise ConfigError(f"on_error must be 'raise' or 'skip', got {on_error!r}.")
        self._skip = on_error == "skip"
        self._reasons: dict[str, str] = {}
        self._reported = 0

    def note(self, name: str, error: SolpathError) -> None:
        """Raise `error`, or remember it under the name of the sample."""
        if not self._skip:
            raise error
        self._reasons.setdefault(name, str(error))

    def report(self) -> None:
        """Warn if more samples were left out since the last report."""
        count = len(self._reasons)
        if count == self._reported:
            return
        self._reported = count
        names = ", ".join(list(self._reasons)[:_NAMED]) + (", …" if count > _NAMED else "")
        warnings.warn(
            f"left out {count} {'sample' if count == 1 else 'samples'} so far that cannot be read: "
            f"{names}. The first: {next(iter(self._reasons.values()))}",
            stacklevel=3,
        )

    def rows(self, rows: Any, places: Sequence[int]) -> Iterator[tuple[str, Any]]:
        """Yield name and row of the samples at `places`; a data set may decode them here.

        Raises:
            FileError: A row cannot be read and is not to be left out.
        """
        for place in places:
            try:
                yield f"row {place}", rows[place]
            except _UNREADABLE as error:
                self.note(f"row {place}", FileError(f"cannot read row {place}: {error}."))


def rows_in_order(
    source: Iterable[Any], limit: int | None, seed: int | None
) -> tuple[Any, Sequence[int]]:
    """Return the samples as something that can be indexed, and the indices to take, in order.

    Args:
        source: Anything with a length is returned as it is and shuffled by its indices; of pandas,
            as a list of values or of rows. Anything else is a stream, of which the first `limit`
            samples are read and kept, in their own order.
        limit: The largest number of samples. None takes all, which a stream does not allow.
        seed: Seeds the order of the samples. None keeps the order of the source.

    Raises:
        ConfigError: The source is a stream and there is no `limit`.
        BatchError: The source is empty, or holds several data sets or columns, of which one must be
            chosen.
    """
    kind = foreign_kind(source)
    if kind == "DatasetDict":
        raise BatchError(f"source is a {type(source).__name__}; {batching_hint(source)}.")
    if isinstance(source, Mapping):
        raise BatchError(
            f"source is a {type(source).__name__}, not an iterable of samples; give a list of "
            f"rows, or one of its values ({', '.join(map(str, source))})."
        )
    table: Any = source
    if kind == "Series":
        source = table.tolist()
    elif kind == "DataFrame":
        source = table.to_dict("records")
    if isinstance(source, Sized):
        count = len(source)
        order: Sequence[int] = range(count)
        if seed is not None:
            order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
        rows: Any = source
    elif limit is None:
        raise ConfigError("limit: a stream needs one.")
    else:
        rows = list(islice(source, limit))
        order = range(len(rows))
    if not len(order):
        raise BatchError("source is empty; give at least one sample.")
    return rows, order[:limit]


def check_vocabulary(tokenizer: Any) -> None:
    """Raise `ConfigError` if a tokenizer knows special tokens only.

    That is what transformers makes of a folder without the files of a tokenizer, and every word is
    unknown to it, or nothing at all.
    """
    special = set(getattr(tokenizer, "all_special_ids", ()))
    if special and len(tokenizer) <= len(special):
        where = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
        raise ConfigError(
            f"the tokenizer of {where} has {len(tokenizer)} special tokens and no words: its files "
            "are missing; save it beside the model with tokenizer.save_pretrained(folder)."
        )


def check_counts(**values: int | None) -> None:
    """Raise `ConfigError` unless every value is None or an integer of at least 1."""
    for name, value in values.items():
        if value is not None:
            check_count(name, value, 1)


def check_columns(row: Any, columns: Iterable[str]) -> None:
    """Raise `ConfigError` unless `row` is a mapping that has all these columns."""
    if not isinstance(row, Mapping):
        raise ConfigError(f"rows with columns are needed, got a {type(row).__name__}.")
    for column in columns:
        if column not in row:
            raise ConfigError(f"there is no column {column!r}; the columns are {', '.join(row)}.")


def label_of(name: str, row: Any, column: str) -> int:
    """Return the label in a row; raise `BatchError`, which names the sample, if it is no number."""
    try:
        return operator.index(row[column])
    except TypeError as error:
        raise BatchError(
            f"{name}: {column} is {row[column]!r:.60}, not a whole number; number the labels "
            f"first, for example with data.class_encode_column({column!r}) of datasets."
        ) from error


def move(batch: Mapping[str, Any], device: str | torch.device) -> Tensors:
    """Return the batch with its tensors on `device`. The batch itself stays as it is."""
    return {name: value.to(device) for name, value in batch.items()}
