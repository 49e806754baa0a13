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
_HUB_SECONDS = 10
_SHARD = re.compile(r"[\w.-]+\.safetensors", re.ASCII)
_IMPLEMENTATIONS = re.compile(r"_?(attn|experts)_implementation(_internal)?")


def check_on_hub(name: str) -> None:
    """Refuse a name that is no folder if no Hub knows it, before anything is tried again and again.

    A repository that the cache has a part of is not asked for.

    Args:
        name: The id of a repository.

    Raises:
        FileError: The Hub has no such model, or does not answer.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.constants import HF_HUB_CACHE
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError
    from huggingface_hub.file_download import repo_folder_name

    if (Path(HF_HUB_CACHE) / repo_folder_name(repo_id=name, repo_type="model")).is_dir():
        return
    missing = f"cannot load {name}: there is no folder of that name here, and the Hub"
    try:
        HfApi().model_info(name, timeout=_HUB_SECONDS)
    except RepositoryNotFoundError as error:
        raise FileError(f"{missing} has no such model that you may read.") from error
    except (HfHubHTTPError, HFValidationError):  # what it said is told by whoever reads from it
        return
    except Exception as error:  # the errors of the network depend on the version of its client
        reason = " ".join(str(error).split())[:200].rstrip(".") or type(error).__name__
        raise FileError(f"{missing} does not answer: {reason}.") from error


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


def check_weights(folder: Path) -> None:
    """Refuse a folder whose weights are pickled, which may hold code and are never read.

    Args:
        folder: A local folder.

    Raises:
        FileError: The message says how to write other weights.
    """
    pickled = sorted(folder.glob("pytorch_model*.bin"))
    if pickled and not any(folder.glob("*.safetensors")):
        raise FileError(
            f"{folder} has its weights in {pickled[0].name}, a pickle, which may hold code and is "
            "not read; if you trust it, load it with transformers and call "
            "model.save_pretrained(folder), which writes safetensors."
        )


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
