"""Where a dense model came from: its name on the Hub and its licence, without the network."""

import os
from pathlib import Path
from typing import Any

from torch import nn

_LICENSE = ("license", "license_name", "license_link")


def base_of(model: nn.Module) -> str:
    """Return the name that a model has on the Hub, or an empty string if that is not known.

    Args:
        model: A model that was loaded by transformers, or extracted from one.
    """
    name = _name_of(model)
    parts = name.split("/")
    known = 1 <= len(parts) <= 2 and all(parts) and not name.startswith((".", "~", "\\"))
    return name if known and not os.path.exists(name) else ""


def license_of(model: nn.Module) -> dict[str, str]:
    """Return the fields of a licence in the card of a model: beside its weights, or in the cache.

    Args:
        model: A model that was loaded by transformers, or extracted from one.

    Returns:
        ``license``, and where there are any ``license_name`` and ``license_link``. Empty if there
        is no card, or it names no licence.
    """
    from huggingface_hub import ModelCard, try_to_load_from_cache

    name = _name_of(model)
    file: Any = Path(name) / "README.md"
    if not name:
        return {}
    if not os.path.isdir(name):
        file = try_to_load_from_cache(name, "README.md") if base_of(model) else None
    if not isinstance(file, str | Path) or not os.path.isfile(file):
        return {}
    try:
        data = ModelCard(Path(file).read_text(encoding="utf-8"), ignore_metadata_errors=True).data
    except (ValueError, OSError):  # no metadata, or none that can be read
        return {}
    found = {name: data.get(name) for name in _LICENSE}
    return {name: value for name, value in found.items() if isinstance(value, str)}


def _name_of(model: nn.Module) -> str:
    return str(getattr(getattr(model, "config", None), "name_or_path", "") or "")
