"""The application that commands register with, and what a command tells the code around it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer


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


app = typer.Typer(
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
