"""All options of a command in a TOML file: read from one, and written beside what it made."""

import functools
import inspect
import json
import tomllib
from collections.abc import Callable
from difflib import get_close_matches
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from solpath.cli.arguments import BUDGETS
from solpath.errors import ConfigError

FILE = "settings.toml"
"""The file in the folder that a command wrote."""

_NOT_KEPT = frozenset({"out", "save", "json", "checkpoint", "settings", "help"})  # of one run alone


def with_settings(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the option ``--settings FILE``, and let it keep its settings.

    What the file says counts where the command line says nothing; of budgets, one counts. If the
    command has an argument ``out`` or ``save`` and that is a folder in the end, `FILE` in it says
    what was used.

    Args:
        command: The command, with the annotations of typer.
    """
    given_parameters = inspect.signature(command).parameters
    context_name = next(
        (name for name, p in given_parameters.items() if p.annotation is typer.Context), None
    )

    @functools.wraps(command)
    def with_option(context_: typer.Context, settings: Path | None, **given: Any) -> None:
        own = {} if context_name is None else {context_name: context_}
        given |= _outvoted(context_, given)
        command(**given, **own)
        for out in (given.get("out"), given.get("save")):
            if isinstance(out, Path) and out.is_dir():
                _keep(context_, out / FILE)

    added = [
        inspect.Parameter("context_", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context),
        inspect.Parameter(
            "settings", inspect.Parameter.KEYWORD_ONLY, annotation=_Settings, default=None
        ),
    ]
    own = [
        parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
        for name, parameter in given_parameters.items()
        if name != context_name
    ]
    changed: Any = with_option
    changed.__signature__ = inspect.Signature([*own, *added])
    changed.__annotations__ = {parameter.name: parameter.annotation for parameter in (*own, *added)}
    return with_option


def _outvoted(context: typer.Context, given: dict[str, Any]) -> dict[str, None]:
    """Return the budgets that a file gives beside one on the command line, and forget them."""
    budgets = [name for name in BUDGETS if given.get(name) is not None]
    typed = [name for name in budgets if _is_typed(context, name)]
    dropped: dict[str, None] = dict.fromkeys(set(budgets) - set(typed)) if typed else {}
    context.params.update(dropped)
    return dropped


def _is_typed(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _read(context: typer.Context, file: Path | None) -> Path | None:
    """Make what a file says the default of a command's options."""
    if file is None:
        return None
    try:
        found = tomllib.loads(file.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"--settings: cannot read {file}: {error}.") from error
    known = _options(context)
    defaults = {}
    for key, value in found.items():
        if key not in known:
            near = get_close_matches(key, known, 1)
            hint = f"; the nearest is {near[0]}" if near else f"; known are {', '.join(known)}"
            raise ConfigError(f"{file}: {context.info_name} has no option {key!r}{hint}.")
        defaults[known[key].name] = _plain(f"{file}: {key}", known[key], value)
    context.default_map = defaults
    return file


_Settings = Annotated[
    Path | None,
    typer.Option(
        help="TOML file of options, such as the settings.toml of a result.",
        is_eager=True,
        callback=_read,
    ),
]


def _options(context: typer.Context) -> dict[str, Any]:
    """Return name, as on the command line, to every option and argument of a command."""
    found = {}
    for parameter in context.command.params:
        longest = max(parameter.opts, key=len)
        name = longest.removeprefix("--") if longest.startswith("--") else str(parameter.name)
        if name not in ("help", "settings"):
            found[name] = parameter
    return found


def _plain(name: str, parameter: Any, value: Any) -> Any:
    """Return a value as the command line would give it, so that it is checked the same."""
    many = getattr(parameter, "multiple", False) or parameter.nargs == -1
    if many:
        if not isinstance(value, list):
            raise ConfigError(f"{name} must be a list, got {value!r}.")
        return [_plain(name, _One, part) for part in value]
    if getattr(parameter, "is_flag", False) != isinstance(value, bool):
        kind = "not true or false" if isinstance(value, bool) else "true or false"
        raise ConfigError(f"{name} must be {kind}, got {value!r}.")
    if isinstance(value, bool):
        return value
    if not isinstance(value, str | int | float):
        raise ConfigError(f"{name} must be one value, got {value!r}.")
    return str(value)


class _One:
    """Stands for one value of an option that takes several."""

    is_flag = multiple = False
    nargs = 1


def given(context: typer.Context) -> dict[str, Any]:
    """Return name to plain value of all that a command was given, defaults included.

    What is of one run alone, such as ``out``, is left out, and so is what has no value.

    Args:
        context: The command.
    """
    found = {}
    for name, parameter in _options(context).items():
        value = context.params.get(str(parameter.name))
        if name not in _NOT_KEPT and value is not None and value != [] and value != ():
            found[name] = _without_types(value)
    return found


def _without_types(value: Any) -> Any:
    """Return an option's value as JSON and TOML know it."""
    if isinstance(value, list | tuple):
        return [_without_types(part) for part in value]
    if isinstance(value, Enum):
        return value.value
    return value if isinstance(value, bool | int | float) else str(value)


def _keep(context: typer.Context, file: Path) -> None:
    """Write what a command was given, defaults included."""
    from solpath import __version__
    from solpath.files import write_file

    lines = [f"# solpath {context.info_name} --settings FILE --out FOLDER; solpath {__version__}"]
    lines += [f"{name} = {_toml(value)}" for name, value in given(context).items()]
    write_file(file, ("\n".join(lines) + "\n").encode())


def _toml(value: Any) -> str:
    """Return a plain value in TOML."""
    if isinstance(value, list):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, bool | int | float):
        return json.dumps(value)
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
