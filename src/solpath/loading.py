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
from solpath.wrapping import unwrapped

if TYPE_CHECKING:
    from transformers import PreTrainedModel


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
        if computed := _not_in_files(model):  # accelerate has lost them
            device_map = dict(_places("", model, computed))
            model = load_placed(name, "cpu", None, {**placement, "device_map": device_map})
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


def _places(path: str, module: nn.Module, computed: set[str]) -> Iterator[tuple[str, str]]:
    """Yield what goes to disk, in parts as large as can be, and what stays in memory."""
    prefix = f"{path}." if path else ""
    if path in computed:
        yield path, "cpu"
    elif not any(name.startswith(prefix) for name in computed):
        yield path, "disk"
    else:
        for leaf in (*module._parameters, *module._buffers):
            yield f"{prefix}{leaf}", "cpu"
        for name, child in module.named_children():
            yield from _places(f"{prefix}{name}", child, computed)
