"""Commands that measure models."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import typer

from solpath.cli.app import app
from solpath.cli.arguments import (
    Data,
    Json,
    Loss,
    ModelName,
    Placement,
    Samples,
    Task,
    TaskName,
    Tokens,
    takes_data,
    takes_placement,
)
from solpath.cli.inputs import check_not_swapped, device_for, load_any, loss_of
from solpath.cli.terminal import print_json, print_table
from solpath.errors import ConfigError
from solpath.holding import DENSE, EXTRACTED, holds


@app.command(name="eval")
@takes_data
@takes_placement
def evaluate_(
    model: Annotated[str, typer.Argument(help="Folder of an extracted or dense model.")],
    reference: Annotated[str, typer.Option(help="Folder or hub id of the dense model.")],
    data: Data,
    place: Placement,
    task: TaskName = None,
    loss: Loss = None,
    as_json: Json = False,
) -> None:
    """Compare a model with the dense one on held-out text or images, and at a task."""
    from solpath.cli.batches import batches_for, docstring_batches
    from solpath.cli.scores import scorer
    from solpath.cli.splits import pairs_of
    from solpath.data.docstrings import read_corpus, texts_of
    from solpath.data.feeding import takes
    from solpath.measuring.evaluation import evaluate
    from solpath.measuring.metrics import figure
    from solpath.pretrained import load_processor
    from solpath.reporting.retrieval import embedder, retrieval_accuracy

    check_not_swapped(model, reference, EXTRACTED, DENSE)
    if holds(reference) == EXTRACTED:
        raise ConfigError(f"--reference {reference} holds {EXTRACTED}; give the dense model.")
    own, device = loss_of(loss), device_for(place)
    small, dense = load_any(model, place), load_any(reference, place)
    if takes(small) != takes(dense):
        raise ConfigError(
            f"{model} takes {' and '.join(sorted(takes(small)))}, and {reference} "
            f"{' and '.join(sorted(takes(dense)))}; give the dense model that it was cut from."
        )
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
    scores: dict[str, Any] = {}
    if task is not None:
        score = scorer(task, dense, found.batches, pairs or pairs_of(found), reference, length)
        scores = {"model": score(small), "dense": score(dense)}
    if as_json:
        at_task = {} if task is None else {"task": {"name": task.value, **_plain(scores)}}
        return print_json(result.to_dict() | at_task)
    names = {"task": "retrieval accuracy@1"}
    rows = []
    for name, value in result.metrics.items():
        rows.append((names.get(name, name), figure(value), _between(result.intervals, name)))
    print_table(("distance to the dense model", "value", "95 % confidence"), rows)
    if task is not None:
        table = [
            (name, *(cell for one in scores.values() for cell in (
                figure(one.metrics[name]), _between(one.intervals, name))))
            for name in scores["model"].metrics
        ]  # fmt: skip
        print_table((task.value, "model", "95 % confidence", "dense", "95 % confidence"), table)


def _plain(scores: Mapping[str, Any]) -> dict[str, Any]:
    """Return scores for JSON: the metrics of every model, and all intervals beside them."""
    intervals = {name: dict(one.intervals) for name, one in scores.items()}
    return {name: dict(one.metrics) for name, one in scores.items()} | {"intervals": intervals}


def _between(intervals: Mapping[str, Sequence[float]], name: str) -> str:
    """Return the ends of the interval of a metric; nothing if it has none."""
    from solpath.measuring.metrics import figure

    ends = intervals.get(name)
    return "" if ends is None else " to ".join(map(figure, ends))


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
