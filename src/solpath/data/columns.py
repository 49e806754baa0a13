"""Find the columns that a model needs in a table, by one rule, and the numbers of its labels."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, TypeAlias

from solpath.data.tables import Table
from solpath.errors import ConfigError

Role: TypeAlias = Literal["text", "pair", "image", "label", "group"]
"""What a column is for: ``"pair"`` is a second text, ``"group"`` what a row is from."""
ROLES: tuple[Role, ...] = ("text", "pair", "image", "label", "group")
_NAMES = frozenset({"whole", "names", "text"})
_HOLDS = {"image": frozenset({"image"}), "label": _NAMES, "group": _NAMES}
_WORDS = {"image": "images", "label": "whole numbers or names", "group": "whole numbers or names"}

TEXTS = ("text", "sentence", "content", "prompt", "caption", "document")
"""Names by which a column of texts is known."""
PAIRS = (
    ("text", "text_pair"), ("sentence1", "sentence2"), ("premise", "hypothesis"),
    ("question1", "question2"), ("question", "sentence"), ("query", "passage"),
    ("question", "answer"), ("anchor", "positive"),
)  # fmt: skip
"""Names by which two columns of texts are known to belong together."""
LABELS = ("label", "labels")
"""Names by which a column of labels is known."""


def find_columns(table: Table, roles: Iterable[Role], given: Mapping[Role, str]) -> dict[Role, str]:
    """Return the column of every role.

    - Text: the two columns of `PAIRS`, or the one of `TEXTS`, or the only one that holds text.
    - Image: the only column that holds images.
    - Label: the one of `LABELS`.
    - Group: none but the one that is given.

    Args:
        table: The table.
        roles: The roles that must be there. ``"pair"`` may: it comes with ``"text"``.
        given: Role to the column that a user chose.

    Raises:
        ConfigError: There is no such column, or several could be it; the message lists them.

    Example:
        >>> table = Table("nli", [], {"premise": "text", "hypothesis": "text", "label": "whole"})
        >>> find_columns(table, ["text"], {})
        {'text': 'premise', 'pair': 'hypothesis'}
    """
    found: dict[Role, str] = {}
    for role, column in given.items():
        check_column(table, column)
        if table.holds[column] not in _HOLDS.get(role, {"text"}):
            what = _WORDS.get(role, "texts")
            raise ConfigError(f"column {column!r} of {table.name} does not hold {what}.")
        found[role] = column
    for role in roles:
        if role in found:
            continue
        if role == "text":
            found = _texts(table) | found
        elif role == "image":
            found[role] = _only(table, role, table.columns_of("image"))
        elif role == "label":
            known = [c for c in table.columns_of("whole", "names", "text") if c in LABELS]
            found[role] = _only(table, role, known)
    if "pair" in found and found["pair"] == found.get("text"):
        raise ConfigError(
            f"column {found['pair']!r} of {table.name} cannot be both texts of a pair; choose the "
            "first with text=COLUMN."
        )
    return found


def check_column(table: Table, column: str) -> None:
    """Raise `ConfigError` unless a table has a column.

    Args:
        table: The table.
        column: The column that a user chose.
    """
    if column not in table.holds:
        raise ConfigError(
            f"{table.name} has no column {column!r}; its columns are {', '.join(table.holds)}."
        )


def _texts(table: Table) -> dict[Role, str]:
    texts = [column for column in table.columns_of("text") if column not in LABELS]
    pairs = [pair for pair in PAIRS if set(pair) <= set(texts)]
    known = [column for column in texts if column in TEXTS]
    if len(pairs) == 1 and set(known) <= set(pairs[0]):
        return {"text": pairs[0][0], "pair": pairs[0][1]}
    if len(known) == 1 and not pairs:
        return {"text": known[0]}
    return {"text": _only(table, "text", texts)}


def _only(table: Table, role: Role, columns: Sequence[str]) -> str:
    if len(columns) == 1:
        return columns[0]
    if columns:
        raise ConfigError(
            f"{table.name} has several columns that could be the {role}: {', '.join(columns)}; "
            f"choose one with --column {role}=COLUMN."
        )
    raise ConfigError(
        f"{table.name} has no column that could be the {role} among {', '.join(table.holds)}; "
        f"choose one with --column {role}=COLUMN."
    )


class Labels:
    """Turns the labels of tables into the numbers of a model's classes.

    - Names that are those of ``config.label2id``, upper or lower case, get its numbers.
    - Where a model says nothing but ``LABEL_0``, or has as many classes as a data set numbers
      names for, numbers stay as they are and other names are numbered in sorted order, those that
      are numbers by their value.

    Args:
        config: The configuration of the model, with ``num_labels`` and ``label2id``.
        tables: The tables, with the column of the labels in each.

    Attributes:
        names: What the numbers of the model stand for, as far as it is known.
        note: What was taken for granted, in words; None if nothing was.

    Raises:
        ConfigError: The number of classes is another one, or names cannot be matched.
    """

    def __init__(self, config: Any, tables: Sequence[tuple[Table, str]]) -> None:
        self._count = int(config.num_labels)
        ids = {str(name): int(number) for name, number in (config.label2id or {}).items()}
        generic = all(name.upper() == f"LABEL_{number}" for name, number in ids.items())
        self._generic, self._ids = generic, ids
        folded: dict[str, set[int]] = {}
        for name, number in ids.items():
            folded.setdefault(name.casefold(), set()).add(number)
        self._folded = {name: min(known) for name, known in folded.items() if len(known) == 1}
        self.names = [] if generic else sorted(ids, key=lambda name: ids[name])
        self.note: str | None = None
        texts: set[str] = set()
        for table, column in tables:
            if table.holds[column] == "text":
                known = {str(value) for value in table.values(column) if value is not None}
                texts |= {text for text in known if text.strip()}  # what is empty is no label
        numeric = all(text.isdecimal() for text in texts)
        order = sorted(texts, key=lambda text: (int(text) if numeric else 0, text))
        self._sorted = self._by_order(tables[0][0].name, order) if texts else {}
        self._maps = [self._map(table, column) for table, column in tables]

    def number(self, table: int, value: Any) -> Any:
        """Return the number of a label of one of the tables; what is no label comes back as it is.

        Args:
            table: The number of the table.
            value: What its column holds.
        """
        if isinstance(value, int):
            value = int(value)  # not a bool
        return self._maps[table].get(value, value) if isinstance(value, int | str) else value

    def _known(self, name: str) -> int | None:
        """Return the number that the model has for a name."""
        return self._ids.get(name, self._folded.get(name.casefold()))

    def _by_order(self, name: str, texts: list[str]) -> dict[Any, int]:
        """Return the numbers of labels that are words."""
        known = {text: number for text in texts if (number := self._known(text)) is not None}
        if len(known) == len(texts):
            return known
        shown = ", ".join(texts[:8]) + (", …" if len(texts) > 8 else "")
        if not self._generic:
            raise ConfigError(
                f"{name}: the labels are {shown}, and the model knows {', '.join(self.names)}."
            )
        if len(texts) != self._count:
            raise ConfigError(
                f"{name} has {len(texts)} labels ({shown}), the model {self._count} classes."
            )
        self.names = texts
        self.note = f"labels are numbered in sorted order: {shown}"
        return {text: number for number, text in enumerate(texts)}

    def _map(self, table: Table, column: str) -> Mapping[Any, int]:
        kind = table.holds[column]
        if kind == "text":
            return self._sorted
        values = table.values(column)
        whole = [int(v) for v in values if isinstance(v, int)]
        names = list(table.names.get(column, ()))
        found = {i: number for i, n in enumerate(names) if (number := self._known(n)) is not None}
        named = bool(names) and len(found) == len(names)
        if named and whole and not 0 <= min(whole) <= max(whole) < len(names):
            raise ConfigError(
                f"{table.name} has labels from {min(whole)} to {max(whole)}, and names for 0 to "
                f"{len(names) - 1}; leave out the rows without a label."
            )
        if named:
            return found
        if names and len(names) != self._count:
            raise ConfigError(
                f"{table.name} has {len(names)} labels ({', '.join(names[:8])}), "
                f"the model {self._count} classes."
            )
        if whole and not 0 <= min(whole) <= max(whole) < self._count:
            raise ConfigError(
                f"{table.name} has labels from {min(whole)} to {max(whole)}, the model "
                f"{self._count} classes, numbered from 0."
            )
        for i, number in found.items():
            if i != number:
                raise ConfigError(
                    f"{names[i]} is {i} in {table.name} and {number} in the model, and not all "
                    f"names of the labels ({', '.join(names[:8])}) are known to it "
                    f"({', '.join(self.names[:8])}); rename them to those of the model."
                )
        if names or (whole and self.names):
            names = names or [str(number) for number in range(self._count)]
            known = self.names or [f"class {number}" for number in range(self._count)]
            pairs = [f"{name} is {other}" for name, other in zip(names, known, strict=True)]
            self.note = f"labels keep their numbers: {', '.join(pairs[:8])}"
            self.names = self.names or names
        return {}
