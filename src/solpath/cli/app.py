"""The application that commands register with, and what a command tells the code around it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from solpath.cli.settings import with_settings


@dataclass
class State:
    """What a running command, as ``context.obj``, tells the code that handles its end.

    Attributes:
        debug: Whether errors show their traceback.
        checkpoint: The folder that the same command can go on from; it may not exist yet. None if
            the command has no checkpoint.
    """

    debug: bool = False
    checkpoint: Path | None = None


_ORDER = ("demo", "inspect", "search", "family", "report", "choose", "plan", "extract",
          "compensate", "tune", "eval", "bench", "export")  # fmt: skip


class _Commands(TyperGroup):
    """Lists the commands in the order in which they are used."""

    def list_commands(self, ctx: Any) -> list[str]:
        return sorted(super().list_commands(ctx), key=[*_ORDER, *super().list_commands(ctx)].index)


class _App(typer.Typer):
    """Gives every command the option ``--settings``."""

    def command(self, *args: Any, **options: Any) -> Callable[[Any], Any]:
        """Return a decorator that registers a command. The function itself stays as it is."""
        register = super().command(*args, **options)

        def registered(function: Any) -> Any:
            register(with_settings(function))
            return function

        return registered


app = _App(
    cls=_Commands,
    help="Prune a pretrained transformer once, hand it out at any size.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def _options(
    context: typer.Context,
    debug: Annotated[bool, typer.Option(help="Show the traceback of an error.")] = False,
) -> None:
    context.obj.debug = debug
