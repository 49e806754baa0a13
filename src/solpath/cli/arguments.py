"""Arguments that several commands share."""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from solpath.config import LARGEST_SEED
from solpath.errors import BudgetError, ConfigError

if TYPE_CHECKING:
    import torch


class Precision(StrEnum):
    """Dtypes that models are loaded in."""

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"

    @property
    def dtype(self) -> "torch.dtype | None":
        """The dtype for `from_pretrained`; None keeps that of the checkpoint."""
        import torch

        return None if self is Precision.AUTO else getattr(torch, self.value)


class Attention(StrEnum):
    """Implementations of attention in transformers."""

    EAGER = "eager"
    SDPA = "sdpa"
    FLASH = "flash_attention_2"


class Task(StrEnum):
    """Tasks that models are scored at."""

    CLASSIFICATION = "classification"
    LANGUAGE_MODELING = "language-modeling"
    RETRIEVAL = "retrieval"


@dataclass(frozen=True)
class Placement:
    """Where and how models run.

    Attributes:
        device: A device of torch; ``"auto"`` is the first GPU, or the CPU if there is none.
        dtype: The dtype of the weights.
        attention: The implementation of attention; None keeps that of transformers.
    """

    device: str = "cpu"
    dtype: Precision = Precision.AUTO
    attention: Attention | None = None

    @property
    def words(self) -> list[str]:
        """The options that are not left at their defaults, as they are typed."""
        found = {name: getattr(self, name) for name in PLACEMENT}
        return _words({n: v for n, v in found.items() if v != PLACEMENT[n][1]})


@dataclass(frozen=True)
class Data:
    """The data that a command reads, as its options say; see `DATA`."""

    text: Path | None = None
    images: Path | None = None
    data: Sequence[str] | None = None
    config: Sequence[str] | None = None
    split: Sequence[str] | None = None
    column: Sequence[str] | None = None
    limit: int | None = None
    batch_size: int | None = None
    length: int | None = None
    batches: int | None = None

    @property
    def named(self) -> bool:
        """Whether the user named any data."""
        return bool(self.text or self.images or self.data)

    @property
    def words_for_others(self) -> list[str]:
        """The options for other data that is read the same way, as they are typed."""
        named = {n: "OTHER_DATA" for n in ("text", "images", "data") if getattr(self, n)}
        read = {n: getattr(self, n) for n in ("column", "batch_size", "length")}
        return _words(named | {n: v for n, v in read.items() if v})


def _words(options: Mapping[str, Any]) -> list[str]:
    """Return options and their values as they are typed."""
    found: list[str] = []
    for name, value in options.items():
        for one in value if isinstance(value, list) else [value]:
            found += [f"--{name.replace('_', '-')}", str(one)]
    return found


ModelName = Annotated[
    str, typer.Argument(help="Folder or hub id of a dense model, or a GGUF file.")
]
SmallName = Annotated[str, typer.Argument(help="Folder of an extracted model.")]
PathFolder = Annotated[Path, typer.Argument(help="Folder of a path, written by search.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]
MultipleOf = Annotated[
    str,
    typer.Option(help="Units every head keeps are a multiple of this: 8, or by kind: qk=4,mlp=32."),
]
MinWidth = Annotated[
    str, typer.Option(help="Units every head keeps at least: 1, or by kind: qk=1,mlp=32.")
]
Uniform = Annotated[
    str | None, typer.Option(help="One width in all layers: all, or some kinds, as in vo,mlp.")
]
TiedWidths = Annotated[
    bool, typer.Option("--tied-widths", help="Queries, keys and values keep as many channels.")
]
SharedCouples = Annotated[
    bool, typer.Option("--shared-couples", help="All heads keep the same rotary couples.")
]
WholeGroups = Annotated[
    bool, typer.Option("--whole-groups", help="Attentions lose whole heads, not units inside.")
]
For = Annotated[
    str | None,
    typer.Option("--for", help="Runtime to plan for: onnx, openvino, vllm, stock or gguf."),
]
Protect = Annotated[
    list[str] | None, typer.Option(help="Pairs that stay dense, e.g. '*layer.0.*'; repeatable.")
]
Samples = Annotated[int, typer.Option(help="Texts in the batch that is timed.", min=1)]
Tokens = Annotated[int, typer.Option(help="Tokens per text in that batch.", min=1)]
TaskName = Annotated[
    Task | None, typer.Option(help="Score models at a task, too, on labels or pairs of the data.")
]
StateFolder = Annotated[
    Path | None,
    typer.Option(
        "--checkpoint",
        help="Folder that keeps the state; default: OUT.unfinished until done.",
    ),
]
Loss = Annotated[
    str | None,
    typer.Option(
        help="Loss of yours, module:function of a file here; it gets the outputs and the batch."
    ),
]

PLACEMENT: dict[str, tuple[Any, Any]] = {
    "device": (
        Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...; auto: a GPU if there is one.")],
        "auto",
    ),
    "dtype": (
        Annotated[
            Precision, typer.Option(help="Dtype of the weights; auto: as stored, GGUF as float32.")
        ],
        Precision.AUTO,
    ),
    "attention": (
        Annotated[Attention | None, typer.Option(help="Attention kernel; default: the model's.")],
        None,
    ),
}
"""Field of `Placement` to its option and the default of that."""

DATA: dict[str, tuple[Any, Any]] = {
    "text": (Annotated[Path | None, typer.Option(help="File with one text per line.")], None),
    "images": (Annotated[Path | None, typer.Option(help="Folder of images.")], None),
    "data": (
        Annotated[
            list[str] | None,
            typer.Option(
                help="Data set: .jsonl, .json, .csv, .parquet or .txt file, folder, or name on the "
                "Hub; repeatable, NAME:2 counts twice as much as NAME:1. "
                "Default for text: installed docstrings, to try things out."
            ),
        ],
        None,
    ),
    "config": (
        Annotated[
            list[str] | None,
            typer.Option(help="Configuration of the data set; once, or once per --data."),
        ],
        None,
    ),
    "split": (
        Annotated[
            list[str] | None, typer.Option(help="Split of the data set; once, or once per --data.")
        ],
        None,
    ),
    "column": (
        Annotated[
            list[str] | None,
            typer.Option(
                help="Column to read, or ROLE=COLUMN with text, pair, image, label or, to choose "
                "a size, group (which rows belong together); repeatable. Default: by its name."
            ),
        ],
        None,
    ),
    "limit": (Annotated[int | None, typer.Option(help="Most rows to read.", min=1)], None),
    "batch_size": (
        Annotated[
            int | None, typer.Option(help="Samples per batch; default 16 texts, 32 images.", min=1)
        ],
        None,
    ),
    "length": (
        Annotated[int | None, typer.Option(help="Tokens per text; default 128.", min=1)],
        None,
    ),
    "batches": (Annotated[int | None, typer.Option(help="Most batches to use.", min=1)], None),
}
"""Field of `Data` to its option and the default of that."""

BUDGETS = {
    "sparsity": "Share of the prunable parameters to remove, in [0, 1).",
    "params": "Parameters to keep: a share in (0, 1], or a count.",
    "bytes": "Bytes of the weights to keep: a share in (0, 1], or a count.",
    "macs": "Multiply-accumulates to keep: a share in (0, 1], or a count.",
    "cache": "Bytes of the key-value cache per token to keep: a share in (0, 1], or a count.",
    "latency_ms": "Milliseconds that a forward pass of one batch may take.",
}
"""Measure to the help of its option. Every measure of a budget has one option."""


def takes_budget(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command one option for each of `BUDGETS`.

    Args:
        command: The command. Its argument ``budget`` becomes these options, and gets the name and
            the value of the one that was given.

    Raises:
        BudgetError: None or several of the options are given. This is raised when the command runs.
    """

    @functools.wraps(command)
    def with_options(**given: Any) -> None:
        values = {name: given.pop(name) for name in BUDGETS}
        found = [(name, value) for name, value in values.items() if value is not None]
        if len(found) != 1:
            names = ", ".join(f"--{name.replace('_', '-')}" for name in BUDGETS)
            raise BudgetError(f"give exactly one of {names}.")
        command(**given, budget=found[0])

    options = {name: (_budget_option(help), None) for name, help in BUDGETS.items()}
    return _with_parameters(command, with_options, "budget", options)


def takes_data(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command one option for each of `DATA`; its argument ``data`` gets a `Data`."""
    return _takes(command, "data", DATA, Data)


def takes_placement(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command one option for each of `PLACEMENT`; ``place`` gets a `Placement`."""
    return _takes(command, "place", PLACEMENT, Placement)


def _takes(
    command: Callable[..., None],
    name: str,
    options: Mapping[str, tuple[Any, Any]],
    kind: Callable[..., Any],
) -> Callable[..., None]:
    @functools.wraps(command)
    def with_options(**given: Any) -> None:
        made = kind(**{option: given.pop(option) for option in options})
        command(**given, **{name: made})

    return _with_parameters(command, with_options, name, options)


def _with_parameters(
    command: Callable[..., None],
    wrapper: Callable[..., None],
    name: str,
    options: Mapping[str, tuple[Any, Any]],
) -> Callable[..., None]:
    """Let the signature of a wrapper be that of its command, with options in place of one argument.

    Args:
        command: The command.
        wrapper: The function that typer calls.
        name: The argument of the command.
        options: Name of every option to its annotation and default.
    """
    parameters: list[inspect.Parameter] = []
    for parameter in inspect.signature(command).parameters.values():
        if parameter.name == name:
            parameters += [
                parameter.replace(name=option, default=default, annotation=annotation)
                for option, (annotation, default) in options.items()
            ]
        else:
            parameters.append(parameter)
    changed: Any = wrapper
    changed.__signature__ = inspect.Signature(parameters)
    changed.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return wrapper


def _budget_option(help: str) -> Any:
    return Annotated[float | None, typer.Option(help=help)]


def seed_option(help: str) -> Any:
    """Return the option of a seed.

    Args:
        help: What it seeds.
    """
    return typer.Option(help=help, min=0, max=LARGEST_SEED)


def takes_constraints(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command one option for each of `CONSTRAINTS`.

    Args:
        command: The command. Its argument ``constraints`` becomes these options, and gets the
            arguments of `SolutionPath.plan` besides the budget.

    Raises:
        ConfigError: An option cannot be read. This is raised when the command runs.
    """

    @functools.wraps(command)
    def with_options(**given: Any) -> None:
        values = {name: given.pop(name) for name in CONSTRAINTS}
        command(**given, constraints=_plan_options(values))

    return _with_parameters(command, with_options, "constraints", CONSTRAINTS)


def _plan_options(values: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of `SolutionPath.plan` that the options stand for."""
    uniform = values["uniform"]
    kinds = True if uniform == "all" else (uniform or "").split(",") if uniform else False
    return values | {
        "multiple_of": _per_kind("--multiple-of", values["multiple_of"]),
        "min_width": _per_kind("--min-width", values["min_width"]),
        "protect": values["protect"] or (),
        "uniform": kinds,
    }


def _per_kind(option: str, text: str) -> int | dict[str, int]:
    """Read ``"8"`` as a number and ``"qk=4,mlp=32"`` as kind to number."""
    try:
        if "=" not in text:
            return int(text)
        found = [(kind, int(number)) for kind, number in (p.split("=") for p in text.split(","))]
    except ValueError as error:
        raise ConfigError(f"{option} is a number, or as in qk=4,mlp=32; got {text!r}.") from error
    if len(dict(found)) < len(found):
        raise ConfigError(f"{option} gives a kind twice: {text}.")
    return dict(found)


CONSTRAINTS: dict[str, tuple[Any, Any]] = {
    "multiple_of": (MultipleOf, "1"),
    "min_width": (MinWidth, "0"),
    "protect": (Protect, None),
    "uniform": (Uniform, None),
    "tied_widths": (TiedWidths, False),
    "shared_couples": (SharedCouples, False),
    "whole_groups": (WholeGroups, False),
    "for_": (For, None),
}
"""Argument of `SolutionPath.plan` to its option and the default of that."""
