"""The files by which sentence-transformers knows how an encoder makes embeddings of sentences."""

import json
from pathlib import Path
from typing import Any

from solpath.errors import ConfigError
from solpath.positions import most_tokens

_POOLINGS = {"mean": "mean_tokens", "cls": "cls_token"}
_TYPES = "sentence_transformers.models"

MODULES = "modules.json"
"""File of a folder that sentence-transformers reads first."""


def write_sentences(folder: Path, model: Any, pooling: str, normalize: bool) -> None:
    """Write them beside a graph.

    Args:
        folder: The folder of the graph, its configuration and its tokenizer.
        model: The model.
        pooling: ``"mean"`` or ``"cls"``.
        normalize: Whether embeddings get the length 1.

    Raises:
        ConfigError: `pooling` is neither.
    """
    if pooling not in _POOLINGS:
        raise ConfigError(f"pooling must be one of {', '.join(_POOLINGS)}, got {pooling!r}.")
    modules = [("", "Transformer"), ("1_Pooling", "Pooling")]
    modules += [("2_Normalize", "Normalize")] if normalize else []
    for path, _ in modules[1:]:
        (folder / path).mkdir()
    modes = {f"pooling_mode_{mode}": key == pooling for key, mode in _POOLINGS.items()}
    files = {
        MODULES: [
            {"idx": i, "name": str(i), "path": path, "type": f"{_TYPES}.{name}"}
            for i, (path, name) in enumerate(modules)
        ],
        "1_Pooling/config.json": {"word_embedding_dimension": model.config.hidden_size, **modes},
        "sentence_bert_config.json": {
            "max_seq_length": most_tokens(model),
            "do_lower_case": False,
        },
    }
    for name, value in files.items():
        (folder / name).write_text(json.dumps(value, indent=2) + "\n")
