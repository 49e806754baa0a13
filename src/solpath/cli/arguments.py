"""Arguments that several commands of the command line share."""

from pathlib import Path
from typing import Annotated, Any

import typer

from solpath.errors import BudgetError

ModelName = Annotated[str, typer.Argument(help="Folder or hub id of a dense model.")]
PathFolder = Annotated[Path, typer.Argument(help="Folder of a path, written by search.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]
Sparsity = Annotated[
    float | None, typer.Option(help="Share of the prunable parameters to remove, in [0, 1).")
]
Params = Annotated[
    float | None, typer.Option(help="Parameters to keep: a share in (0, 1], or a count.")
]
Bytes = Annotated[float | None, typer.Option(help="Bytes of the weights to keep, likewise.")]
Macs = Annotated[float | None, typer.Option(help="Multiply-accumulates to keep, likewise.")]
Cache = Annotated[
    float | None, typer.Option(help="Bytes of the key-value cache per token to keep, likewise.")
]
LatencyMs = Annotated[
    float | None, typer.Option(help="Milliseconds that a forward pass of one batch may take.")
]
MultipleOf = Annotated[int, typer.Option(help="Units every head keeps are a multiple of this.")]
MinWidth = Annotated[int, typer.Option(help="Units every head keeps at least.")]
Protect = Annotated[
    list[str] | None, typer.Option(help="Pairs that stay dense, e.g. '*layer.0.*'; repeatable.")
]
Samples = Annotated[int, typer.Option(help="Texts in the batch that is timed.", min=1)]
Tokens = Annotated[int, typer.Option(help="Tokens per text in it.", min=1)]
Text = Annotated[
    Path | None, typer.Option(help="File with one text per line; default: installed docstrings.")
]
Images = Annotated[
    Path | None, typer.Option(help="Folder of images, for a model that takes images.")
]


def budget_of(
    sparsity: float | None,
    params: float | None,
    bytes: float | None,
    macs: float | None,
    cache: float | None,
    latency_ms: float | None,
) -> dict[str, Any]:
    """The one budget that is given, by name. Raises `BudgetError` for none, or several."""
    budgets = {"sparsity": sparsity, "params": params, "bytes": bytes, "macs": macs}
    budgets |= {"cache": cache, "latency_ms": latency_ms}
    given = {name: value for name, value in budgets.items() if value is not None}
    if len(given) != 1:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in budgets)
        raise BudgetError(f"give exactly one of {names}.")
    return given


def plan_options(multiple_of: int, min_width: int, protect: list[str] | None) -> dict[str, Any]:
    """What `SolutionPath.plan` takes beside a budget."""
    return {"multiple_of": multiple_of, "min_width": min_width, "protect": protect or ()}
