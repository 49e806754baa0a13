"""What the command line prints: results to stdout, everything else to stderr."""

import contextlib
import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def fail(text: str) -> None:
    """Print an error as one line to stderr, if there is still somebody to read it."""
    with contextlib.suppress(OSError):  # the terminal was closed
        print(f"solpath: {' '.join(text.split())}", file=sys.stderr)


def say(text: str) -> None:
    """Print to stderr what is going on."""
    print(text, file=sys.stderr)


def say_next(*words: str | Path, first: str = "Next") -> None:
    """Print the command that most people run after this one.

    Args:
        words: The words after ``solpath``.
        first: What the line begins with.
    """
    print(f"{first}: solpath {shlex.join(map(str, words))}")


def print_json(value: Mapping[str, Any]) -> None:
    """Print a result for other programs. Raise `ValueError` for NaN."""
    print(json.dumps(value, indent=1, allow_nan=False))


def print_table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a result for reading. All columns but the first are aligned as numbers."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for i, title in enumerate(titles):
        table.add_column(title, justify="right" if i else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    Console().print(table)
