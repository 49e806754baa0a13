"""Show the progress bar of long work, which imports this module and is never imported by it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from solpath.running.modes import undoing

Report = Callable[..., None]
"""A function that moves the bar by one step: ``report(**fields)``.

The fields are the figures in the text beside the bar; ``samples`` are those of the step, of which
the bar shows how many go through in a second.
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
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text(rate(task.finished_speed or task.speed, task.fields.get("samples")))

    columns = (
        TextColumn(title),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(text),
        Rate(),
        TimeRemainingColumn(),
    )
    bar = Progress(*columns)
    with undoing(bar.stop):
        bar.start()
        task = bar.add_task(title, total=total, completed=done, **fields)
        yield lambda **fields: bar.update(task, advance=1, **fields)


def rate(steps: float | None, samples: int | None) -> str:
    """Return samples per second as text; nothing while they are not known.

    Args:
        steps: Steps per second.
        samples: Samples of a step.

    Example:
        >>> rate(2.5, 16), rate(0.1, 4), rate(None, 16)
        ('40 samples/s', '0.4 samples/s', '')
    """
    if steps is None or samples is None:
        return ""
    value = steps * samples
    return f"{value:,.0f} samples/s" if value >= 10 else f"{value:.1f} samples/s"


def say(text: str) -> None:
    """Print a line about long work before it starts, where its progress bar will be.

    Args:
        text: The line.
    """
    from rich.console import Console

    Console().print(text, markup=False, highlight=False, soft_wrap=True)
