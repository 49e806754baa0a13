"""Arguments that several commands share."""

import functools
import inspect
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from solpath.errors import BudgetError

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


ModelName = Annotated[
    str, typer.Argument(help="Folder or hub id of a dense model, or a GGUF file.")
]
Dtype = Annotated[
    Precision,
    typer.Option("--dtype", help="Dtype of the weights; auto: as stored, GGUF as float32."),
]
SmallName = Annotated[str, typer.Argument(help="Folder of an extracted model.")]
PathFolder = Annotated[Path, typer.Argument(help="Folder of a path, written by search.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]
MultipleOf = Annotated[int, typer.Option(help="Units every head keeps are a multiple of this.")]
MinWidth = Annotated[int, typer.Option(help="Units every head keeps at least.")]
Protect = Annotated[
    list[str] | None, typer.Option(help="Pairs that stay dense, e.g. '*layer.0.*'; repeatable.")
]
Samples = Annotated[int, typer.Option(help="Texts in the batch that is timed.", min=1)]
Tokens = Annotated[int, typer.Option(help="Tokens per text in that batch.", min=1)]
Text = Annotated[
    Path | None, typer.Option(help="File with one text per line; default: installed docstrings.")
]
Images = Annotated[
    Path | None, typer.Option(help="Folder of images, for a model that takes images.")
]

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

    parameters: list[inspect.Parameter] = []
    for parameter in inspect.signature(command).parameters.values():
        if parameter.name == "budget":
            parameters += [
                parameter.replace(name=name, default=None, annotation=_budget_option(help))
                for name, help in BUDGETS.items()
            ]
        else:
            parameters.append(parameter)
    changed: Any = with_options
    changed.__signature__ = inspect.Signature(parameters)
    changed.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return with_options


def _budget_option(help: str) -> Any:
    return Annotated[float | None, typer.Option(help=help)]


def plan_options(multiple_of: int, min_width: int, protect: list[str] | None) -> dict[str, Any]:
    """Return the arguments of `SolutionPath.plan` besides the budget."""
    return {"multiple_of": multiple_of, "min_width": min_width, "protect": protect or ()}
