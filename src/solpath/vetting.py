"""Vet the folder of a dense model before transformers reads it.

transformers follows links, unpickles weights that an index names, and fetches kernels and base
models that a configuration names. A folder from elsewhere must not make it do so.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from solpath.errors import FileError, UnsupportedModelError
from solpath.reading import file_in, opened, read_json

INDEX = "model.safetensors.index.json"
_SHARD = re.compile(r"[\w.-]+\.safetensors", re.ASCII)
_IMPLEMENTATIONS = re.compile(r"_?(attn|experts)_implementation(_internal)?")


def check_files(folder: Path) -> None:
    """Refuse a folder with files that lie elsewhere or are none, and one of adapters.

    Folders in it are not looked into.

    Args:
        folder: A local folder.

    Raises:
        FileError: The message names the file.
    """
    for path in sorted(folder.iterdir()):
        real = file_in(folder, path.name)
        if not real.is_dir():
            with opened(real):  # a regular file that can be read
                pass
    if (folder / "adapter_config.json").exists():
        raise FileError(
            f"{folder} holds adapters (adapter_config.json), not a model; load the base model with "
            "peft, call merge_and_unload() and save_pretrained, and pass that folder."
        )
    if (folder / INDEX).exists():
        check_index(folder / INDEX)


def check_index(file: Path) -> None:
    """Refuse an index of weight files that names anything but safetensors beside it.

    Args:
        file: The index.

    Raises:
        FileError: The message names what it names.
    """
    places = read_json(file).get("weight_map")
    if not isinstance(places, dict):
        raise FileError(f"{file}: weight_map is missing or does not map names to files.")
    for place in places.values():
        if not isinstance(place, str) or not _SHARD.fullmatch(place):
            raise FileError(f"{file}: weight_map names {place!r}; only safetensors are read.")


def check_settings(name: object, config: Mapping[str, Any]) -> None:
    """Refuse a configuration that makes transformers fetch code or other weights, or pack them.

    Args:
        name: The folder or Hub id, for the message.
        config: The configuration, as read.

    Raises:
        FileError: The message names the setting and its value.
        UnsupportedModelError: The weights are quantised.
    """
    for key, value in _settings(config):
        if key == "quantization_config" and value is not None:
            method = value.get("quant_method") if isinstance(value, dict) else value
            raise UnsupportedModelError(
                f"{name}: quantization_config is of {method!r}, so its weights are packed; load "
                "the checkpoint that it was quantised from. If they are floats all the same, "
                "remove that setting from config.json."
            )
        if _IMPLEMENTATIONS.fullmatch(key):
            asked = list(value.values()) if isinstance(value, dict) else [value]
            if any(isinstance(choice, str) and "/" in choice for choice in asked):
                raise FileError(
                    f"{name}: {key} is {value!r}, a kernel from the Hub, which is code; remove "
                    "that setting from config.json."
                )
        if key == "transformers_weights" and value is not None:
            raise FileError(f"{name}: {key} is {value!r}; only model*.safetensors are read.")


def _settings(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield every setting of a configuration and of the configurations in it."""
    left: list[Any] = [config]
    while left:
        for key, value in left.pop().items():
            yield key, value
            if isinstance(value, dict):
                left.append(value)
