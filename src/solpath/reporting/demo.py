"""The demo: one search over a real model, a family of smaller ones, baselines, and a report."""

import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from solpath import baselines
from solpath.config import SearchConfig
from solpath.data.docstrings import Corpus, read_corpus, texts_of
from solpath.data.text import text_batches
from solpath.files import check_output
from solpath.measuring.measurement import Measurement, measure
from solpath.model.extraction import extract
from solpath.model.masks import masked
from solpath.planning.path import SolutionPath
from solpath.pretrained import from_pretrained, load_processor, quiet_transformers
from solpath.reading import file_digest
from solpath.refining.compensation import compensate
from solpath.reporting.family import (
    DenseModel,
    Family,
    Member,
    MethodRun,
    Point,
    SearchRun,
    Task,
    Timing,
)
from solpath.reporting.report import check_installed, write_report
from solpath.reporting.retrieval import Embed, embedder, installed_model, retrieval_accuracy
from solpath.running.provenance import provenance
from solpath.searching.search import search
from solpath.storing.reading import load
from solpath.storing.writing import save

SIZES = {"s20": 0.20, "s40": 0.40, "s60": 0.60, "s75": 0.75}
"""Name to sparsity of every member but the dense model."""
CHECKPOINT = "checkpoint"
"""The folder of the search's checkpoint, in the folder of the demo. It is removed at the end."""
Say = Callable[[str], None]
"""A function that shows one line of text."""


@dataclass(frozen=True)
class Scale:
    """How much work a demo does.

    Attributes:
        steps: The steps of the search.
        test: The number of held-out text pairs.
        methods: The baselines to compare with.
        tokens: The number of tokens per text when latency is measured, on 8 texts.
        repeats: The number of timed passes.
        scale_batches: The number of batches that the one-shot scale of the search and of the
            baselines is measured on.
        fit_batches: The number of batches that members are compensated on.
    """

    steps: int
    test: int
    methods: tuple[str, ...]
    tokens: int
    repeats: int
    scale_batches: int
    fit_batches: int


_RIVALS = ("random", "magnitude", "taylor", "gauss_newton", "iterative")
FULL = Scale(200, 256, _RIVALS, 128, 20, scale_batches=16, fit_batches=128)
QUICK = Scale(40, 96, _RIVALS[:3], 64, 5, scale_batches=4, fit_batches=16)


def run_demo(
    out: str | os.PathLike[str],
    *,
    quick: bool = False,
    model: str | None = None,
    seed: int = 0,
    steps: int | None = None,
    progress: bool = True,
    say: Say = lambda text: None,
) -> Family:
    """Search a model, cut and compensate a family, compare it, measure it, and report on it.

    A demo that was interrupted during its search goes on when it is started again with the same
    settings.

    Args:
        out: A folder that is new or empty, or that of an interrupted demo.
        quick: Whether to do less of everything.
        model: A folder or Hub id. None takes the model of the ``demo`` extra.
        seed: Seeds the search, the baselines and the order of the texts.
        steps: The steps of the search. None takes 200, or 40 if `quick`.
        progress: Whether to show progress bars.
        say: Called with one line of text at each stage.

    Returns:
        What is written to ``family.json`` and shown in the report.

    Raises:
        SolpathError: See `search`, `compensate`, `save`, `read_corpus`, `installed_model`,
            `from_pretrained` and `write_report`.
    """
    scale = QUICK if quick else FULL
    config = SearchConfig(
        steps=scale.steps if steps is None else steps,
        seed=seed,
        scale_batches=scale.scale_batches,
        basis="principal",
        compensated=True,
    )
    folder = Path(out)
    resumed = (folder / CHECKPOINT).is_dir()
    check_output(folder, overwrite=resumed)
    check_installed()
    quiet_transformers()
    source = installed_model() if model is None else model
    dense, tokenizer = from_pretrained(source), load_processor(source)
    corpus = read_corpus(test=scale.test)
    texts = texts_of(corpus.search, seed=seed)
    batches = list(text_batches(texts, tokenizer, length=32, seed=None))
    say(f"searching {type(dense).__name__} in {config.steps} steps")
    start = time.perf_counter()
    path = search(dense, batches, config, checkpoint=folder / CHECKPOINT, progress=progress)
    seconds = time.perf_counter() - start
    path.save(folder / "path", overwrite=resumed)
    say(f"searched in {seconds:.0f} s; cutting and compensating {len(SIZES)} sizes")

    plans = [path.plan(sparsity=sparsity) for sparsity in SIZES.values()]
    start = time.perf_counter()
    cuts = compensate(
        [extract(dense, plan) for plan in plans],
        dense,
        batches[: scale.fit_batches],
        progress=progress,
    )
    fitted = time.perf_counter() - start
    small = {}
    for name, cut in zip(SIZES, cuts, strict=True):
        target = folder / "models" / name
        save(cut, target, tokenizer=tokenizer, overwrite=resumed)
        small[name] = load(target)
    judge = Judge(embedder(dense, tokenizer), corpus)
    quality = {"dense": judge.quality(embedder(dense, tokenizer))}
    quality |= {name: judge.quality(embedder(cut, tokenizer)) for name, cut in small.items()}
    sizes = {"dense": 0.0, **SIZES}
    methods = [
        MethodRun(
            path.method,
            seconds + fitted,
            tuple(Point(sizes[name], **found) for name, found in quality.items()),
        )
    ]
    for name in scale.methods:
        say(f"comparing with {name}")
        start = time.perf_counter()
        options = {"scale_batches": scale.scale_batches} if name not in _FREE else {}
        rival = baselines.METHODS[name](dense, batches, seed=seed, **options)
        taken = time.perf_counter() - start
        points = [Point(0.0, **quality["dense"])]
        for sparsity in SIZES.values():
            with masked(dense, rival.plan(sparsity=sparsity)):
                points.append(Point(sparsity, **judge.quality(embedder(dense, tokenizer))))
        methods.append(MethodRun(name, taken, tuple(points)))

    say("measuring latency")
    long = [" ".join(pair) for pair in corpus.search[:8]]
    [batch] = text_batches(long, tokenizer, batch_size=8, length=scale.tokens, seed=None)
    measured = measure({"dense": dense, **small}, batch, repeats=scale.repeats)
    weights = Path(source) / "model.safetensors"
    family = Family(
        model=DenseModel(
            name="all-MiniLM-L6-v2" if model is None else Path(model).name,
            architecture=type(dense).__name__,
            sha256=file_digest(weights) if weights.is_file() else None,
            units=sum(pair.units for pair in path.pairs),
            prunable=path.costs.prunable(path.pairs),
        ),
        search=SearchRun(
            method=path.method,
            seconds=seconds,
            steps=config.steps,
            seed=seed,
            compensation_seconds=fitted,
            text=f"{len(corpus.search)} pairs of docstrings from {corpus.files} files, "
            f"digest {corpus.digest()}",
        ),
        task=Task("retrieval accuracy@1", len(corpus.test)),
        methods=tuple(methods),
        members=members(path, quality, measured),
        measured=Timing(samples=8, tokens=scale.tokens, repeats=scale.repeats),
        provenance=provenance(),
    )
    family.write(folder)
    write_report(folder)
    shutil.rmtree(folder / CHECKPOINT, ignore_errors=True)
    return family


_FREE = frozenset({"random", "magnitude"})  # baselines that read no text


class Judge:
    """Quality on the held-out text pairs, measured against the embeddings of the dense model.

    Args:
        dense: The dense model, as a function from texts to embeddings.
        corpus: The text, of which only the test split is used.
    """

    def __init__(self, dense: Embed, corpus: Corpus) -> None:
        self._pairs = corpus.test
        self._texts = [text for pair in corpus.test for text in pair]
        self._reference = dense(self._texts)

    def quality(self, embed: Embed) -> dict[str, float]:
        """Return mean ``cosine`` to the dense model and the ``retrieval`` accuracy@1."""
        found = embed(self._texts)
        row = dict(zip(self._texts, found, strict=True))

        def known(texts: Sequence[str]) -> Tensor:
            return torch.stack([row[text] for text in texts])

        cosine = nn.functional.cosine_similarity(found, self._reference, dim=-1).mean().item()
        return {"cosine": cosine, "retrieval": retrieval_accuracy(known, self._pairs)}


def members(
    path: SolutionPath,
    quality: Mapping[str, Mapping[str, float]],
    measured: Mapping[str, Measurement],
) -> tuple[Member, ...]:
    """Return the dense model and every size with its cost, latency and quality.

    Args:
        path: The path that the family was cut from.
        quality: Name of a member to its ``cosine`` and ``retrieval``.
        measured: Name of a member to its measured cost, the dense model as ``"dense"``.
    """
    dense = measured["dense"]
    rows = []
    for name, cost in measured.items():
        plan = path.plan(sparsity=SIZES.get(name, 0.0))
        rows.append(
            Member(
                name=name,
                folder=f"models/{name}" if name in SIZES else None,
                sparsity=plan.achieved.sparsity,
                params=cost.params,
                params_share=cost.params / dense.params,
                macs=cost.macs,
                macs_share=cost.macs / dense.macs,
                bytes=cost.bytes_on_disk,
                latency_ms=cost.latency_ms,
                latency_iqr_ms=cost.latency_iqr_ms,
                **quality[name],
                widths=plan.widths,
            )
        )
    return tuple(rows)
