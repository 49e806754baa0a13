"""Commands that order the units of a model and cut it."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from solpath.cli.app import app
from solpath.cli.arguments import (
    Data,
    Json,
    Loss,
    ModelName,
    PathFolder,
    Placement,
    Precision,
    Samples,
    SmallName,
    StateFolder,
    Tokens,
    seed_option,
    takes_budget,
    takes_constraints,
    takes_data,
    takes_placement,
)
from solpath.cli.inputs import (
    check_not_swapped,
    device_for,
    load_any,
    load_dense,
    load_float32,
    loss_of,
    path_of,
    result_of,
    table_of,
)
from solpath.cli.state import keeping_state
from solpath.cli.terminal import print_json, print_table, say, say_next
from solpath.errors import BudgetError, ConfigError, FileError
from solpath.holding import DENSE, PATH, SEARCH_STATE

if TYPE_CHECKING:
    from solpath.planning.path import SolutionPath
    from solpath.planning.plan import Plan


@app.command()
@takes_data
@takes_placement
def search(
    context: typer.Context,
    model: ModelName,
    out: Annotated[Path, typer.Option(help="Folder for the path, new or empty.")],
    data: Data,
    place: Placement,
    steps: Annotated[int | None, typer.Option(help="Steps of the search; default 200.")] = None,
    seed: Annotated[int, seed_option("Same seed, same path.")] = 0,
    method: Annotated[
        str, typer.Option(help="spp, paper, or a baseline: random, magnitude, taylor, ...")
    ] = "spp",
    basis: Annotated[
        str, typer.Option(help="coordinate, or principal to turn attention first (spp only).")
    ] = "coordinate",
    compensated: Annotated[
        bool, typer.Option("--compensated", help="Order units for members that are compensated.")
    ] = False,
    loss: Loss = None,
    micro_batch: Annotated[
        int | None, typer.Option(help="Samples of a batch that run at once; saves memory.", min=1)
    ] = None,
    checkpoint: StateFolder = None,
    as_json: Json = False,
) -> None:
    """Put all units of a model in order, once. Stopped, the same command goes on from there."""
    from solpath import baselines
    from solpath.cli.batches import batches_for
    from solpath.config import InclusionConfig, SearchConfig
    from solpath.files import check_output
    from solpath.model.basis import obstacle
    from solpath.running.checkpoint import checkpoint_file
    from solpath.searching.search import search as search_path

    searches = ("spp", "paper")
    if method not in searches and method not in baselines.METHODS:
        names = ", ".join([*searches, *baselines.METHODS])
        raise ConfigError(f"method must be one of {names}; got {method!r}.")
    if method != "spp" and (basis != "coordinate" or compensated):
        raise ConfigError(f"basis and compensated are settings of the method spp, not of {method}.")
    if method == "released" and loss is None:
        raise ConfigError("the method released needs --loss; see solpath.baselines.released.")
    if method not in searches and (steps, checkpoint, micro_batch) != (None, None, None):
        raise ConfigError(
            f"steps, checkpoint and micro-batch are of the methods spp and paper, not of {method}."
        )
    length: dict[str, Any] = {} if steps is None else {"steps": steps}
    config: SearchConfig | InclusionConfig = SearchConfig(
        **length, seed=seed, basis=basis, compensated=compensated
    )
    if method == "paper":
        config = InclusionConfig(**length, seed=seed)
    check_output(out)
    checkpoint_file(checkpoint, SEARCH_STATE)
    own, device = loss_of(loss), device_for(place)
    loaded = load_dense(model, place)
    labels = None if own is not None else False
    batches = batches_for(model, loaded, data, seed, labels=labels, device=device).batches
    if method in searches:
        with keeping_state(context, out, checkpoint, batches) as state:
            path = search_path(
                loaded,
                batches,
                config,
                loss=own,
                checkpoint=state,
                micro_batch=micro_batch,
                progress=not as_json,
            )
            path.save(out)
    else:
        path = baselines.METHODS[method](loaded, batches, seed=seed, loss=own)
        path.save(out)
    if as_json:
        units = sum(pair.units for pair in path.pairs)
        return print_json(
            {"out": str(out), "method": path.method, "units": units, "config": dict(path.config)}
        )
    print(f"{path!r}\nwritten to {out}")
    if basis == "principal":
        fixed = Counter(obstacle(loaded, pair) for pair in path.pairs)
        for reason, count in fixed.items():
            if reason is not None:
                print(f"{count} of {len(path.pairs)} pairs keep their axes: {reason}")
    say_next("extract", model, out, "--sparsity", "0.3", "--out", "small")
    say_next("family", model, out, "--data", "OTHER_DATA", "--out", "family", first="Or all sizes")


@app.command()
@takes_budget
@takes_constraints
def plan(
    path: PathFolder,
    budget: tuple[str, float],
    constraints: dict[str, Any],
    latency: Annotated[
        Path | None, typer.Option(help="File of measured latencies that extract wrote.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show what a budget means for a path, without making a model."""
    from solpath.planning.budget import Budget

    table = None if latency is None else table_of(latency)
    made = path_of(path).plan(Budget(*budget, table), **constraints)
    if as_json:
        return print_json(made.to_dict())
    rows = [
        (p.name, f"{p.heads} × {p.width}", " × ".join(map(str, made.kept[p.name].shape)),
         f"{made.kept[p.name].numel() / p.units:.0%}")
        for p in made.pairs
    ]  # fmt: skip
    print_table(("pair", "dense", "kept", "share"), rows)
    print(repr(made))


@app.command()
@takes_budget
@takes_constraints
@takes_placement
def extract(
    model: ModelName,
    path: PathFolder,
    out: Annotated[Path, typer.Option(help="Folder for the smaller model, new or empty.")],
    budget: tuple[str, float],
    constraints: dict[str, Any],
    place: Placement,
    latency: Annotated[
        Path | None,
        typer.Option(help="File of measured latencies: read, or measured and written first."),
    ] = None,
    samples: Samples = 8,
    tokens: Tokens = 128,
    as_json: Json = False,
) -> None:
    """Cut a model to a budget and save it. Latency is measured here, and verified."""
    from solpath.cli.batches import random_tokens
    from solpath.files import check_output
    from solpath.planning.budget import Budget
    from solpath.pretrained import check_name, load_processor, quiet_transformers
    from solpath.storing.streaming import extract as cut
    from solpath.storing.writing import save

    quiet_transformers()
    check_output(out)
    check_not_swapped(model, path, DENSE, PATH)
    found, (measure, value) = path_of(path), budget
    check_name(model)
    if measure != "latency_ms":
        if latency is not None:
            raise BudgetError("--latency is for --latency-ms.")
        made = found.plan(Budget(measure, value), **constraints)
    else:
        loaded = load_any(model, place)
        batch = random_tokens(loaded, samples, tokens)
        made = _plan_for_latency(loaded, found, batch, value, latency, constraints)
        del loaded
    try:
        processor = load_processor(model)
    except FileError as error:
        say(f"no tokenizer or image processor is saved with it: {error}")
        processor = None
    if place.dtype is Precision.AUTO and place.attention is None:
        cut(model, made, out=out, tokenizer=processor)
    else:
        save(cut(load_any(model, place), made), out, tokenizer=processor)
    if as_json:
        summary = made.to_dict()
        found_ms = {"latency_ms": summary["latency_ms"]} if made.latency_ms else {}
        asked = {"out": str(out), "asked": summary["asked"]}
        return print_json({**asked, **summary["achieved"], **found_ms})
    print(f"{made!r}\nwritten to {out}")
    say_next("compensate", out, model, "--data", "DATA", "--out", "better")


@app.command()
def export(
    small: SmallName,
    out: Annotated[Path, typer.Option(help="Folder for the result, new or empty.")],
    format: Annotated[str, typer.Option(help="stock, hub, onnx, openvino or gguf.")],
    quantization: Annotated[
        str | None, typer.Option(help="gguf: f32, f16, q8_0 or q4_0; default f16.")
    ] = None,
    int8: Annotated[bool, typer.Option("--int8", help="onnx: a second file in int8.")] = False,
    pad: Annotated[
        bool, typer.Option("--pad", help="stock: zeros up to the widest layer where it must be.")
    ] = False,
    multiple_of: Annotated[
        int | None, typer.Option(help="hub: heads are padded to a multiple of this; default 8.")
    ] = None,
    evaluation: Annotated[
        Path | None, typer.Option(help="What solpath eval --json printed of it, for the card.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write a smaller model for another runtime, and run it there before it is done."""
    from solpath.exporting.export import export as write
    from solpath.exporting.export import options_of
    from solpath.exporting.facts import check_evaluation
    from solpath.pretrained import load_processor, quiet_transformers

    quiet_transformers()
    given: dict[str, Any] = {"quantization": quantization, "multiple_of": multiple_of}
    given |= {"int8": int8 or None, "pad": pad or None}
    options = {name: value for name, value in given.items() if value is not None}
    found = None if evaluation is None else result_of(evaluation)
    known = options_of(format)
    model, stored = load_float32(small)
    if stored and "quantization" not in known:
        say(f"weights in {' and '.join(stored)} are written in float32.")
    if "tokenizer" in known:
        try:
            options["tokenizer"] = load_processor(small)
        except FileError as error:
            say(f"no tokenizer or image processor is saved with it: {error}")
    try:
        check_evaluation(model, found)
    except ConfigError as error:
        raise ConfigError(f"--evaluation {evaluation}: {error}") from error
    made = write(model, out, format, evaluation=found, **options)
    if as_json:
        parity = [asdict(row) for row in made.parity]
        written = {"out": str(out), "format": format, "bytes": made.bytes, "parity": parity}
        return print_json({**written, "command": made.command})
    rows = [(row.inputs, row.output, f"{row.difference:.1e}") for row in made.parity]
    print_table(("inputs", "output", "difference"), rows)
    print(f"{made.bytes / 1e6:.1f} MB written to {out}; to run it: {made.command}")


def _plan_for_latency(
    model: Any,
    path: "SolutionPath",
    batch: Any,
    latency_ms: float,
    file: Path | None,
    constraints: Mapping[str, Any],
) -> "Plan":
    """Read the table, or measure it and write it if a file is given; then plan and verify."""
    from solpath.files import check_new_file
    from solpath.measuring.latency import check_request, measure_latency, plan_for_latency

    check_request(model, path, batch, latency_ms, **constraints)
    if file is not None and file.exists():
        table = table_of(file)
    else:
        if file is not None:
            check_new_file(file)
        say("measuring shapes; keep the machine quiet")
        table = measure_latency(model, batch)
        if file is not None:
            table.save(file)
    return plan_for_latency(model, path, batch, latency_ms, latency=table, **constraints)
