"""The command line. Each command is a thin layer over the functions of the package.

Nothing heavy is imported here: torch and transformers come in when a command runs.
"""

import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from solpath.cli.arguments import (
    Bytes,
    Cache,
    Images,
    Json,
    LatencyMs,
    Macs,
    MinWidth,
    ModelName,
    MultipleOf,
    Params,
    PathFolder,
    Protect,
    Samples,
    Sparsity,
    Text,
    Tokens,
    budget_of,
    plan_options,
)
from solpath.cli.inputs import batches_for, random_tokens, rows_of, split_batches, takes
from solpath.cli.terminal import fail, print_json, print_table, say
from solpath.errors import BudgetError, ConfigError, FileError, SolpathError

if TYPE_CHECKING:
    from solpath.planning.latency_table import LatencyTable
    from solpath.planning.path import SolutionPath
    from solpath.planning.plan import Plan

app = typer.Typer(
    help="Prune a pretrained transformer once, hand it out at any size.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

# Bad arguments of any kind; typer exports only this subclass of it.
_USAGE_ERROR: Any = typer.BadParameter.__base__

_state: dict[str, Any] = {"debug": False, "checkpoint": None}


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option(help="Show the traceback of an error.")] = False,
) -> None:
    _state["debug"] = debug


@app.command()
def demo(
    quick: Annotated[bool, typer.Option("--quick", help="Less of everything.")] = False,
    out: Annotated[Path, typer.Option(help="Folder to write, new or empty.")] = Path("out"),
    model: Annotated[
        str | None, typer.Option(help="Folder or hub id; default: the installed MiniLM.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the search.")] = 0,
    steps: Annotated[int | None, typer.Option(help="Of the search; default 200, quick 40.")] = None,
    as_json: Json = False,
) -> None:
    """Make a family of smaller models of a real one, compare, measure, report."""
    from solpath.reporting.demo import CHECKPOINT, run_demo

    _state["checkpoint"] = out / CHECKPOINT
    family = run_demo(
        out, quick=quick, model=model, seed=seed, steps=steps, progress=not as_json, say=say
    )
    if as_json:
        return print_json(family)
    rows = [
        (m["name"], f"{m['params'] / 1e6:.1f} M", f"{m['macs_share']:.0%}",
         f"{m['latency_ms']:.1f} ms", f"{m['cosine']:.3f}", f"{m['retrieval']:.3f}")
        for m in family["members"]
    ]  # fmt: skip
    print_table(("model", "parameters", "MACs", "latency", "cosine", "retrieval"), rows)
    say(f"report: {out / 'report.html'}")


@app.command()
def inspect(model: ModelName, as_json: Json = False) -> None:
    """List what can be pruned in a model."""
    from solpath.model.discovery import find_pairs
    from solpath.pretrained import from_pretrained

    loaded = from_pretrained(model, device="meta")
    total = sum(parameter.numel() for parameter in loaded.parameters())
    pairs = find_pairs(loaded)
    found: list[dict[str, Any]] = [
        {
            "pair": pair.name,
            "kind": pair.kind,
            "heads": pair.heads,
            "width": pair.width,
            "cost": pair.cost,
            "share": pair.units * pair.cost / total,
        }
        for pair in pairs
    ]
    prunable = sum(pair.units * pair.cost for pair in pairs)
    if as_json:
        return print_json({"params": total, "prunable": prunable, "pairs": found})
    rows = [
        (p["pair"], f"{p['heads']} × {p['width']}", f"{p['cost']:,}", f"{p['share']:.2%}")
        for p in found
    ]
    print_table(("pair", "heads × width", "cost per unit", "share of parameters"), rows)
    print(f"{prunable:,} of {total:,} parameters are prunable ({prunable / total:.1%}).")


@app.command()
def search(
    model: ModelName,
    out: Annotated[Path, typer.Option(help="Folder for the path, new or empty.")],
    text: Text = None,
    images: Images = None,
    steps: Annotated[int | None, typer.Option(help="Of the search; default 200.")] = None,
    seed: Annotated[int, typer.Option(help="Same seed, same path.")] = 0,
    method: Annotated[
        str, typer.Option(help="spp, paper, or a baseline: random, magnitude, taylor, ...")
    ] = "spp",
    basis: Annotated[
        str, typer.Option(help="coordinate, or principal to turn attention first (spp only).")
    ] = "coordinate",
    compensated: Annotated[
        bool, typer.Option("--compensated", help="Order units for members that are compensated.")
    ] = False,
    checkpoint: Annotated[
        Path | None, typer.Option(help="Folder for the state, so that a search can go on.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Put all units of a model in order, once."""
    from solpath import baselines
    from solpath.config import InclusionConfig, SearchConfig
    from solpath.files import check_output
    from solpath.model.basis import obstacle
    from solpath.searching.search import search as search_path

    searches = ("spp", "paper")
    if method not in searches and method not in baselines.METHODS:
        names = ", ".join([*searches, *baselines.METHODS])
        raise ConfigError(f"method must be one of {names}; got {method!r}.")
    if method != "spp" and (basis != "coordinate" or compensated):
        raise ConfigError(f"basis and compensated are settings of the method spp, not of {method}.")
    if method not in searches and (steps is not None or checkpoint is not None):
        raise ConfigError(
            f"steps and checkpoint are of the methods spp and paper, not of {method}."
        )
    length: dict[str, Any] = {} if steps is None else {"steps": steps}
    config: SearchConfig | InclusionConfig = SearchConfig(
        **length, seed=seed, basis=basis, compensated=compensated
    )
    if method == "paper":
        config = InclusionConfig(**length, seed=seed)
    check_output(out)
    loaded = _load(model)
    batches = batches_for(model, loaded, text, images, seed)
    if method in searches:
        _state["checkpoint"] = checkpoint
        path = search_path(loaded, batches, config, checkpoint=checkpoint, progress=not as_json)
    else:
        path = baselines.METHODS[method](loaded, batches, seed=seed)
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


@app.command()
def plan(
    path: PathFolder,
    sparsity: Sparsity = None,
    params: Params = None,
    bytes: Bytes = None,
    macs: Macs = None,
    cache: Cache = None,
    latency_ms: LatencyMs = None,
    latency: Annotated[
        Path | None, typer.Option(help="File of measured latencies that extract wrote.")
    ] = None,
    multiple_of: MultipleOf = 1,
    min_width: MinWidth = 0,
    protect: Protect = None,
    as_json: Json = False,
) -> None:
    """Show what a budget means for a path, without making a model."""
    budget = budget_of(sparsity, params, bytes, macs, cache, latency_ms)
    if latency is not None:
        budget["latency"] = _table(latency)
    options = plan_options(multiple_of, min_width, protect)
    made = _path(path).plan(**budget, **options)
    if as_json:
        return print_json(made.to_dict())
    rows = [
        (p.name, f"{p.heads} × {p.width}", f"{p.heads} × {made.widths[p.name]}",
         f"{made.widths[p.name] / p.width:.0%}")
        for p in made.pairs
    ]  # fmt: skip
    print_table(("pair", "dense", "kept", "share"), rows)
    print(repr(made))


@app.command()
def extract(
    model: ModelName,
    path: PathFolder,
    out: Annotated[Path, typer.Option(help="Folder for the smaller model, new or empty.")],
    sparsity: Sparsity = None,
    params: Params = None,
    bytes: Bytes = None,
    macs: Macs = None,
    cache: Cache = None,
    latency_ms: LatencyMs = None,
    latency: Annotated[
        Path | None,
        typer.Option(help="File of measured latencies: read, or measured and written first."),
    ] = None,
    samples: Samples = 8,
    tokens: Tokens = 128,
    multiple_of: MultipleOf = 1,
    min_width: MinWidth = 0,
    protect: Protect = None,
    as_json: Json = False,
) -> None:
    """Cut a model to a budget and save it. Latency is measured here, and verified."""
    from solpath.files import check_output
    from solpath.model.extraction import extract as cut
    from solpath.pretrained import load_processor
    from solpath.storing.writing import save

    check_output(out)
    budget = budget_of(sparsity, params, bytes, macs, cache, latency_ms)
    options = plan_options(multiple_of, min_width, protect)
    found = _path(path)
    if latency_ms is None:
        if latency is not None:
            raise BudgetError("--latency is for --latency-ms.")
        made = found.plan(**budget, **options)
        loaded = _load(model)
    else:
        loaded = _load(model)
        batch = random_tokens(loaded, samples, tokens)
        made = _plan_for_latency(loaded, found, batch, latency_ms, latency, options)
    small = cut(loaded, made)
    try:
        processor = load_processor(model)
    except FileError as error:
        say(f"no tokenizer or image processor is saved with it: {error}")
        processor = None
    save(small, out, tokenizer=processor)
    if as_json:
        summary = made.to_dict()
        found_ms = {"latency_ms": summary["latency_ms"]} if made.latency_ms else {}
        asked = {"out": str(out), "asked": summary["asked"]}
        return print_json({**asked, **summary["achieved"], **found_ms})
    print(f"{made!r}\nwritten to {out}")


@app.command()
def tune(
    small: Annotated[str, typer.Argument(help="Folder of an extracted model.")],
    dense: ModelName,
    out: Annotated[Path, typer.Option(help="Folder for the tuned model, new or empty.")],
    text: Text = None,
    images: Images = None,
    steps: Annotated[int, typer.Option(help="Updates.")] = 500,
    lora_rank: Annotated[
        int | None, typer.Option(help="Train adapters of this rank, merged; default: all weights.")
    ] = None,
    learning_rate: Annotated[
        float | None, typer.Option(help="Peak; default: by the distance to the dense model.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the order of texts and of the adapters.")] = 0,
    checkpoint: Annotated[
        Path | None, typer.Option(help="Folder for the state, so that tuning can go on.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Train an extracted model to give the outputs of the dense one."""
    from solpath.config import TuneConfig
    from solpath.refining.tuning import tune as train

    config = TuneConfig(steps=steps, seed=seed, learning_rate=learning_rate, lora_rank=lora_rank)

    def tuned(start: Any, teacher: Any, batches: Sequence[Any], heldout: Sequence[Any]) -> Any:
        _state["checkpoint"] = checkpoint
        return train(
            start,
            teacher,
            batches,
            config,
            heldout=heldout,
            checkpoint=checkpoint,
            progress=not as_json,
        )

    _improve(small, dense, out, text, images, seed, config.to_dict(), tuned, as_json)


@app.command()
def compensate(
    small: Annotated[str, typer.Argument(help="Folder of an extracted model.")],
    dense: ModelName,
    out: Annotated[Path, typer.Option(help="Folder for the better model, new or empty.")],
    text: Text = None,
    images: Images = None,
    batch_count: Annotated[
        int, typer.Option(help="Batches to fit on; more is better.", min=4)
    ] = 128,
    seed: Annotated[int, typer.Option(help="Of the order of texts.")] = 0,
    as_json: Json = False,
) -> None:
    """Refit an extracted model to the dense one, layer by layer, without training."""
    from solpath.refining.compensation import compensate as refit

    def refitted(start: Any, teacher: Any, batches: Sequence[Any], heldout: Sequence[Any]) -> Any:
        return refit(start, teacher, batches[:batch_count], progress=not as_json)

    config = {"batch_count": batch_count}
    _improve(small, dense, out, text, images, seed, config, refitted, as_json)


@app.command(name="eval")
def evaluate_(
    model: Annotated[str, typer.Argument(help="Folder of an extracted or dense model.")],
    reference: Annotated[str, typer.Option(help="Folder or hub id of the dense model.")],
    text: Text = None,
    images: Images = None,
    as_json: Json = False,
) -> None:
    """Compare a model with the dense one on held-out text or images."""
    from solpath.data.docstrings import embedder, read_corpus, retrieval_accuracy, texts_of
    from solpath.measuring.evaluation import evaluate
    from solpath.pretrained import load_processor

    small, dense = _load(model), _load(reference)
    if text is None and images is None and takes(dense) == {"text"}:
        tokenizer = load_processor(reference)
        pairs = read_corpus(search=0, calibration=0).test
        batches = rows_of(dense, tokenizer, texts_of(pairs))

        def retrieval(model: Any) -> float:
            return retrieval_accuracy(embedder(model, tokenizer), pairs)

        task = None if tokenizer.pad_token_id is None else retrieval  # texts are padded for it
        result = evaluate(small, dense, batches, task=task)
    else:
        result = evaluate(small, dense, batches_for(reference, dense, text, images, 0))
    if as_json:
        return print_json(result.to_dict())
    names = {"task": "retrieval accuracy@1"}
    print_table(
        ("metric", "value"),
        [(names.get(name, name), f"{value:.4f}") for name, value in result.metrics.items()],
    )


@app.command()
def bench(
    dense: ModelName,
    small: Annotated[list[str], typer.Argument(help="Folders of extracted models.")],
    samples: Samples = 8,
    tokens: Tokens = 128,
    repeats: Annotated[int, typer.Option(help="Timed passes of each model.", min=1)] = 20,
    as_json: Json = False,
) -> None:
    """Measure size, memory and latency of several models in one run."""
    from solpath.measuring.measurement import measure, provenance

    models = {name: _load(name) for name in dict.fromkeys([dense, *small])}
    found = measure(models, random_tokens(models[dense], samples, tokens), repeats=repeats)
    if as_json:
        figures = {name: value.to_dict() for name, value in found.items()}
        return print_json({"models": figures, "tokens": tokens, "provenance": provenance()})
    first = found[dense]
    rows = [
        (name, f"{m.params:,}", f"{m.macs / 1e6:,.0f} M", f"{m.bytes_on_disk / 1e6:.1f} MB",
         f"{m.peak_memory / 1e6:.1f} MB", f"{m.latency_ms:.1f} ± {m.latency_iqr_ms / 2:.1f} ms",
         f"{m.latency_ms / first.latency_ms:.2f}")
        for name, m in found.items()
    ]  # fmt: skip
    print_table(("model", "parameters", "MACs", "on disk", "peak", "latency", "ratio"), rows)


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="Folder with family.json and path/.")],
    as_json: Json = False,
) -> None:
    """Build report.html again from family.json and path/."""
    from solpath.reporting.report import write_report

    file = write_report(folder)
    if as_json:
        return print_json({"report": str(file), "bytes": file.stat().st_size})
    print(f"written to {file}")


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        The exit code: 0, 1 for what was not expected, 2 for bad input, 130 for Ctrl-C.
    """
    _state.update(debug=False, checkpoint=None)
    try:
        given = list(sys.argv[1:] if arguments is None else arguments)
        code = app(args=given or ["--help"], standalone_mode=False)
    except KeyboardInterrupt:
        code = 130
    except typer.Abort:
        code = 130
    except (SolpathError, _USAGE_ERROR) as error:
        if _state["debug"]:
            raise
        text = error.format_message() if hasattr(error, "format_message") else str(error)
        fail(text)
        return 2
    except Exception as error:
        if _state["debug"]:
            raise
        fail(f"unexpected {type(error).__name__}: {error}; solpath --debug shows where.")
        return 1
    if code == 130:
        folder = _state["checkpoint"]
        kept = folder is not None and folder.is_dir()
        again = f"stopped; the state is in {folder}; run the same command again to go on."
        fail(again if kept else "stopped.")
    return code if isinstance(code, int) else 0


def _path(folder: Path) -> "SolutionPath":
    from solpath.planning.path import SolutionPath

    return SolutionPath.load(folder)


def _table(file: Path) -> "LatencyTable":
    from solpath.planning.latency_table import LatencyTable

    return LatencyTable.load(file)


def _plan_for_latency(
    model: Any,
    path: "SolutionPath",
    batch: Any,
    latency_ms: float,
    file: Path | None,
    options: Mapping[str, Any],
) -> "Plan":
    """Read the table, or measure it and write it if a file is given; then plan and verify."""
    from solpath.measuring.latency import check_request, measure_latency, plan_for_latency

    check_request(model, path, batch, latency_ms, **options)
    if file is not None and file.exists():
        table = _table(file)
    else:
        say("measuring shapes; keep the machine quiet")
        table = measure_latency(model, batch)
        if file is not None:
            table.save(file)
    return plan_for_latency(model, path, batch, latency_ms, latency=table, **options)


def _load(name: str) -> Any:
    """A dense or extracted model."""
    from solpath.pretrained import from_pretrained, quiet_transformers
    from solpath.storing.writing import load

    quiet_transformers()
    return load(name) if (Path(name) / "solpath.json").is_file() else from_pretrained(name)


def _improve(
    small: str,
    dense: str,
    out: Path,
    text: Path | None,
    images: Path | None,
    seed: int,
    config: dict[str, Any],
    improved: Callable[[Any, Any, Sequence[Any], Sequence[Any]], Any],
    as_json: bool,
) -> None:
    """Save what ``improved(small, dense, batches, heldout)`` makes, and say how near it is now."""
    from solpath.files import check_output
    from solpath.measuring.evaluation import evaluate
    from solpath.pretrained import load_processor
    from solpath.storing.writing import load, save

    check_output(out)
    start, teacher = load(small), _load(dense)
    batches, heldout = split_batches(dense, teacher, text, images, seed)
    better = improved(start, teacher, batches, heldout)
    save(better, out, tokenizer=load_processor(dense))
    before, after = (dict(evaluate(m, teacher, heldout).metrics) for m in (start, better))
    if as_json:
        return print_json({"out": str(out), "config": config, "before": before, "after": after})
    rows = [(name, f"{before[name]:.4f}", f"{after[name]:.4f}") for name in before]
    print_table(("held-out metric", "before", "after"), rows)
    print(f"written to {out}")
