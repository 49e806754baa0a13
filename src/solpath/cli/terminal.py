"""What the command line prints: results to stdout, all else to stderr."""

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any


def fail(text: str) -> None:
    """An error, as one line."""
    print(f"solpath: {' '.join(text.split())}", file=sys.stderr)


def say(text: str) -> None:
    """What goes on, for whoever watches."""
    print(text, file=sys.stderr)


def print_json(value: Mapping[str, Any]) -> None:
    """A result for other programs; NaN is refused."""
    print(json.dumps(value, indent=1, allow_nan=False))


def print_table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A result to look at; all columns but the first are numbers."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for i, title in enumerate(titles):
        table.add_column(title, justify="right" if i else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    Console().print(table)
