"""Commands that make families of models and show them, and the demo."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from solpath.cli.app import app
from solpath.cli.arguments import (
    Data,
    For,
    Json,
    Loss,
    ModelName,
    PathFolder,
    Placement,
    Task,
    TaskName,
    seed_option,
    takes_data,
    takes_placement,
)
from solpath.cli.inputs import (
    check_not_swapped,
    device_for,
    load_any,
    loss_of,
    numbers,
    path_of,
    searched_on,
)
from solpath.cli.terminal import print_json, print_table, say, say_next
from solpath.errors import ConfigError
from solpath.holding import DENSE, PATH

if TYPE_CHECKING:
    from solpath.reporting.family import Family


@app.command()
def demo(
    context: typer.Context,
    quick: Annotated[bool, typer.Option("--quick", help="Less of everything.")] = False,
    rivals: Annotated[
        bool, typer.Option("--rivals", help="Compare with slower methods, too.")
    ] = False,
    out: Annotated[Path, typer.Option(help="Folder to write, new or empty.")] = Path("out"),
    model: Annotated[
        str | None, typer.Option(help="Folder or hub id; default: the installed MiniLM.")
    ] = None,
    seed: Annotated[int, seed_option("Seed of the search.")] = 0,
    steps: Annotated[
        int | None, typer.Option(help="Steps of the search; default 200, quick 40.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Make a family of smaller models of a real one, measure, report, compare."""
    from solpath.reporting.demo import CHECKPOINT, run_demo

    context.obj.checkpoint = out / CHECKPOINT
    family = run_demo(
        out,
        quick=quick,
        rivals=rivals,
        model=model,
        seed=seed,
        steps=steps,
        progress=not as_json,
        say=say,
    )
    if as_json:
        return print_json(family.to_dict())
    _print_family(family)
    stages = family.stages or ()
    say(f"took {sum(s.seconds for s in stages):.0f} s; report: {out / 'report.html'}")


def _print_family(family: "Family") -> None:
    """Print what every member costs and how good it is."""
    from solpath.reporting.scores import shown

    main = shown(family.metrics)
    rows = [
        (m.name, f"{m.params:,}", f"{m.macs_share:.0%}", f"{m.latency_ms:.1f} ms",
         *(f"{m.metrics[one.key]:.4g}" for one in main))
        for m in family.members
    ]  # fmt: skip
    print_table(("model", "parameters", "MACs", "latency", *(one.key for one in main)), rows)


@app.command()
@takes_data
@takes_placement
def family(
    model: ModelName,
    path: PathFolder,
    out: Annotated[Path, typer.Option(help="Folder to write, new or empty.")],
    data: Data,
    place: Placement,
    sizes: Annotated[str, typer.Option(help="Sparsity of every member.")] = "0.2,0.4,0.6",
    compensate: Annotated[
        bool,
        typer.Option(
            "--compensate", help="Refit members on other batches of the data, at most 128."
        ),
    ] = False,
    task: TaskName = None,
    loss: Loss = None,
    for_: For = None,
    seed: Annotated[int, seed_option("Seed of the order of the samples.")] = 0,
    as_json: Json = False,
) -> None:
    """Cut a path at some sizes, judge and time every member, and write a report to choose by."""
    from solpath.cli.scores import scorer
    from solpath.cli.splits import FITTED, split_batches
    from solpath.files import check_output
    from solpath.pretrained import load_processor
    from solpath.reporting.making import make_family

    check_output(out)
    check_not_swapped(model, path, DENSE, PATH)
    own, device, order = loss_of(loss), device_for(place), path_of(path)
    dense = load_any(model, place)
    split = split_batches(
        model,
        dense,
        replace(data, batches=data.batches or FITTED),
        seed,
        labels=True if task == Task.CLASSIFICATION else None if own is not None else False,
        pack=False if task == Task.RETRIEVAL else None,
        device=device,
    )
    if searched_on(path, data):
        say(f"{path} was searched on this data, too; judge by other data to be sure.")
    length = data.length or (128 if data.named else 32)
    found = make_family(
        dense,
        order,
        split.heldout,
        out,
        sizes=numbers(sizes),
        compensate_on=split.batches if compensate else None,
        task=None
        if task is None
        else scorer(task, dense, split.heldout, split.pairs, model, length),
        loss=own,
        for_=for_,
        tokenizer=load_processor(model),
        name=model,
        progress=not as_json,
    )
    if as_json:
        return print_json(found.to_dict())
    _print_family(found)
    print(f"members are in {out / 'models'}; open {out / 'report.html'}")
    say_next("choose", model, path, "--data", "NEW_DATA", "--max-loss", "0.02")


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="Folder with family.json and path/.")],
    prompts: Annotated[
        Path | None, typer.Option(help="File with one prompt per line; needs --dense.")
    ] = None,
    dense: Annotated[
        str | None, typer.Option(help="Folder or hub id of the dense model, to go on with prompts.")
    ] = None,
    choice: Annotated[
        Path | None, typer.Option(help="What choose --out wrote, to mark the size and its promise.")
    ] = None,
    beside: Annotated[
        Path | None, typer.Option(help="Folder of another path of the model, to compare with.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Build report.html again from family.json and path/, with more in it."""
    from solpath.reporting.family import Family
    from solpath.reporting.promise import read_promise
    from solpath.reporting.report import write_report

    if (prompts is None) != (dense is None):
        raise ConfigError("give --prompts and --dense together, or neither of them.")
    if prompts is not None and dense is not None:
        _go_on(folder, prompts, dense)
    if choice is not None:
        promise = read_promise(choice, path_of(folder / "path"))
        replace(Family.read(folder), promise=promise).write(folder)
    file = write_report(folder, beside=beside)
    if as_json:
        return print_json({"report": str(file), "bytes": file.stat().st_size})
    print(f"written to {file}")


def _go_on(folder: Path, prompts: Path, dense: str) -> None:
    """Add what the dense model and the members of a family write after prompts to family.json."""
    from solpath.data.batches import Broken
    from solpath.data.text import read_lines
    from solpath.pretrained import load_processor
    from solpath.reporting.continuations import continuations
    from solpath.reporting.family import Family

    family = Family.read(folder)
    place = Placement()
    models = {"dense": load_any(dense, place)}
    models |= {m.name: load_any(str(folder / m.folder), place) for m in family.members if m.folder}
    lines = read_lines(prompts, Broken("raise"))
    found = continuations(models, load_processor(dense), lines)
    replace(family, continuations=found).write(folder)
