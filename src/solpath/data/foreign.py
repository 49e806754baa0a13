"""Recognise tables and data sets of other libraries, without importing them."""

from typing import Any


def foreign_kind(value: Any) -> str:
    """Return what `value` is: a kind of data of `datasets` or pandas, or ``""`` for anything else.

    Args:
        value: Any object, which is only looked at.

    Returns:
        ``"DatasetDict"`` (streams too), ``"Dataset"`` (streams too), ``"DataFrame"``, ``"Series"``
        or ``""``.

    Example:
        >>> foreign_kind([{"text": "a cat"}])
        ''
    """
    for kind in type(value).__mro__:
        name = _KINDS.get((kind.__module__.partition(".")[0], kind.__name__))
        if name is not None:
            return name
    return ""


_KINDS = {
    ("datasets", "DatasetDict"): "DatasetDict",
    ("datasets", "IterableDatasetDict"): "DatasetDict",
    ("datasets", "Dataset"): "Dataset",
    ("datasets", "IterableDataset"): "Dataset",
    ("pandas", "DataFrame"): "DataFrame",
    ("pandas", "Series"): "Series",
}


def batching_hint(value: Any) -> str:
    """Return how batches are made of data whose `foreign_kind` is not ``""``.

    Args:
        value: The data set or table, which is only looked at.
    """
    kind = foreign_kind(value)
    if kind == "DatasetDict":
        first, names = next(iter(value), "train"), ", ".join(value)
        return (
            f"choose one of its splits ({names}) and make batches of it, for example with "
            f"solpath.text_batches(data[{first!r}], tokenizer)"
        )
    found: Any = getattr(value, "column_names", None)
    columns = list(getattr(value, "columns", ()) if found is None else found)
    if kind == "Dataset" and "input_ids" in columns:
        return "give list(data.with_format('torch').iter(batch_size=16))"
    column = "text" if "text" in columns or not columns else str(columns[0])
    option = "" if kind == "Series" or column == "text" else f", text_column={column!r}"
    return (
        "its items are single samples: make batches of them, for example with "
        f"solpath.text_batches(data, tokenizer{option})"
    )
