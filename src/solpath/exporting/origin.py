"""Where a dense model came from: its name on the Hub and its licence, without the network.

Nothing is guessed: a name counts if the cache of the Hub has the model, or if a card or a GGUF file
of the dense model states it.
"""

import contextlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from solpath.errors import FileError
from solpath.gguf import is_gguf, read_gguf
from solpath.reading import read_json
from solpath.storing.manifest import CONFIG, HEADER

_CARD = "README.md"
_LICENSE = ("license", "license_name", "license_link")
_HUB = "https://huggingface.co/"


@dataclass(frozen=True)
class Origin:
    """What is known of a dense model.

    Attributes:
        base: Its name on the Hub; empty if it has none, or none is known.
        ancestors: What it was made from by its own account: the names that its card, or its GGUF
            file, has as its base models.
        license: ``license``, and where there are any ``license_name`` and ``license_link``. Empty
            if its card names no licence.
    """

    base: str = ""
    ancestors: tuple[str, ...] = ()
    license: Mapping[str, str] = field(default_factory=dict)

    @property
    def models(self) -> tuple[str, ...]:
        """What a card names as base models."""
        return (self.base,) if self.base else self.ancestors


def origin_of(model: nn.Module) -> Origin:
    """Return what is known of the dense model: by its name, beside its weights, or in the cache.

    Args:
        model: A model that was loaded by transformers or from a GGUF file, or extracted from one.

    Example:
        >>> origin_of(model)
        Origin(base='', ancestors=(), license={})
    """
    name = str(getattr(getattr(model, "config", None), "name_or_path", "") or "")
    if is_gguf(name) and os.path.isfile(name):
        return _of_gguf(Path(name))
    if os.path.isdir(name):
        base = _saved_base(Path(name))
        card = _card(Path(name) / _CARD)
        own = card or _card(_cached(base, _CARD))
        ancestors = () if base else _named(card.get("base_model"))
        return Origin(base, ancestors, _texts(own))
    return Origin(name, (), _texts(_card(_cached(name, _CARD)))) if _on_hub(name) else Origin()


def _saved_base(folder: Path) -> str:
    """Return the name on the Hub of the dense model that a saved model was extracted from."""
    if not (folder / HEADER).is_file():
        return ""
    try:
        name = read_json(folder / CONFIG).get("_name_or_path")
    except FileError:
        return ""
    return name if isinstance(name, str) and _on_hub(name) else ""


def _on_hub(name: str) -> bool:
    """Return whether a name is that of a model on the Hub, which the cache has a part of."""
    return bool(_named(name)) and not os.path.exists(name) and _cached(name, CONFIG) is not None


def _cached(name: str, file: str) -> str | None:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, file) if name else None
    return found if isinstance(found, str) else None


def _card(file: Path | str | None) -> Mapping[str, Any]:
    """Return the metadata of a card; none if there is no card, or it cannot be read."""
    import yaml
    from huggingface_hub import ModelCard

    if file is None or not os.path.isfile(file):
        return {}
    try:
        text = Path(file).read_text(encoding="utf-8")
        return dict(vars(ModelCard(text, ignore_metadata_errors=True).data))
    except (ValueError, OSError, yaml.YAMLError):  # no metadata, or none that can be read
        return {}


def _of_gguf(file: Path) -> Origin:
    general = read_gguf(file).general
    count = general.get("base_model.count") or 0
    links = [str(general.get(f"base_model.{i}.repo_url") or "") for i in range(count)]
    names = [link.removeprefix(_HUB) for link in links if link.startswith(_HUB)]
    found = {name: general.get(name.replace("_", ".")) for name in _LICENSE}
    return Origin("", _named(names), _texts(found))


def _texts(values: Mapping[str, Any]) -> dict[str, str]:
    found = {name: values.get(name) for name in _LICENSE}
    return {name: value for name, value in found.items() if value and isinstance(value, str)}


def _named(value: Any) -> tuple[str, ...]:
    """Return the names of models on the Hub in an entry of a card: one name, or several."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils._validators import validate_repo_id

    found = []
    names = value if isinstance(value, list | tuple) else [value]
    for name in (name for name in names if isinstance(name, str)):
        with contextlib.suppress(HFValidationError):
            validate_repo_id(name)
            found.append(name)
    return tuple(found)
