"""Show the progress bar of long work, which imports this module and is never imported by it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from solpath.running.modes import undoing

Report = Callable[..., None]
"""A function that moves the bar by one step: ``report(**fields)``.

The fields are the figures in the text beside the bar.
"""


@contextmanager
def progress_bar(
    title: str, text: str, total: int, done: int, *, show: bool, **fields: Any
) -> Iterator[Report]:
    """Show a bar with some figures and the time left while the block runs.

    Args:
        title: Text on the left of the bar.
        text: Format of the figures, for example ``"loss {task.fields[loss]:.4f}"``.
        total: Number of steps.
        done: Number of steps done before.
        show: Whether to draw anything.
        fields: Figures before the first step.

    Yields:
        The function to call after every step.
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
    bar = Progress(*columns)
    with undoing(bar.stop):
        bar.start()
        task = bar.add_task(title, total=total, completed=done, **fields)
        yield lambda **fields: bar.update(task, advance=1, **fields)


def say(text: str) -> None:
    """Print a line about long work before it starts, where its progress bar will be.

    Args:
        text: The line.
    """
    from rich.console import Console

    Console().print(text, markup=False, highlight=False, soft_wrap=True)
