"""The command that finds the smallest size whose loss is bounded."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from solpath.cli.app import app
from solpath.cli.arguments import (
    Data,
    Json,
    ModelName,
    PathFolder,
    Placement,
    takes_constraints,
    takes_data,
    takes_placement,
)
from solpath.cli.inputs import (
    check_not_swapped,
    device_for,
    load_any,
    numbers,
    path_of,
    searched_on,
)
from solpath.cli.terminal import print_json, say, say_next
from solpath.cli.wording import as_typed
from solpath.holding import DENSE, PATH


@app.command()
@takes_constraints
@takes_data
@takes_placement
def choose(
    model: ModelName,
    path: PathFolder,
    max_loss: Annotated[
        float, typer.Option(help="Largest expected loss; 0.01 of the accuracy is one point.")
    ],
    constraints: dict[str, Any],
    data: Data,
    place: Placement,
    confidence: Annotated[float, typer.Option(help="Probability that the promise holds.")] = 0.95,
    metric: Annotated[
        str | None,
        typer.Option(help="divergence, or accuracy on labels of the data; default divergence."),
    ] = None,
    clip: Annotated[float, typer.Option(help="Largest divergence of a sample.")] = 1.0,
    compensate: Annotated[
        bool, typer.Option("--compensate", help="Refit members, on half of the data at most.")
    ] = False,
    sizes: Annotated[
        str | None, typer.Option(help="Sparsities to test, as in 0.1,0.2; default 0.05 to 0.7.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="JSON file to write the choice to, a new one.")
    ] = None,
    save: Annotated[
        Path | None, typer.Option(help="Folder for the chosen member, new or empty.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Find the smallest size whose loss on held-out data is bounded, with confidence."""
    from solpath.choosing.choose import SIZES
    from solpath.choosing.choose import choose as find
    from solpath.cli.splits import choice_batches
    from solpath.files import check_new_file, check_output, json_bytes, write_file
    from solpath.pretrained import load_processor
    from solpath.storing.writing import save as write

    grid = SIZES if sizes is None else numbers(sizes)
    if out is not None:
        check_new_file(out)
    if save is not None:
        check_output(save)
    check_not_swapped(model, path, DENSE, PATH)
    order, device = path_of(path), device_for(place)
    dense = load_any(model, place)
    batches = choice_batches(
        model,
        dense,
        data,
        labels=metric == "accuracy",
        fit=compensate,
        device=device,
        seen=set(order.seen.tolist()),
    )
    if batches.left_out:
        say(f"data: left out {batches.left_out:,} rows that the search saw")
    doubt = ""
    if searched_on(path, data):
        where = " where it was packed or cut to another length" if len(order.seen) else ""
        doubt = (
            f"{path} was searched on this data, too, which the promise does not allow for{where}."
        )
        say(doubt)
    found = find(
        dense,
        order,
        batches.heldout,
        max_loss,
        metric=metric,
        confidence=confidence,
        clip=clip,
        sizes=grid,
        compensate=batches.batches if compensate else None,
        groups=batches.groups,
        progress=not as_json,
        **constraints,
    )
    if doubt:
        found = replace(found, assumptions=(*found.assumptions, f"Against this speaks: {doubt}"))
    if out is not None:
        write_file(out, json_bytes(found.to_dict()))
    if save is not None and found.plan is not None:
        write(found.model, save, tokenizer=load_processor(model))
    if as_json:
        return print_json(found.to_dict())
    print(found)
    print("This holds if:", *(f"- {as_typed(text)}" for text in found.assumptions), sep="\n")
    if found.plan is None:
        return print("Next: a larger --max-loss, more samples, or smaller --sizes")
    if save is not None:
        print(f"written to {save}")
        return say_next("export", save, "--format", "onnx", "--out", "exported")
    if compensate:
        return print(
            "Next: the same command with --save FOLDER, for this member as it was refitted"
        )
    size = ["--sparsity", f"{found.sparsity:g}", *_options(constraints)]
    say_next("extract", model, path, *size, *place.words, "--out", "small")


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
