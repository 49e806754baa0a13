"""Load a dense model for a piece of work: to the device of its batches, or left on disk."""

import logging
import os
import warnings
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from solpath.errors import UnsupportedModelError
from solpath.gguf import is_gguf
from solpath.pretrained import Name, from_pretrained, load_placed
from solpath.running.memory import fits
from solpath.running.modes import keeping_random_state
from solpath.running.placement import off_loaded_weights
from solpath.wrapping import unwrapped

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_READ_ALONE = {
    "deberta": ("rel_embeddings", "word_embeddings"),
    "siglip2": ("position_embedding",),
}
"""Modules of some types of models, by the start of the type, whose weights others read alone."""


def for_batches(model: nn.Module | Name, batches: Iterable[Any]) -> tuple[nn.Module, Iterable[Any]]:
    """Return a model and its batches. A name is loaded onto the device of the first batch.

    Args:
        model: A model, which is returned without its wrapper, or a name for `from_pretrained`.
        batches: The batches. Of an iterator that runs only once, the first one is read and put
            back.
    """
    if not isinstance(model, str | os.PathLike):
        return unwrapped(model, hooks=True), batches
    with keeping_random_state():
        if isinstance(batches, Iterator):
            first = next(batches, None)
            batches = () if first is None else chain([first], batches)
        else:
            first = next(iter(batches), None)
    values = first.values() if isinstance(first, Mapping) else (first,)
    device = next((value.device for value in values if isinstance(value, Tensor)), "cpu")
    return load_within(model, device=device), batches


def load_within(
    name: Name,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
) -> "PreTrainedModel":
    """Load a dense model, or leave its weights on disk if they do not fit into memory.

    Weights stay on disk only for the CPU and in their own dtype, and not those of a GGUF file.

    Args:
        name: See `from_pretrained`.
        device: See `from_pretrained`.
        dtype: See `from_pretrained`.

    Raises:
        SolpathError: In the same cases as `from_pretrained` and `off_loaded`.
    """
    if torch.device(device).type == "cpu" and dtype is None and not is_gguf(name):
        empty = from_pretrained(name, device="meta")
        if not fits(sum(p.nbytes for p in empty.parameters()), torch.device("cpu")):
            scratch = TemporaryDirectory(prefix="solpath-")
            model = off_loaded(name, Path(scratch.name))
            weakref.finalize(model, scratch.cleanup)
            return model
    return from_pretrained(name, device=device, dtype=dtype)


def off_loaded(name: Name, scratch: Path) -> "PreTrainedModel":
    """Load a dense model whose weights stay where they are on disk.

    Parameters are on the meta device, and buffers in memory. The model has the hooks that
    accelerate puts on off-loaded models, which know the file of every weight.

    Args:
        name: See `from_pretrained`.
        scratch: An empty folder on disk, which must live as long as the model. Weights that
            transformers computes from others, such as those of experts that were saved one by one,
            are written into it.

    Raises:
        UnsupportedModelError: See `from_pretrained`. Or transformers holds some of its weights in
            float32 and others not, so that no smaller model of them could be saved.
        FileError: See `from_pretrained`.
        ConfigError: See `from_pretrained`.
    """
    placement = {"device_map": {"": "disk"}, "offload_folder": str(scratch)}
    with _quiet_accelerate():
        model = load_placed(name, "cpu", None, placement)
        # accelerate has lost what is computed, and fills in no module that is not called
        if here := _not_in_files(model) | _read_alone(model):
            device_map = dict(_places("", model, here))
            model = load_placed(name, "cpu", None, {**placement, "device_map": device_map})
    _name_tied_weights_(model)
    wide = model._get_dtype_plan(model.dtype)
    if mixed := [n for n, _ in model.named_parameters() if any(part in n for part in wide)]:
        raise UnsupportedModelError(
            f"{name} is in {model.dtype}, and transformers holds {mixed[0]} in float32; load it in "
            "one dtype with from_pretrained(name, dtype=torch.float32), and cut and save that."
        )
    return model


@contextmanager
def _quiet_accelerate() -> Iterator[None]:
    """Let accelerate off-load what it was told to without a warning that it did."""
    logger = logging.getLogger("accelerate.big_modeling")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*device_map keys do not match")
            yield
    finally:
        logger.setLevel(level)


def _not_in_files(model: nn.Module) -> set[str]:
    """Return the modules whose parameters are computed, such as sinusoids, and not read."""
    found = set()
    for path, module in model.named_modules():
        devices = getattr(getattr(module, "_hf_hook", None), "original_devices", {})
        if any(devices[name].type != "meta" for name in devices.keys() & module._parameters):
            found.add(path)
    return found


def _read_alone(model: "PreTrainedModel") -> set[str]:
    """Return the modules whose weights another module reads, and does not call them.

    Those that are tied to them are among them.
    """
    kind = model.config.model_type
    names = {name for start, each in _READ_ALONE.items() if kind.startswith(start) for name in each}
    found = {
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.MultiheadAttention) or path.rpartition(".")[2] in names
    }
    tied = ({name.rpartition(".")[0] for name in group} for group in _tied(model))
    return found.union(*(paths for paths in tied if paths & found))


def _tied(model: "PreTrainedModel") -> list[set[str]]:
    """Return the names of every weight that has several."""
    groups: dict[str, set[str]] = {}
    for name, first in model.all_tied_weights_keys.items():
        groups.setdefault(first, {first}).add(name)
    return list(groups.values())


def _name_tied_weights_(model: "PreTrainedModel") -> None:
    """Let accelerate find a tied weight under every one of its names, if files have it under one.

    A file may hold ``lm_head.weight`` alone, and a model asks for that of the embedding.
    """
    groups = _tied(model)
    for module in model.modules():
        weights: Any = off_loaded_weights(module)
        index = getattr(getattr(weights, "dataset", None), "index", None)
        if index is None:
            continue
        for names in groups:
            known = sorted(n for n in names & index.keys() if "safetensors_file" in index[n])
            for name in names - index.keys() if known else ():
                index[name] = {"weight_name": known[0], **index[known[0]]}


def _places(path: str, module: nn.Module, here: set[str]) -> Iterator[tuple[str, str]]:
    """Yield what goes to disk, in parts as large as can be, and what stays in memory."""
    prefix = f"{path}." if path else ""
    if path in here:
        yield path, "cpu"
    elif not any(name.startswith(prefix) for name in here):
        yield path, "disk"
    else:
        for leaf in (*module._parameters, *module._buffers):
            yield f"{prefix}{leaf}", "cpu"
        for name, child in module.named_children():
            yield from _places(f"{prefix}{name}", child, here)
