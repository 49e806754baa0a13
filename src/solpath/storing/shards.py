"""Write tensors to safetensors files, one after the other, so that one or two are held at a time.

A file is the one that safetensors would write, to the byte; safetensors itself wants all tensors of
a file in memory.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from solpath.errors import ConfigError, SolpathError
from solpath.reading import dtype_name, values_as_bytes

_METADATA = {"format": "pt"}
_RANKS = ("I64", "F64", "F32", "I32", "BF16", "F16", "I16", "I8", "U8", "BOOL")
"""The order of dtypes in a file of safetensors, so that all tensors are aligned."""


@dataclass(frozen=True)
class Stored:
    """A tensor that is read when it is written.

    Attributes:
        dtype: Its dtype.
        shape: Its shape.
        read: Returns it, on any device.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        return self.empty().nbytes

    def empty(self) -> Tensor:
        """Return a tensor like it without data."""
        return torch.empty(self.shape, dtype=self.dtype, device="meta")


def write_shards(
    tensors: Mapping[str, Stored], folder: Path, max_shard_size: int | str
) -> tuple[dict[str, str], dict[str, Any] | None]:
    """Write tensors into one file, or into several of a largest size.

    Args:
        tensors: Name to tensor.
        folder: The folder of the files.
        max_shard_size: See `solpath.save`.

    Returns:
        File name to its SHA-256 in hexadecimal, and the index of the files, or None for one file.

    Raises:
        ConfigError: `max_shard_size` cannot be understood.
        SolpathError: A tensor has no data, or another dtype or shape than it was said to have.
        OSError: A file cannot be written.
    """
    from huggingface_hub import split_torch_state_dict_into_shards

    empty = {name: tensor.empty() for name, tensor in tensors.items()}
    try:
        shards = split_torch_state_dict_into_shards(empty, max_shard_size=max_shard_size)
    except (ValueError, TypeError, AttributeError) as error:
        raise ConfigError(f"max_shard_size {max_shard_size!r}: {error}") from error
    written = {
        file: write_file(folder / file, {name: tensors[name] for name in names})
        for file, names in shards.filename_to_tensors.items()
    }
    index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
    return written, index if shards.is_sharded else None


def write_file(path: Path, tensors: Mapping[str, Stored]) -> str:
    """Write tensors into a new file and return its SHA-256 in hexadecimal.

    While one tensor is written, the next one is read.

    Args:
        path: The file.
        tensors: Name to tensor.

    Raises:
        SolpathError: A tensor has no data, or another dtype or shape than it was said to have.
        OSError: The file cannot be written.
    """

    def place(name: str) -> tuple[int, str]:
        return _RANKS.index(dtype_name(tensors[name].dtype)), name

    names = sorted(tensors, key=place)
    header: dict[str, Any] = {"__metadata__": _METADATA}
    end = 0
    for name in names:
        tensor, start = tensors[name], end
        end += tensor.nbytes
        kind, shape = dtype_name(tensor.dtype), list(tensor.shape)
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with open(path, "wb") as stream, ThreadPoolExecutor(1) as pool:
        for block in (len(text).to_bytes(8, "little"), text):
            stream.write(block)
            digest.update(block)
        for value in _ahead(tensors, names):
            block = values_as_bytes(value)
            hashing = pool.submit(digest.update, block)  # both release the GIL
            stream.write(block)
            hashing.result()
            del value, block  # before the one after the next is read
    return digest.hexdigest()


def _ahead(tensors: Mapping[str, Stored], names: Sequence[str]) -> Iterator[Tensor]:
    """Yield tensors on the CPU, and read the next one meanwhile."""
    with ThreadPoolExecutor(1) as pool:
        pending: list[Future[Tensor]] = []
        for name in names:
            pending.append(pool.submit(_value, name, tensors[name]))
            if len(pending) > 1:
                yield pending.pop(0).result()
        for last in pending:
            yield last.result()


def _value(name: str, tensor: Stored) -> Tensor:
    value = tensor.read().detach()
    if value.is_meta:
        raise SolpathError(f"{name} has no data (it is on the meta device).")
    if (value.dtype, tuple(value.shape)) != (tensor.dtype, tensor.shape):
        raise SolpathError(
            f"{name} is {value.dtype} {[*value.shape]}, not {tensor.dtype} {[*tensor.shape]}."
        )
    return value.cpu().contiguous()
