"""Mix the rows of several tables by shares, in one order that a seed gives."""

import re
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch

from solpath.data.columns import Labels, Role
from solpath.data.source import derive_seed
from solpath.data.tables import Table
from solpath.errors import ConfigError

_WEIGHT = re.compile(r"(.+):([0-9]+(?:\.[0-9]+)?)")

Part: TypeAlias = tuple[Table, Mapping[Role, str]]
"""A table and the column of every role."""


def split_weight(text: str) -> tuple[str, float | None]:
    """Return the name of a source and its weight, which stands behind a colon, or None.

    A file or folder that has the whole text as its name has no weight.

    Args:
        text: What a user gave.

    Raises:
        ConfigError: The weight is 0.

    Example:
        >>> split_weight("code.jsonl:2"), split_weight("wiki.parquet"), split_weight("C:/texts.txt")
        (('code.jsonl', 2.0), ('wiki.parquet', None), ('C:/texts.txt', None))
    """
    found = _WEIGHT.fullmatch(text)
    if found is None or Path(text).exists():
        return text, None
    if not float(found[2]):
        raise ConfigError(f"{text}: a weight must be more than 0.")
    return found[1], float(found[2])


def shares(sizes: Sequence[int], weights: Sequence[float | None], limit: int | None) -> list[int]:
    """Return how many rows each table gives.

    Args:
        sizes: The rows of every table.
        weights: The weight of every table. Without any, all rows count alike; with some, the
            others weigh 1, and as many rows are taken as the shares allow without taking one twice.
        limit: The largest number of rows in all.

    Raises:
        ConfigError: A table would give no row.

    Example:
        >>> shares([100, 30], [2.0, 1.0], None), shares([100, 30], [None, None], 13)
        ([60, 30], [10, 3])
    """
    mixed = any(weight is not None for weight in weights)
    wanted = [w or 1.0 for w in weights] if mixed else [float(size) for size in sizes]
    whole = sum(wanted)
    total = min(size * whole / want for size, want in zip(sizes, wanted, strict=True))
    total = total if limit is None else min(total, limit)
    ends = [round(total * sum(wanted[: i + 1]) / whole) for i in range(len(wanted))]
    counts = [end - start for start, end in zip([0, *ends], ends, strict=False)]
    counts = [min(count, size) for count, size in zip(counts, sizes, strict=True)]
    if not all(counts):
        raise ConfigError(
            f"{round(total)} rows are too few for {len(sizes)} sources with these weights."
        )
    return counts


class Mixture(Sequence[dict[str, Any]]):
    """Rows of some tables as mappings from role to value, read when they are asked for.

    Every table gives the first rows of an order that the seed gives, and the rows of all tables are
    spread evenly: any stretch of the mixture holds them in about their shares.

    Args:
        parts: The tables with their columns.
        weights: See `shares`.
        limit: See `shares`.
        seed: Seeds the order. None keeps the order of every table.
        labels: Numbers the labels. None leaves them out.
        apart: Whether both texts of a pair are rows of their own.

    Attributes:
        counts: The rows that every table gives.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        weights: Sequence[float | None],
        *,
        limit: int | None = None,
        seed: int | None = 0,
        labels: Labels | None = None,
        apart: bool = False,
    ) -> None:
        self._parts, self._labels, self._apart = parts, labels, apart
        self.counts = shares([len(table) for table, _ in parts], weights, limit)
        places: list[tuple[float, int, int, Role]] = []
        for i, ((table, columns), count) in enumerate(zip(parts, self.counts, strict=True)):
            roles: list[Role] = ["text", "pair"] if apart and "pair" in columns else ["text"]
            order = _order(len(table), seed if i == 0 or seed is None else derive_seed(seed, i))
            for k, row in enumerate(order[:count]):
                places += [((k + 0.5) / count, i, row, role) for role in roles]
        self._places = [place[1:] for place in sorted(places, key=lambda place: place[:2])]

    def __len__(self) -> int:
        return len(self._places)

    def groups(self) -> list[Hashable] | None:
        """Return what every row is from: its value in the column of groups, or its pair of texts.

        None if there is no such column and no pair.

        Raises:
            ConfigError: Some tables have a column of groups and others none, or a row has no group.
        """
        named = [columns.get("group") for _, columns in self._parts]
        if not any(named):
            return [place[:2] for place in self._places] if self._apart else None
        values: list[list[Hashable]] = []
        for (table, _), column in zip(self._parts, named, strict=True):
            if column is None:
                raise ConfigError(f"{table.name} has no column of groups, and other sources do.")
            values.append(table.column(column))
            if None in values[-1] or "" in values[-1]:
                raise ConfigError(f"column {column!r} of {table.name} has rows without a group.")
        return [values[part][row] for part, row, _ in self._places]

    def __getitem__(self, index: Any) -> Any:
        part, row, role = self._places[index]
        table, columns = self._parts[part]
        found = table.rows[row]
        if self._apart:
            return {"text": found[columns[role]]}
        values: dict[str, Any] = {role: found[column] for role, column in columns.items()}
        values.pop("group", None)
        if self._labels is None:
            values.pop("label", None)
        elif "label" in values:
            values["label"] = self._labels.number(part, values["label"])
        return values


def _order(count: int, seed: int | None) -> Sequence[int]:
    if seed is None:
        return range(count)
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
