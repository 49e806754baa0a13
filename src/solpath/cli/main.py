"""The command line. Each command is a thin layer over the functions of the package.

Nothing heavy is imported here: torch and transformers are imported when a command runs.
"""

import sys
from collections.abc import Sequence
from typing import Any

import typer

from solpath.cli import assess, choose, families, inspecting, prune, refine
from solpath.cli.app import State, app
from solpath.cli.state import has_state, stopping_well
from solpath.cli.terminal import fail
from solpath.cli.wording import as_typed
from solpath.errors import SolpathError

_COMMANDS = (
    assess,
    choose,
    families,
    inspecting,
    prune,
    refine,
)  # importing them registers the commands

# The error for bad arguments of any kind. typer exports only this subclass of it.
_USAGE_ERROR: Any = typer.BadParameter.__base__


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: The arguments of the command line. None takes those of the process.

    Returns:
        The exit code: 0 for success, 1 for an unexpected error, 2 for bad input, 130 for Ctrl-C, a
        closed terminal or a request to end.
    """
    state = State()
    try:
        given = list(sys.argv[1:] if arguments is None else arguments)
        with stopping_well():
            code = app(args=given or ["--help"], standalone_mode=False, obj=state)
    except KeyboardInterrupt:
        code = 130
    except typer.Abort:
        code = 130
    except (SolpathError, _USAGE_ERROR) as error:
        if state.debug:
            raise
        text = error.format_message() if hasattr(error, "format_message") else str(error)
        fail(as_typed(text))
        return 2
    except Exception as error:
        if state.debug:
            raise
        fail(f"unexpected {type(error).__name__}: {error}; solpath --debug shows where.")
        return 1
    if code == 130:
        folder = state.checkpoint
        if folder is not None and has_state(folder):
            fail(
                f"stopped; the state is in {folder}: run the same command again to go on, or "
                "remove that folder to start afresh."
            )
        else:
            fail("stopped; nothing is kept: run the same command again to start afresh.")
    return code if isinstance(code, int) else 0
