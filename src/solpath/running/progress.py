"""The progress bar of long work. Imported by it, never the other way round."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

Report = Callable[..., None]
"""``report(**fields)``: one step more, with the figures of the text beside the bar."""


@contextmanager
def progress_bar(
    title: str, text: str, total: int, done: int, *, show: bool, **fields: Any
) -> Iterator[Report]:
    """A bar with some figures and the time left.

    Args:
        title: left of the bar.
        text: format of the figures, e.g. ``"loss {task.fields[loss]:.4f}"``.
        total: steps.
        done: steps done before.
        show: without it nothing is drawn.
        fields: figures before the first step.
    """
    if not show:
        yield lambda **fields: None
        return
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn(title),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(text),
        TimeRemainingColumn(),
    )
    with Progress(*columns) as bar:
        task = bar.add_task(title, total=total, completed=done, **fields)
        yield lambda **fields: bar.update(task, advance=1, **fields)
