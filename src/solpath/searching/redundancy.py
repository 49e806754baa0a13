"""The unexplained variance of units, and the moments that it is computed from."""

import contextlib
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from solpath.errors import FileError
from solpath.model.linear import linear_map
from solpath.pair import Pair
from solpath.running.forward import Batch, activation_mask, device_of
from solpath.running.hooks import Hook, hooked
from solpath.running.memory import free_memory
from solpath.searching.dynamics import unexplained_variance

Inputs = Mapping[str, Tensor]
"""Pair name to float64 ``[channels + 1, channels + 1]``: second moments of the channels that the
right-hand layer gets, summed over tokens. The last row and column hold the sums of the channels
and the number of tokens."""

_IN_MEMORY = 4 * 2**30  # most bytes of moments that are added up, or kept, at a time
_SHARE = 0.25  # of the free memory that they may take: a pass adds up as many beside them


class ScratchInputs(Mapping[str, Tensor]):
    """`Inputs` on a scratch file, of which a matrix is in memory only while it is used.

    The file has no name in its folder, so nothing is left of it when the process ends, even if it
    is killed.

    Args:
        size: Bytes of all matrices that will be put there.

    Raises:
        FileError: The folder for temporary files has no room for them.

    Example:
        >>> inputs = ScratchInputs(32)
        >>> inputs.put("mlp", torch.eye(2).double())
        >>> inputs["mlp"].tolist()
        [[1.0, 0.0], [0.0, 1.0]]
        >>> inputs.close()
    """

    def __init__(self, size: int) -> None:
        folder = tempfile.gettempdir()
        free = shutil.disk_usage(folder).free
        if size > free:
            raise FileError(
                f"the moments of a compensated search take {size / 1e9:.1f} GB, and the folder for "
                f"temporary files, {folder}, has {free / 1e9:.1f} GB left; set TMPDIR to a folder "
                "with more, or search without compensated=True."
            )
        self._folder = folder
        self._file = tempfile.TemporaryFile(prefix="solpath-")  # noqa: SIM115 - closed by `close`
        self._places: dict[str, tuple[int, torch.Size]] = {}

    def put(self, name: str, matrix: Tensor) -> None:
        """Write a matrix to the end of the file.

        Args:
            name: The name of its pair.
            matrix: float64, on the CPU.

        Raises:
            FileError: It cannot be written.
        """
        try:
            offset = self._file.seek(0, 2)
            self._file.write(_bytes_of(matrix.contiguous()))
            self._file.flush()
        except OSError as error:
            raise FileError(
                f"cannot write {matrix.nbytes / 1e9:.1f} GB of moments to the folder for temporary "
                f"files, {self._folder}: {error}; set TMPDIR to another one."
            ) from error
        self._places[name] = offset, matrix.shape

    def __getitem__(self, name: str) -> Tensor:
        """Read the matrix of a pair.

        Raises:
            FileError: It cannot be read.
        """
        offset, shape = self._places[name]
        matrix = torch.empty(shape, dtype=torch.float64)
        self._file.seek(offset)
        if self._file.readinto(_bytes_of(matrix)) != matrix.nbytes:
            raise FileError(f"the moments of {name} in {self._folder} are cut short.")
        return matrix

    def __iter__(self) -> Iterator[str]:
        """Yield the names of the pairs."""
        return iter(self._places)

    def __len__(self) -> int:
        """Return the number of pairs."""
        return len(self._places)

    def close(self) -> None:
        """Let go of the file. It may be called twice."""
        self._file.close()


def _bytes_of(matrix: Tensor) -> Any:
    return matrix.flatten().view(torch.uint8).numpy()


def moment_bytes(model: nn.Module, pairs: Sequence[Pair]) -> int:
    """Return the bytes of the moments of pairs, from `input_hooks`."""
    sizes = (linear_map(model, pair.right.module).in_features + 1 for pair in pairs)
    return sum(8 * size * size for size in sizes)


def parts_in_memory(model: nn.Module, pairs: Sequence[Pair]) -> list[list[Pair]]:
    """Cut pairs into parts whose moments are few enough to be in memory at once.

    Args:
        model: The model.
        pairs: Its pairs. They stay in order; one that is too large is a part of its own.
    """
    limit = min(_IN_MEMORY, _SHARE * free_memory(torch.device("cpu")))
    parts: list[list[Pair]] = []
    for pair in pairs:
        if parts and moment_bytes(model, [*parts[-1], pair]) <= limit:
            parts[-1].append(pair)
        else:
            parts.append([pair])
    return parts


@contextlib.contextmanager
def input_hooks(
    model: nn.Module, pairs: Sequence[Pair], batch: Batch
) -> Iterator[dict[str, Tensor]]:
    """Yield `Inputs` that add up while the model runs.

    The hooks are removed when the block ends.

    Args:
        model: The model that runs.
        pairs: Its pairs to watch.
        batch: What it runs on. Padding does not count.
    """
    totals: dict[str, Tensor] = {}

    def watch(total: Tensor, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            states = args[0].detach()
            weight = torch.ones_like(states[..., :1])
            keep = activation_mask(batch, states, name)
            weight = weight if keep is None else weight * keep.unsqueeze(-1)
            rows = torch.cat([states * weight, weight], -1).flatten(0, -2).double()
            total.add_((rows.T @ rows).cpu())  # a variance may be tiny beside the squared mean

        return hook

    def watched() -> Iterator[Hook]:
        for pair in pairs:
            size = linear_map(model, pair.right.module).in_features + 1
            totals[pair.name] = torch.zeros(size, size, dtype=torch.float64)
            name = pair.right.module
            yield Hook(model.get_submodule(name), "before", watch(totals[pair.name], name))

    with hooked(watched()):
        yield totals


def unexplained_variances(
    model: nn.Module, pairs: Sequence[Pair], inputs: Inputs, mask: Tensor
) -> Tensor:
    """Return the share of every unit's mean square that kept units cannot predict.

    A right-hand layer with a bias makes up for means, so moments are taken about the mean. Without
    a bias they are taken about 0. See docs/method.md, "Compensation". It is computed on the device
    of the model, one pair at a time, in float64, as it is a small difference of large numbers.

    Args:
        model: Tells which right-hand layers have a bias.
        pairs: Its pairs.
        inputs: From `input_hooks`. Units of pairs that are not in it get 1.
        mask: Probability that each unit is kept, ``[units]``.

    Returns:
        The shares, in [0.0001, 1], float64 ``[units]``.
    """
    device = device_of(model)
    device = torch.device("cpu") if device.type in ("mps", "meta") else device  # no float64 there
    parts = []
    for pair, kept in zip(pairs, torch.split(mask.double(), [p.units for p in pairs]), strict=True):
        if pair.name not in inputs:
            parts.append(torch.ones_like(kept))
            continue
        kept, moments = kept.to(device), inputs[pair.name].to(device)
        tokens, square = moments[-1, -1], moments[:-1, :-1]
        energy = square.diagonal().clone()
        if linear_map(model, pair.right.module).bias is not None:
            square = square - torch.outer(moments[-1, :-1], moments[-1, :-1]) / tokens
        unit = pair.unit_of_channel(pair.right).to(device)
        spread = square.diagonal().clamp(min=0)
        root = torch.maximum(spread, 1e-12 * energy).sqrt().clamp(min=1e-30)
        correlation = torch.outer(root, root)
        torch.div(square, correlation, out=correlation)
        del moments, square  # matrices may be large: at most three are there at a time
        left = spread * unexplained_variance(correlation, kept[unit])
        total = torch.zeros_like(kept).index_add(0, unit, energy)
        own = torch.zeros_like(kept).index_add(0, unit, left)
        parts.append((own / total.clamp(min=1e-30)).clamp(1e-4, 1).cpu())
    return torch.cat(parts)
