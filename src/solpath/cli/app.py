"""The application that commands register with, and what they tell the frame around them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer


@dataclass
class State:
    """What a running command tells whoever handles its end. It is ``context.obj`` in a command.

    Attributes:
        debug: whether errors show their traceback.
        checkpoint: folder of the state that the same command goes on from, once there is one.
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
