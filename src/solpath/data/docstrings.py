"""Text pairs from the docstrings of installed packages, for runs without data of one's own.

The same installed packages always give the same text. Source files are parsed, never imported. A
docstring gives one text pair: (first sentence, rest). Every file belongs to exactly one of three
splits, chosen by a digest of its location, so that no text of a search comes back in a test.
"""

import ast
import hashlib
import os
import random
import re
import sysconfig
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Literal

from solpath.errors import FileError

Split = Literal["search", "calibration", "test"]
TextPair = tuple[str, str]
_Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef

_SPLITS: tuple[Split, ...] = ("search", "search", "search", "search", "calibration", "test")
_SKIPPED = frozenset({"test", "tests", "testing", "idlelib", "lib2to3", "site-packages"})
_MAX_FILE_BYTES = 80_000
_BYTES_PER_QUOTE = 1500  # a file with fewer docstrings is not worth parsing
_MAX_BODY = 600
_SENTENCE = re.compile(r"(.{20,200}?\.) (.{60,})")


@dataclass(frozen=True)
class Corpus:
    """Text pairs (first sentence, rest) in three splits with no file and no sentence in common.

    Attributes:
        search: Text pairs for the search.
        calibration: Text pairs for statistics.
        test: Text pairs for evaluation only.
        files: The number of files that were parsed.
    """

    search: tuple[TextPair, ...]
    calibration: tuple[TextPair, ...]
    test: tuple[TextPair, ...]
    files: int

    def digest(self) -> str:
        """Return the first 16 hexadecimal digits of the SHA-256 of all text."""
        state = hashlib.sha256()
        for split in (self.search, self.calibration, self.test):
            for text in chain.from_iterable(split):
                state.update(text.encode() + b"\0")
            state.update(b"\1")
        return state.hexdigest()[:16]


def read_corpus(
    *,
    search: int = 1200,
    calibration: int = 256,
    test: int = 256,
    roots: Sequence[str | os.PathLike[str]] | None = None,
) -> Corpus:
    """Read docstrings until every split has as many text pairs as asked for.

    Packages are visited in sorted order, one file of each in turn, so the text is mixed and is the
    same wherever the same packages are installed.

    Args:
        search: The number of text pairs wanted for the search.
        calibration: The number of text pairs wanted for statistics.
        test: The number of text pairs wanted for evaluation.
        roots: The folders that hold packages. None takes site-packages and the standard library.

    Raises:
        FileError: The folders hold too little text for one of the splits.
    """
    wanted: dict[Split, int] = {"search": search, "calibration": calibration, "test": test}
    found: dict[Split, list[TextPair]] = {"search": [], "calibration": [], "test": []}
    if roots is None:
        paths = sysconfig.get_paths()
        roots = list(dict.fromkeys((paths["purelib"], paths["stdlib"])))
    seen: set[str] = set()
    files = 0
    for name, file in _round_robin([Path(root) for root in roots]):
        split = split_of(name)
        if len(found[split]) >= wanted[split]:
            if all(len(found[key]) >= count for key, count in wanted.items()):
                break
            continue
        files += 1
        for first, rest in docstring_pairs(file):
            keys = {first.casefold(), rest.casefold()[:80]}
            if not keys & seen:
                seen |= keys
                found[split].append((first, rest))
    for key, count in wanted.items():
        if len(found[key]) < count:
            raise FileError(
                f"found {len(found[key])} docstring pairs for the {key} split, {count} are needed; "
                f"looked in {', '.join(map(str, roots))}. Give your own text instead."
            )
    return Corpus(
        tuple(found["search"][:search]),
        tuple(found["calibration"][:calibration]),
        tuple(found["test"][:test]),
        files,
    )


def split_of(name: str) -> Split:
    """Return the split of a file, from its location relative to the folder of the packages."""
    digest = hashlib.sha256(name.encode()).digest()
    return _SPLITS[int.from_bytes(digest[:8], "big") % len(_SPLITS)]


def docstring_pairs(file: Path) -> list[TextPair]:
    """Return (first sentence, rest) of every docstring in a source file that is long enough.

    A file that is large, has few docstrings for its size, or cannot be read or parsed gives none.
    """
    try:
        if file.stat().st_size > _MAX_FILE_BYTES:
            return []
        source = file.read_bytes()
        if source.count(b'"""') * _BYTES_PER_QUOTE < len(source):
            return []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(source)
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
        return []
    pairs = []
    for node in _documented(tree):
        text = " ".join((ast.get_docstring(node, clean=False) or "").split())
        match = _SENTENCE.match(text)
        if match:
            pairs.append((match[1], match[2][:_MAX_BODY]))
    return pairs


def _documented(node: _Documented) -> Iterator[_Documented]:
    """Yield a module, its classes and functions, and the classes and functions in those."""
    yield node
    for child in node.body:
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _documented(child)


def _round_robin(roots: Sequence[Path]) -> Iterator[tuple[str, Path]]:
    """Yield a source file of each package in turn, as (location relative to its root, location)."""
    waiting = [
        _sources(root, root / name)
        for root in roots
        if root.is_dir()
        for name in sorted(os.listdir(root))
        if name not in _SKIPPED
    ]
    while waiting:
        alive = []
        for sources in waiting:
            item = next(sources, None)
            if item is not None:
                yield item
                alive.append(sources)
        waiting = alive


def _sources(root: Path, entry: Path) -> Iterator[tuple[str, Path]]:
    """Yield the source files of a package, or the one file of a module, in sorted order."""
    if entry.suffix == ".py":
        yield entry.name, entry
    elif entry.suffix == "" and entry.is_dir():
        for folder, names, files in os.walk(entry):
            names[:] = sorted(set(names) - _SKIPPED)
            for file in sorted(files):
                if file.endswith(".py"):
                    path = Path(folder, file)
                    yield path.relative_to(root).as_posix(), path


def texts_of(pairs: Sequence[TextPair], *, seed: int = 0) -> list[str]:
    """Return the first sentences and the rests of all text pairs as one shuffled list.

    Args:
        pairs: Text pairs (first sentence, rest).
        seed: Seeds the order of the texts.
    """
    texts = [text for pair in pairs for text in pair]
    random.Random(seed).shuffle(texts)
    return texts
