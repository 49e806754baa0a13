"""Commands that examine models and families, and the demo."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from solpath.cli.app import app
from solpath.cli.arguments import (
    Data,
    Json,
    Loss,
    ModelName,
    Placement,
    Precision,
    Samples,
    Task,
    Tokens,
    takes_data,
    takes_placement,
)
from solpath.cli.inputs import device_for, load_any, loss_of
from solpath.cli.terminal import print_json, print_table, say
from solpath.errors import ConfigError

if TYPE_CHECKING:
    from solpath.data.feeding import Feed


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
    seed: Annotated[int, typer.Option(help="Seed of the search.")] = 0,
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
    rows = [
        (m.name, f"{m.params / 1e6:.1f} M", f"{m.macs_share:.0%}",
         f"{m.latency_ms:.1f} ms", f"{m.cosine:.3f}", f"{m.retrieval:.3f}")
        for m in family.members
    ]  # fmt: skip
    print_table(("model", "parameters", "MACs", "latency", "cosine", "retrieval"), rows)
    stages = family.stages or ()
    say(f"took {sum(s.seconds for s in stages):.0f} s; report: {out / 'report.html'}")


@app.command()
def inspect(
    model: ModelName,
    targets: Annotated[
        bool, typer.Option("--targets", help="List the runtimes that plan --for takes instead.")
    ] = False,
    dtype: Annotated[Precision, typer.Option(help="Dtype that it would be searched in.")] = (
        Precision.AUTO
    ),
    batch_size: Annotated[
        int | None, typer.Option(help="Samples per batch; default 16 texts, 32 images.", min=1)
    ] = None,
    length: Annotated[int, typer.Option(help="Tokens per text.", min=1)] = 128,
    as_json: Json = False,
) -> None:
    """List what can be pruned in a model, and what a search would need, or the runtimes."""
    from solpath.model.discovery import find_pairs
    from solpath.pretrained import from_pretrained

    loaded = from_pretrained(model, device="meta", dtype=dtype.dtype)
    total = sum(parameter.numel() for parameter in loaded.parameters())
    pairs = find_pairs(loaded)
    if targets:
        return _print_targets(type(loaded).__name__, pairs, as_json)
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
    needs, missing = _needs(loaded, pairs, batch_size, length)
    if as_json:
        counts = {"params": total, "prunable": prunable, "pairs": found}
        return print_json(counts | {"search": needs})
    rows = [
        (p["pair"], f"{p['heads']} × {p['width']}", f"{p['cost']:,}", f"{p['share']:.2%}")
        for p in found
    ]
    print_table(("pair", "heads × width", "cost per unit", "share of parameters"), rows)
    print(f"{prunable:,} of {total:,} parameters are prunable ({prunable / total:.1%}).")
    if missing:
        return print(missing)
    from solpath.searching.estimate import size

    shown = [
        (need["machine"], "" if need["bytes"] is None else size(need["bytes"]), need["how"])
        for need in needs
    ]
    print_table(("a search on", "memory", "how"), shown)


def _needs(
    model: Any, pairs: Sequence[Any], batch_size: int | None, length: int
) -> tuple[list[dict[str, Any]], str | None]:
    """Return what a search needs here and on some GPUs, or why that is not known."""
    import torch

    from solpath.data.feeding import takes
    from solpath.errors import UnsupportedModelError
    from solpath.running.memory import free_memory
    from solpath.searching.forecast import forecast

    longest = getattr(model.config, "max_position_embeddings", None) or length
    samples = batch_size or (32 if "image" in takes(model) else 16)
    try:
        found = forecast(model, pairs, tokens=min(length, longest), samples=samples)
    except UnsupportedModelError as error:
        return [], str(error)
    places = [("this CPU", free_memory(torch.device("cpu")), True)]
    for i in range(torch.cuda.device_count()):
        place = f"this GPU, {torch.cuda.get_device_name(i)}"
        places.append((place, free_memory(torch.device("cuda", i)), False))
    places += [(f"a GPU of {n} GB", n * 10**9, False) for n in (8, 24, 80)]
    rows = []
    for name, free, disk in places:
        count, how = found.on(free, disk=disk)
        rows.append({"machine": name, "free": free, "bytes": count, "how": how})
    return rows, None


def _print_targets(architecture: str, pairs: Sequence[Any], as_json: bool) -> None:
    """Print the constraints of every target for a model, or why it is not possible."""
    from solpath.planning.targets import targets_of

    found = targets_of(architecture, pairs)
    if as_json:
        return print_json(
            {
                name: {"impossible": value} if isinstance(value, str) else value.to_dict()
                for name, value in found.items()
            }
        )
    rows = [
        (name, "no" if isinstance(value, str) else "yes", str(value))
        for name, value in found.items()
    ]
    print_table(("target", "possible", "constraints, or what is in the way"), rows)


@app.command(name="eval")
@takes_data
@takes_placement
def evaluate_(
    model: Annotated[str, typer.Argument(help="Folder of an extracted or dense model.")],
    reference: Annotated[str, typer.Option(help="Folder or hub id of the dense model.")],
    data: Data,
    place: Placement,
    task: Annotated[
        Task | None, typer.Option(help="Score both models at a task, too, on labels or pairs.")
    ] = None,
    loss: Loss = None,
    as_json: Json = False,
) -> None:
    """Compare a model with the dense one on held-out text or images, and at a task."""
    from solpath.cli.batches import batches_for, docstring_batches
    from solpath.data.docstrings import read_corpus, texts_of
    from solpath.data.feeding import takes
    from solpath.measuring.evaluation import evaluate
    from solpath.pretrained import load_processor
    from solpath.reporting.retrieval import embedder, retrieval_accuracy

    own, device = loss_of(loss), device_for(place)
    small, dense = load_any(model, place), load_any(reference, place)
    pairs: Sequence[Any] = ()
    scored: Any = None
    if not data.named and task != Task.CLASSIFICATION and takes(dense) == {"text"}:
        tokenizer = load_processor(reference)
        pairs = read_corpus(search=0, calibration=0).test
        found = docstring_batches(dense, tokenizer, texts_of(pairs), data, device)
        if task is None and tokenizer.pad_token_id is not None:  # it needs padded texts

            def scored(model: Any) -> float:
                return retrieval_accuracy(embedder(model, tokenizer), pairs)
    else:
        labels = True if task == Task.CLASSIFICATION else None if own is not None else False
        found = batches_for(reference, dense, data, 0, labels=labels, device=device)
    result = evaluate(small, dense, found.batches, task=scored, loss=own)
    length = data.length or (128 if data.named else 32)
    scores = _scores(task, {"model": small, "dense": dense}, found, pairs, reference, length)
    if as_json:
        at_task = {} if task is None else {"task": {"name": task.value, **scores}}
        return print_json(result.to_dict() | at_task)
    names = {"task": "retrieval accuracy@1"}
    print_table(
        ("distance to the dense model", "value"),
        [(names.get(name, name), f"{value:.4f}") for name, value in result.metrics.items()],
    )
    if task is not None:
        of_small, of_dense = scores["model"], scores["dense"]
        rows = [(name, f"{of_small[name]:.4f}", f"{of_dense[name]:.4f}") for name in of_small]
        print_table((task.value, "model", "dense"), rows)


def _scores(
    task: Task | None,
    models: Mapping[str, Any],
    found: "Feed",
    pairs: Sequence[Any],
    reference: str,
    length: int,
) -> dict[str, dict[str, float]]:
    """Return the scores of every model at a task; without a task none."""
    from solpath.data.feeding import longest_text, takes
    from solpath.pretrained import load_processor
    from solpath.reporting import tasks
    from solpath.reporting.retrieval import embedder

    dense = models["dense"]
    if task is None:
        return {}
    if task == Task.CLASSIFICATION:
        return {name: tasks.classification(m, found.batches) for name, m in models.items()}
    if task == Task.LANGUAGE_MODELING:
        if not dense.can_generate():
            raise ConfigError(f"{type(dense).__name__} does not predict the next token.")
        return {name: tasks.language_modeling(m, found.batches) for name, m in models.items()}
    if takes(dense) == {"text", "image"}:
        return {name: tasks.image_retrieval(m, found.batches) for name, m in models.items()}
    texts = [row["text"] for row in found.rows]
    if not pairs and found.paired:
        pairs = [
            pair
            for pair in zip(texts[::2], texts[1::2], strict=True)
            if all(text.strip() for text in pair)
        ]
    if not pairs:
        raise ConfigError(
            "retrieval needs pairs of texts, or of images and texts; for texts give "
            "--column text=COLUMN --column pair=COLUMN."
        )
    tokenizer = load_processor(reference)
    longest = longest_text(dense, tokenizer) or length
    embed = {
        name: embedder(m, tokenizer, length=min(length, longest)) for name, m in models.items()
    }
    return {name: tasks.text_retrieval(one, pairs) for name, one in embed.items()}


@app.command()
@takes_placement
def bench(
    dense: ModelName,
    small: Annotated[list[str], typer.Argument(help="Folders of extracted models.")],
    place: Placement,
    samples: Samples = 8,
    tokens: Tokens = 128,
    repeats: Annotated[int, typer.Option(help="Timed passes of each model.", min=1)] = 20,
    generate: Annotated[
        int | None, typer.Option(help="New tokens per text, for decoders; default: none.", min=2)
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure size, memory and latency of several models in one run, and how fast they generate."""
    from solpath.cli.batches import random_tokens
    from solpath.measuring.measurement import measure
    from solpath.running.provenance import provenance

    models = {name: load_any(name, place) for name in dict.fromkeys([dense, *small])}
    batch = random_tokens(models[dense], samples, tokens, new=generate or 0)
    found = measure(models, batch, repeats=repeats, generate=generate)
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
    texts = [(name, value.generation) for name, value in found.items()]
    written = [
        (name, f"{t.cached.ttft_ms:.1f} ± {t.cached.ttft_iqr_ms / 2:.1f} ms",
         f"{t.cached.tokens_per_s:.1f}", f"{t.uncached.tokens_per_s:.1f}",
         f"{t.cache_bytes / 1e6:.2f} MB")
        for name, t in texts if t is not None
    ]  # fmt: skip
    if written:
        print_table(("model", "first token", "tokens/s", "without cache", "cache"), written)


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="Folder with family.json and path/.")],
    prompts: Annotated[
        Path | None, typer.Option(help="File with one prompt per line; needs --dense.")
    ] = None,
    dense: Annotated[
        str | None, typer.Option(help="Folder or hub id of the dense model, to go on with prompts.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Build report.html again from family.json and path/, for decoders with what they write."""
    from solpath.reporting.report import write_report

    if (prompts is None) != (dense is None):
        raise ConfigError("give --prompts and --dense together, or neither of them.")
    if prompts is not None and dense is not None:
        _go_on(folder, prompts, dense)
    file = write_report(folder)
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
    lines = [line for line in read_lines(prompts, Broken("raise")) if line]
    found = continuations(models, load_processor(dense), lines)
    replace(family, continuations=found).write(folder)
