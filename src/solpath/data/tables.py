"""Open files, folders and data sets by name as tables: rows, and what each column holds."""

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

from solpath.data.batches import Broken
from solpath.data.images import image_files, is_image
from solpath.data.text import read_lines
from solpath.errors import ConfigError, FileError, SolpathError
from solpath.reading import opened

Holds: TypeAlias = Literal["text", "image", "whole", "names", "other"]
"""What a column holds. ``"whole"`` are whole numbers, ``"names"`` those that stand for names."""

_READERS: dict[str, tuple[str, dict[str, Any]]] = {
    ".jsonl": ("json", {}),
    ".json": ("json", {}),
    ".csv": ("csv", {"keep_default_na": False}),  # the words "null" and "NA" are texts, too
    ".tsv": ("csv", {"keep_default_na": False, "sep": "\t"}),
    ".parquet": ("parquet", {}),
    ".arrow": ("arrow", {}),
}
SUFFIXES = (".txt", *_READERS)
"""Endings of the files that can be opened."""

_CAPTIONS = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
_SAVED = ("state.json", "dataset_dict.json")  # of `save_to_disk`
_SPLITS = {"train", "training", "val", "valid", "validation", "dev", "test", "testing"}
_BEGINNING = 4096  # bytes
_NO_ROWS = ("corresponds to no data", "No columns to parse")  # what `datasets` says of none
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", re.ASCII)


@dataclass(frozen=True)
class Table:
    """The rows of one source.

    Attributes:
        name: What messages call the source.
        rows: The rows by number, each a mapping from column to value, read when it is asked for.
        holds: What each column holds, by name.
        names: The names that the numbers of a column of ``"names"`` stand for.
    """

    name: str
    rows: Sequence[Mapping[str, Any]]
    holds: Mapping[str, Holds]
    names: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.rows)

    def columns_of(self, *kinds: Holds) -> list[str]:
        """Return the columns that hold one of these kinds, in their order."""
        return [column for column, kind in self.holds.items() if kind in kinds]

    def column(self, column: str) -> list[Any]:
        """Return the values of a column, row by row."""
        rows: Any = self.rows
        if hasattr(rows, "unique"):  # of `datasets`, which decodes whole rows
            return list(rows[column])
        return [row[column] for row in rows]

    def values(self, column: str) -> set[Any]:
        """Return the distinct values of a column."""
        rows: Any = self.rows
        if hasattr(rows, "unique"):
            return set(rows.unique(column))
        return {row[column] for row in rows}


def open_table(name: str, *, config: str | None = None, split: str | None = None) -> Table:
    """Open a source by its name. No code of it is run.

    Args:
        name: A file (.txt with one text per line, .jsonl, .json, .csv, .tsv, .parquet, .arrow); a
            folder that ``save_to_disk`` of `datasets` wrote, with images (the subfolders are their
            labels), with images and captions (``metadata.csv`` or ``.jsonl``), or with files of the
            kinds above; or the name of a data set on the Hub.
        config: The configuration of a data set that has several.
        split: The split, if there are several. In a folder of images it is a subfolder.

    Raises:
        FileError: There is no such source, it cannot be read, or images are in a folder whose
            metadata does not list them.
        ConfigError: There are several splits and none is chosen, the chosen one is missing, or the
            package datasets is needed and not installed.

    Example:
        >>> file = Path("cats.csv")
        >>> size = file.write_text("text,label\\na cat,0\\na dog,1\\n")
        >>> table = open_table("cats.csv")
        >>> len(table), dict(table.holds)
        (2, {'text': 'text', 'label': 'whole'})
    """
    path = Path(name)
    if path.is_file():
        return _file(name, path, config, split)
    if path.is_dir():
        if any((path / file).is_file() for file in _SAVED):
            _has_no(name, configuration=config)
            with _reading(name) as datasets:
                return _table(name, datasets.load_from_disk(str(path)), split)
        inner = path / split if split else path
        homes = [inner] if inner.is_dir() else [path]
        homes += [home for home in homes[0].iterdir() if home.is_dir()]
        captions = any((home / file).is_file() for home in homes for file in _CAPTIONS)
        if captions or _has_images(path):
            _has_no(name, configuration=config)
            return _captioned(name, path, split) if captions else _images(name, path, split)
    elif path.suffix.lower() in SUFFIXES or not _HUB_ID.fullmatch(name):
        raise FileError(f"{name}: no such file or folder, and not a name on the Hub.")
    said = name if path.is_dir() else f"{name} (there is no file or folder of that name here)"
    with _reading(said) as datasets:
        place = _literal(path) if path.is_dir() else name
        data = datasets.load_dataset(place, config, split=split)
    return _table(name, data, None)


def _file(name: str, path: Path, config: str | None, split: str | None) -> Table:
    _has_no(name, configuration=config, split=split)
    suffix = path.suffix.lower()
    if suffix == ".txt":
        return lines_table(name)
    if suffix not in _READERS:
        raise FileError(f"{name}: the ending of a file must be one of {', '.join(SUFFIXES)}.")
    kind, options = _READERS[suffix]
    if kind in ("csv", "json"):
        _check_text(path)
    with _reading(name) as datasets:
        files = [_literal(path)]
        table = _table(name, datasets.load_dataset(kind, data_files=files, **options), None)
    if kind == "csv":
        _check_cells(table, path)
    return table


def _check_text(path: Path) -> None:
    """Raise `FileError` if a file begins like no text in UTF-8, as one in UTF-16 does."""
    with opened(path) as stream:
        if b"\0" in stream.read(_BEGINNING):
            raise FileError(f"{path} is not UTF-8 text; save it as UTF-8.")


def _check_cells(table: Table, path: Path) -> None:
    """Raise `FileError` if a table of cells was not read as its lines stand."""
    if "__index_level_0__" in table.holds:  # what pandas makes of the first cells then
        raise FileError(f"{table.name} has rows with more cells than its first line has names.")
    if path.suffix.lower() == ".tsv":
        with path.open("rb") as stream:
            lines = sum(bool(line.strip()) for line in stream) - 1
        if lines != len(table):
            raise FileError(
                f"{table.name} has {lines:,} lines of {len(table):,} rows, as quotation marks join "
                "lines; save it as .csv with all quotes doubled, or as .jsonl."
            )


def _captioned(name: str, path: Path, split: str | None) -> Table:
    with _reading(name) as datasets:
        data = datasets.load_dataset("imagefolder", data_dir=_literal(path), drop_labels=False)
    table = _table(name, data, split)
    inner = path / split if split else path
    _check_listed(name, inner if inner.is_dir() else path, data.values())
    return table


def _check_listed(name: str, folder: Path, data: Iterable[Any]) -> None:
    """Raise `FileError` if no row has an image of the folder, which `datasets` drops silently."""
    chunks = [chunk for one in data for column in one.data.columns for chunk in column.chunks]
    listed = {os.path.realpath(path) for chunk in chunks for path in _paths_in(chunk)}
    files = sorted(
        file
        for file in folder.rglob("*")
        if is_image(file)
        and not any(part.startswith((".", "__")) for part in file.relative_to(folder).parts)
    )
    lost = [file for file in files if os.path.realpath(file) not in listed]
    if lost:
        raise FileError(
            f"{name} has {len(lost):,} of {len(files):,} images that its metadata does not list, "
            f"{lost[0].relative_to(folder)} the first; list them, or move them out of the folder."
        )


def _paths_in(array: Any) -> Iterator[str]:
    """Yield the paths of images in an array of Arrow, at any depth."""
    kind = type(array).__name__
    if kind.endswith("ListArray"):
        yield from _paths_in(array.flatten())
    elif kind == "StructArray":
        fields = [field.name for field in array.type]
        if fields == ["bytes", "path"]:
            yield from (path for path in array.field("path").to_pylist() if path)
        else:
            for field in fields:
                yield from _paths_in(array.field(field))


def _literal(path: Path) -> str:
    """Return a path in which `datasets` finds no pattern."""
    if any(letter in str(path) for letter in "*?[]"):
        raise FileError(f"{path}: names with *, ? or brackets are patterns to datasets; rename it.")
    return str(path)


@contextmanager
def _reading(name: str) -> Iterator[Any]:
    """Yield `datasets`, silent; its errors become a `FileError` that names the source."""
    try:
        import datasets
    except ImportError as error:
        raise ConfigError(
            f"{name} needs the package datasets; install it with: pip install 'solpath[data]'."
        ) from error
    silent = datasets.are_progress_bars_disabled()
    messages = datasets.utils.logging
    level = messages.get_verbosity()
    datasets.disable_progress_bars()
    messages.set_verbosity(messages.CRITICAL)
    try:
        yield datasets
    except SolpathError:
        raise
    except Exception as error:  # damaged files can make its readers raise anything
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        if isinstance(cause, StopIteration) or any(words in str(cause) for words in _NO_ROWS):
            raise FileError(f"{name} has no rows.") from error
        reason = " ".join(str(cause).split())[:300] or type(cause).__name__
        raise FileError(f"cannot read {name}: {reason.rstrip('.')}.") from error
    finally:
        messages.set_verbosity(level)
        if not silent:
            datasets.enable_progress_bars()


def _table(name: str, data: Any, split: str | None) -> Table:
    """Return the table of a `Dataset`, or of one split of a `DatasetDict`."""
    if hasattr(data, "keys"):
        splits = list(data.keys())
        if split is None and len(splits) > 1:
            raise ConfigError(f"{name} has the splits {', '.join(splits)}; choose one of them.")
        chosen = split or splits[0]
        if chosen not in splits:
            raise ConfigError(f"{name} has no split {chosen!r}, but {', '.join(splits)}.")
        data = data[chosen]
    else:
        _has_no(name, split=split)
    if not len(data):
        raise FileError(f"{name} has no rows.")
    holds = {column: _holds(feature) for column, feature in data.features.items()}
    names = {c: list(f.names) for c, f in data.features.items() if holds[c] == "names"}
    return Table(name, data, holds, names)


def _holds(feature: Any) -> Holds:
    kind = type(feature).__name__
    if kind == "Image":
        return "image"
    if kind == "ClassLabel":
        return "names"
    dtype = str(getattr(feature, "dtype", "")) if kind == "Value" else ""
    if "string" in dtype:
        return "text"
    return "whole" if dtype.startswith(("int", "uint", "bool")) else "other"


def _has_no(name: str, **given: str | None) -> None:
    for what, value in given.items():
        if value is not None:
            raise ConfigError(f"{name} has no {what}s to choose from; leave out {value!r}.")


def _has_images(path: Path) -> bool:
    return any(is_image(file) for file in path.rglob("*"))


def lines_table(name: str) -> Table:
    """Return the lines of a text file, whatever its name ends with, in the column ``text``."""
    rows = [{"text": line} for line in read_lines(Path(name), Broken("raise"))]
    return Table(name, rows, {"text": "text"})


def images_table(name: str, folder: Path) -> Table:
    """Return the images below a folder in the column ``image``.

    If all of them are in subfolders, the names of these are in the column ``label``, unless they
    are the names of splits, such as ``train`` and ``test``.

    Args:
        name: What messages call the folder.
        folder: The folder.

    Raises:
        FileError: There is no such folder, or no image in it.
    """
    try:
        rows = image_files(folder, "image", "label")
    except FileError:  # an image in no subfolder, or none at all
        return Table(name, image_files(folder, "image", None), {"image": "image"})
    names = sorted({row["image"].relative_to(folder).parts[0] for row in rows})
    if _are_splits(names):
        return Table(name, image_files(folder, "image", None), {"image": "image"})
    return Table(name, rows, {"image": "image", "label": "names"}, {"label": names})


def _images(name: str, path: Path, split: str | None) -> Table:
    if split is not None and not (path / split).is_dir():
        raise ConfigError(f"{name} has no subfolder {split!r}.")
    folder = path / split if split else path
    names = sorted(
        {file.relative_to(folder).parts[0] for file in folder.rglob("*") if is_image(file)}
    )
    if _are_splits(names):
        raise ConfigError(f"{name} has the splits {', '.join(names)}; choose one of them.")
    return images_table(name, folder)


def _are_splits(names: Iterable[str]) -> bool:
    found = {name.lower() for name in names}
    return bool(found) and found <= _SPLITS
