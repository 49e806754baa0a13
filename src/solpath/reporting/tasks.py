"""Score a model at its task: classes, the next token, or which text or image belongs to a text."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from solpath.data.docstrings import TextPair
from solpath.errors import BatchError, ConfigError
from solpath.measuring.intervals import mean_interval, share_interval
from solpath.reporting.retrieval import Embed
from solpath.reporting.scores import Scores
from solpath.running.forward import run
from solpath.running.modes import inferring


def _sklearn() -> Any:
    try:
        import sklearn.metrics
    except ImportError as error:
        raise ConfigError(
            "scores need scikit-learn; install it with: pip install 'solpath[data]'."
        ) from error
    return sklearn.metrics


def classification(model: nn.Module, batches: Iterable[Mapping[str, Tensor]]) -> Scores:
    """Return the accuracy of a classifier and its F1 score, averaged over classes.

    The accuracy has an interval over the samples.

    Args:
        model: The classifier, which is left as it was found.
        batches: Batches with ``labels``, on its device.

    Raises:
        BatchError: A batch has no labels.
        ConfigError: scikit-learn is not installed.
    """
    metrics = _sklearn()
    predicted: list[int] = []
    known: list[int] = []
    with inferring(model):
        for batch in batches:
            if "labels" not in batch:
                raise BatchError("a batch has no labels to score a classifier by.")
            predicted += run(model, batch, labels=False).logits.argmax(-1).tolist()
            known += batch["labels"].tolist()
    hits = torch.tensor(known) == torch.tensor(predicted)
    found = {
        "accuracy": float(metrics.accuracy_score(known, predicted)),
        "f1_macro": float(metrics.f1_score(known, predicted, average="macro", zero_division=0)),
    }
    return Scores(found, _share("accuracy", hits))


def language_modeling(model: nn.Module, batches: Iterable[Mapping[str, Tensor]]) -> Scores:
    """Return the perplexity of a decoder, and its mean loss at the next token, in nats.

    The loss is that of transformers. Both have an interval over the batches.

    Args:
        model: The decoder, which is left as it was found.
        batches: Batches of ``input_ids`` and ``attention_mask``, on its device.
    """
    sums, counts = [], []
    with inferring(model):
        for batch in batches:
            labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
            tokens = int((labels[:, 1:] != -100).sum())
            if tokens:
                loss = float(run(model, {**batch, "labels": labels}, labels=True).loss)
                sums.append(loss * tokens)
                counts.append(tokens)
    if not counts:
        raise BatchError("there is no token to predict.")
    loss = sum(sums) / sum(counts)
    ends = mean_interval(torch.tensor(sums).double(), torch.tensor(counts).double())
    intervals = {} if ends is None else {"perplexity": list(map(_exp, ends)), "loss": list(ends)}
    return Scores({"perplexity": _exp(loss), "loss": loss}, intervals)


def _exp(loss: float) -> float:
    return math.exp(min(loss, 700.0))


def text_retrieval(embed: Embed, pairs: Sequence[TextPair]) -> Scores:
    """Return how often the second text of a pair is the nearest to the first, and among 5.

    The shares have intervals over the pairs. A text as near as the right one counts as nearer.

    Args:
        embed: A function from texts to embeddings of length 1.
        pairs: The pairs. All second texts are searched.
    """
    first, second = (embed([pair[side] for pair in pairs]).double() for side in (0, 1))
    return _recall(first @ second.T)


def image_retrieval(model: nn.Module, batches: Iterable[Mapping[str, Tensor]]) -> Scores:
    """Return how often a model of two towers finds the image of a text, at once and among 5.

    See `text_retrieval`.

    Args:
        model: The model, which is left as it was found.
        batches: Batches of images with their texts, on its device. All images are searched.
    """
    images, texts = [], []
    with inferring(model):
        for batch in batches:
            outputs = run(model, batch, labels=False)
            images.append(nn.functional.normalize(outputs.image_embeds.double(), dim=-1))
            texts.append(nn.functional.normalize(outputs.text_embeds.double(), dim=-1))
    return _recall(torch.cat(texts) @ torch.cat(images).T)


def _recall(similarity: Tensor) -> Scores:
    """Return recall at 1 and 5 of similarities ``[n, n]``, where n belongs to n."""
    count = len(similarity)
    if count < 3:
        raise BatchError(f"{count} pairs are too few for a retrieval; give at least 3.")
    nearer = (similarity >= similarity.diagonal().unsqueeze(1)).sum(1).cpu()  # itself included
    hits = {f"recall@{k}": nearer <= k for k in (1, 5) if k < count}
    intervals = [_share(name, found) for name, found in hits.items()]
    return Scores(
        {name: found.double().mean().item() for name, found in hits.items()},
        {name: ends for one in intervals for name, ends in one.items()},
    )


def _share(name: str, hits: Tensor) -> dict[str, Sequence[float]]:
    """Return the interval of the share of hits, if there are enough, by the name of the metric."""
    ends = share_interval(hits.double(), torch.ones(len(hits), dtype=torch.float64))
    return {} if ends is None else {name: list(ends)}
