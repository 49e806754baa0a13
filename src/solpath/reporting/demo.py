"""The demo: one search over a real model, a family of smaller ones, baselines, and a report."""

import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from solpath import baselines
from solpath.config import SearchConfig
from solpath.data.docstrings import Corpus, read_corpus, texts_of
from solpath.data.text import text_batches
from solpath.files import check_output
from solpath.holding import MARKS
from solpath.measuring.intervals import mean_interval, share_interval
from solpath.measuring.measurement import measure
from solpath.model.extraction import extract
from solpath.pretrained import from_pretrained, load_processor, quiet_transformers
from solpath.reading import file_digest
from solpath.refining.compensation import compensate
from solpath.reporting.family import (
    DenseModel,
    Family,
    Judged,
    MethodRun,
    Metric,
    Point,
    SearchRun,
    Stage,
    Timing,
)
from solpath.reporting.making import members, publish
from solpath.reporting.report import check_installed
from solpath.reporting.retrieval import Embed, embedder, installed_model, retrieval_hits
from solpath.reporting.scores import Scores
from solpath.running.progress import progress_bar
from solpath.running.provenance import peak_resident_bytes, provenance
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
        methods: The baselines to compare with, without those in `SLOW`.
        tokens: The number of tokens per text when latency is measured, on 8 texts.
        repeats: The number of timed passes.
        scale_batches: The number of batches that the one-shot scale of the search and of the
            baselines is measured on.
        fit_batches: The number of batches that members are compensated on. The memory that a demo
            takes at most grows with it.
    """

    steps: int
    test: int
    methods: tuple[str, ...]
    tokens: int
    repeats: int
    scale_batches: int
    fit_batches: int


FULL = Scale(
    steps=200,
    test=256,
    methods=("random", "magnitude", "taylor", "gauss_newton"),
    tokens=128,
    repeats=20,
    scale_batches=16,
    fit_batches=48,
)
QUICK = Scale(
    steps=40,
    test=96,
    methods=("random", "magnitude", "taylor"),
    tokens=64,
    repeats=5,
    scale_batches=4,
    fit_batches=16,
)
SLOW = ("iterative",)
"""The baselines that take longer than the search."""
_FREE = frozenset({"random", "magnitude"})  # baselines that read no text


def run_demo(
    out: str | os.PathLike[str],
    *,
    quick: bool = False,
    rivals: bool = False,
    model: str | None = None,
    seed: int = 0,
    steps: int | None = None,
    progress: bool = True,
    say: Say = lambda text: None,
) -> Family:
    """Search a model, cut and compensate a family, measure it, report on it, and compare it.

    The models, ``family.json`` and the report are written before any baseline runs, and the latter
    two again with the baselines in them. A demo that was interrupted during its search goes on when
    it is started again with the same settings.

    Args:
        out: A folder that is new or empty, or that of an interrupted demo.
        quick: Whether to do less of everything.
        rivals: Whether to compare with baselines that take longer than the search, too.
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
    check_output(folder, overwrite=resumed, marks=(*MARKS, CHECKPOINT))
    check_installed()
    quiet_transformers()
    clock = Clock(say)
    with clock.stage("read"):
        source = installed_model() if model is None else model
        dense, tokenizer = from_pretrained(source), load_processor(source)
        corpus = read_corpus(test=scale.test)
        texts = texts_of(corpus.search, seed=seed)
        batches = list(text_batches(texts, tokenizer, length=32, seed=None))
    say(f"searching {type(dense).__name__} in {config.steps} steps")
    with clock.stage("search"):
        path = search(dense, batches, config, checkpoint=folder / CHECKPOINT, progress=progress)
    path.save(folder / "path", overwrite=resumed)
    with clock.stage("compensate"):
        for name, sparsity in SIZES.items():  # one at a time: each takes far more than its weights
            say(f"cutting and compensating {name}")
            cut = extract(dense, path.plan(sparsity=sparsity))
            fit = batches[: scale.fit_batches]
            cut = compensate(cut, dense, fit, progress=progress)
            save(cut, folder / "models" / name, tokenizer=tokenizer, overwrite=resumed)
            del cut
    small = {name: load(folder / "models" / name) for name in SIZES}
    judge = Judge(embedder(dense, tokenizer), corpus)
    with (
        clock.stage("score"),
        progress_bar("score", "", len(small), 0, show=progress) as report,
    ):
        scores = {"dense": judge.dense}
        for name, cut in small.items():
            scores[name] = judge.scores(embedder(cut, tokenizer))
            report()
    say("measuring latency")
    with clock.stage("measure"):
        long = [" ".join(pair) for pair in corpus.search[:8]]
        [batch] = text_batches(long, tokenizer, batch_size=8, length=scale.tokens, seed=None)
        measured = measure({"dense": dense, **small}, batch, repeats=scale.repeats)
    del small
    weights = Path(source) / "model.safetensors"
    seconds, fitted = (clock.seconds(name) for name in ("search", "compensate"))
    sizes = {"dense": 0.0, **SIZES}
    points = tuple(Point(sizes[name], found.metrics) for name, found in scores.items())
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
        metrics=(
            Metric("cosine", "Cosine to the dense model", lower=False),
            Metric("retrieval", "Retrieval accuracy", lower=False),
        ),
        judged=Judged(
            "held-out pairs of a first sentence and the rest of its docstring; accuracy is the "
            "share of first sentences whose own rest is the nearest of all",
            len(corpus.test),
        ),
        methods=(MethodRun(path.method, seconds + fitted, points),),
        members=members(dense, path, SIZES, scores, measured),
        measured=Timing(samples=8, tokens=scale.tokens, repeats=scale.repeats),
        provenance=provenance(),
        stages=clock.stages,
    )
    publish(family, folder)
    say(f"the family and its report are in {folder}; comparing with other methods")
    names = scale.methods + (SLOW if rivals else ())
    with clock.stage("compare"):
        found = _compare(dense, tokenizer, judge, batches, names, scale, seed, progress)
    family = replace(family, methods=family.methods + found, stages=clock.stages)
    publish(family, folder)
    shutil.rmtree(folder / CHECKPOINT, ignore_errors=True)
    return family


def _compare(
    dense: nn.Module,
    tokenizer: Any,
    judge: "Judge",
    batches: Sequence[Any],
    names: Sequence[str],
    scale: Scale,
    seed: int,
    progress: bool,
) -> tuple[MethodRun, ...]:
    """Return how good other methods are at every size; their weights are not compensated."""
    runs = []
    with progress_bar(
        "compare", "{task.fields[name]}", len(names), 0, show=progress, name=names[0]
    ) as report:
        for name, following in zip(names, [*names[1:], ""], strict=True):
            start = time.perf_counter()
            options = {"scale_batches": scale.scale_batches} if name not in _FREE else {}
            rival = baselines.METHODS[name](dense, batches, seed=seed, **options)
            taken = time.perf_counter() - start
            points = [Point(0.0, judge.dense.metrics)]
            for sparsity in SIZES.values():
                cut = extract(dense, rival.plan(sparsity=sparsity))
                found = judge.scores(embedder(cut, tokenizer))
                points.append(Point(sparsity, found.metrics))
            runs.append(MethodRun(name, taken, tuple(points)))
            report(name=following)
    return tuple(runs)


class Clock:
    """The time and memory of every stage so far.

    Args:
        say: Called with one line of text at the end of each stage.

    Attributes:
        stages: The stages that have ended, in order.
    """

    def __init__(self, say: Say) -> None:
        self._say = say
        self.stages: tuple[Stage, ...] = ()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Take the time of the block. One that fails is no stage.

        Args:
            name: The name of the stage.
        """
        wall, cpu = time.perf_counter(), time.process_time()
        yield
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        one = Stage(name, wall, cpu, peak_resident_bytes())
        self.stages += (one,)
        peak = "" if one.peak_memory is None else f", memory at most {one.peak_memory / 1e9:.1f} GB"
        self._say(f"{name}: {wall:.0f} s, {cpu:.0f} s of CPU{peak}")

    def seconds(self, name: str) -> float:
        """Return the seconds of a stage that has ended.

        Args:
            name: The name of the stage.
        """
        return next(stage.seconds for stage in self.stages if stage.name == name)


class Judge:
    """Quality on the held-out text pairs, measured against the embeddings of the dense model.

    Args:
        dense: The dense model, as a function from texts to embeddings.
        corpus: The text, of which only the test split is used.

    Attributes:
        dense: The quality of the dense model itself.
    """

    def __init__(self, dense: Embed, corpus: Corpus) -> None:
        self._pairs = corpus.test
        self._texts = [text for pair in corpus.test for text in pair]
        self._reference = dense(self._texts)
        self.dense = self._score(self._reference)

    def scores(self, embed: Embed) -> Scores:
        """Return mean ``cosine`` to the dense model and the ``retrieval`` accuracy@1."""
        return self._score(embed(self._texts))

    def _score(self, found: Tensor) -> Scores:
        row = dict(zip(self._texts, found, strict=True))

        def known(texts: Sequence[str]) -> Tensor:
            return torch.stack([row[text] for text in texts])

        cosines = nn.functional.cosine_similarity(found, self._reference, dim=-1)
        pairs = cosines.view(-1, 2).double().sum(1)  # of both texts of a pair, which are alike
        hits = retrieval_hits(known, self._pairs).double()
        one = torch.ones_like(hits)
        ends = {
            "cosine": mean_interval(pairs, 2 * one),
            "retrieval": share_interval(hits, one),
        }
        return Scores(
            {"cosine": cosines.mean().item(), "retrieval": hits.mean().item()},
            {name: list(pair) for name, pair in ends.items() if pair is not None},
        )
