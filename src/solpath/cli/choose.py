"""The command that finds the smallest size whose loss is bounded."""

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from solpath.cli.app import app
from solpath.cli.arguments import (
    Dtype,
    Images,
    Json,
    ModelName,
    PathFolder,
    Precision,
    Text,
    takes_constraints,
)
from solpath.cli.inputs import batches_for, load_any, path_of, rows_of, takes
from solpath.cli.terminal import print_json
from solpath.errors import ConfigError


@app.command()
@takes_constraints
def choose(
    model: ModelName,
    path: PathFolder,
    max_loss: Annotated[float, typer.Option(help="Largest expected loss of a sample.")],
    constraints: dict[str, Any],
    confidence: Annotated[float, typer.Option(help="Probability that the promise holds.")] = 0.95,
    metric: Annotated[
        str | None, typer.Option(help="divergence, or accuracy where data has labels.")
    ] = None,
    clip: Annotated[float, typer.Option(help="Largest divergence of a sample.")] = 1.0,
    sizes: Annotated[
        str | None, typer.Option(help="Sparsities to test, as in 0.1,0.2; default 0.05 to 0.7.")
    ] = None,
    text: Text = None,
    images: Images = None,
    dtype: Dtype = Precision.AUTO,
    out: Annotated[Path | None, typer.Option(help="JSON file to write the choice to.")] = None,
    as_json: Json = False,
) -> None:
    """Find the smallest size whose loss on held-out data is bounded, with confidence."""
    from solpath.choosing.choose import SIZES
    from solpath.choosing.choose import choose as find
    from solpath.data.docstrings import read_corpus, texts_of
    from solpath.files import write_file
    from solpath.pretrained import load_processor

    grid = SIZES if sizes is None else _numbers(sizes)
    dense = load_any(model, dtype)
    if text is None and images is None and takes(dense) == {"text"}:
        held = texts_of(read_corpus(search=0, calibration=0).test)
        batches = rows_of(dense, load_processor(model), held)
    else:
        batches = batches_for(model, dense, text, images, 0)
    found = find(
        dense,
        path_of(path),
        batches,
        max_loss,
        metric=metric,
        confidence=confidence,
        clip=clip,
        sizes=grid,
        progress=not as_json,
        **constraints,
    )
    if out is not None:
        write_file(out, (json.dumps(found.to_dict(), indent=1, allow_nan=False) + "\n").encode())
    if as_json:
        return print_json(found.to_dict())
    print(found)
    print("This holds if:", *(f"- {text}" for text in found.assumptions), sep="\n")
    if found.plan is None:
        return print("next: a larger --max-loss, more samples, or smaller --sizes")
    line = ["solpath", "extract", model, str(path), "--sparsity", f"{found.sparsity:g}"]
    line += _options(constraints)
    line += [] if dtype is Precision.AUTO else ["--dtype", dtype.value]
    print(f"next: {shlex.join([*line, '--out', 'small'])}")


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise ConfigError(f"--sizes are numbers, as in 0.1,0.2,0.3; got {text!r}.") from error


def _options(constraints: Mapping[str, Any]) -> list[str]:
    """Return the options of the command line that constraints were read from."""
    words: list[str] = []
    for name, value in constraints.items():
        option = f"--{name.strip('_').replace('_', '-')}"
        if name == "protect":
            words += [word for pattern in value for word in (option, pattern)]
        elif name == "uniform" and value:
            words += [option, "all" if value is True else ",".join(value)]
        elif isinstance(value, Mapping):
            words += [option, ",".join(f"{kind}={number}" for kind, number in value.items())]
        elif value is True:
            words.append(option)
        elif value not in (None, False) and value != {"multiple_of": 1, "min_width": 0}.get(name):
            words += [option, str(value)]
    return words
