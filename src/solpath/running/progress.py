"""Show the progress bar of long work, which imports this module and is never imported by it."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from solpath.running.modes import undoing

Report = Callable[..., None]
"""A function that moves the bar by one step: ``report(**fields)``.

The fields are the figures in the text beside the bar. ``work`` is how much there was in the step, a
number and its unit such as ``(512, "tokens")``; the bar shows how much goes through in a second.
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
        ProgressColumn,
        Task,
        TextColumn,
        TimeRemainingColumn,
    )
    from rich.table import Column
    from rich.text import Text

    works: list[tuple[float, str]] = []

    class Rate(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text(rate(task.finished_speed or task.speed, works))

    columns = (
        TextColumn(title, table_column=Column(no_wrap=True)),
        BarColumn(None, table_column=Column(ratio=1, max_width=40)),  # as much as is left
        MofNCompleteColumn(table_column=Column(no_wrap=True)),
        TextColumn(text, table_column=Column(no_wrap=True)),
        Rate(table_column=Column(no_wrap=True)),
        TimeRemainingColumn(table_column=Column(no_wrap=True)),
    )
    bar = Progress(*columns)
    with undoing(bar.stop):
        bar.start()
        task = bar.add_task(title, total=total, completed=done, **fields)

        def report(*, work: tuple[float, str] | None = None, **fields: Any) -> None:
            if work is not None:
                works.append(work)
            bar.update(task, advance=1, **fields)

        yield report


def rate(steps: float | None, works: Sequence[tuple[float, str]]) -> str:
    """Return the work per second as text; nothing while it is not known.

    Args:
        steps: Steps per second.
        works: The work of every step so far, with its unit. Steps differ, so their mean counts.

    Example:
        >>> rate(2.5, [(15, "samples"), (17, "samples")]), rate(0.1, [(4, "tokens")])
        ('40 samples/s', '0.4 tokens/s')
        >>> rate(None, [(4, "tokens")])
        ''
    """
    if steps is None or not works:
        return ""
    value = steps * sum(amount for amount, _ in works) / len(works)
    unit = works[-1][1]
    return f"{value:,.0f} {unit}/s" if value >= 10 else f"{value:.1f} {unit}/s"


def say(text: str) -> None:
    """Print a line about long work before it starts, where its progress bar will be.

    Args:
        text: The line.
    """
    from rich.console import Console

    Console().print(text, markup=False, highlight=False, soft_wrap=True)
