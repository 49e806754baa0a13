"""How a benchmark writes its results: one JSON file with provenance, and one table."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from solpath.files import write_file
from solpath.running.provenance import provenance

RESULTS = Path(__file__).resolve().parent / "results"


def save(
    out: Path,
    settings: Mapping[str, Any],
    results: Any,
    *,
    device: torch.device | str = "cpu",
    **extra: Any,
) -> None:
    """Write settings, results and provenance, atomically."""
    value = {"settings": dict(settings), "results": results, **extra}
    value["provenance"] = provenance(device)
    write_file(out, (json.dumps(value, indent=1, allow_nan=False) + "\n").encode())
    Console().print(f"wrote {out}", soft_wrap=True)


def show(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Print a table; the first column is left-aligned, the others right-aligned."""
    table = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left", no_wrap=i == 0)
    for row in rows:
        table.add_row(*(f"{cell:,.3f}" if isinstance(cell, float) else str(cell) for cell in row))
    console = Console()
    Console(width=None if console.is_terminal else 160).print(table)
