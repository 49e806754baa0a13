"""Latency of a member of any widths, predicted by a table that was measured on one machine."""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from solpath.errors import FileError, FingerprintError
from solpath.files import json_bytes, write_file
from solpath.pair import Pair
from solpath.reading import check_format, check_seal, read_json, sealed

FORMAT_VERSION = 2


@dataclass(frozen=True)
class BlockLatency:
    """How many milliseconds narrower blocks of one shape save, against dense ones.

    Attributes:
        blocks: Pair names of every block: query-key and value-output, or one MLP.
        widths: For every pair of a block, the widths that were measured, ascending from 0 to
            dense.
        saved_ms: Milliseconds that one block saves at every combination of these widths. The width
            of the last pair varies fastest. The last combination is dense and saves 0.
    """

    blocks: tuple[tuple[str, ...], ...]
    widths: tuple[tuple[int, ...], ...]
    saved_ms: tuple[float, ...]

    def every_width(self) -> Tensor:
        """Return the saved milliseconds at all widths, linear between the measured ones.

        Returns:
            float64 ``[width + 1, ...]``, with one dimension for every pair of a block.
        """
        values = np.array(self.saved_ms).reshape([len(points) for points in self.widths])
        for axis, points in enumerate(self.widths):
            every = np.arange(points[-1] + 1)
            line = partial(np.interp, every, points)
            values = np.apply_along_axis(line, axis, values)
        return torch.from_numpy(values)

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> "BlockLatency":
        """Return the block that `dataclasses.asdict` described.

        Args:
            value: The dict, also after a round trip through JSON.

        Raises:
            ValueError: A field does not fit the others. The message names it.
            KeyError: A field is missing.
            TypeError: A field is not of its type.
        """
        blocks = tuple(tuple(str(name) for name in names) for names in value["blocks"])
        widths = tuple(tuple(points) for points in value["widths"])
        saved = tuple(float(ms) for ms in value["saved_ms"])
        if any(len(names) != len(widths) for names in blocks):
            raise ValueError("blocks: each must name one pair for every list of widths")
        for points in widths:
            whole = bool(points) and all(type(width) is int for width in points)
            if not whole or points[0] != 0 or any(a >= b for a, b in pairwise(points)):
                raise ValueError("widths: must be ascending integers from 0")
        if len(saved) != math.prod(len(points) for points in widths) or saved[-1] != 0:
            raise ValueError("saved_ms: must have one number for every combination, the last one 0")
        return cls(blocks, widths, saved)


@dataclass(frozen=True)
class LatencyTable:
    """Latency of one model at all widths on one machine, as measured by `measure_latency`.

    A member takes the time of the dense model, less what each of its blocks saves.

    Attributes:
        architecture: Class name of the model.
        shapes: Pair name to heads, width and parameters per unit. Latency depends on shapes and
            not on values, so the table also fits another model of the same shapes.
        dense_ms: Milliseconds of one forward pass of the dense model.
        blocks: What narrower blocks save, for every shape of block.
        conditions: Device, threads, dtype, attention implementation and shapes of the batch, and
            the rest of `solpath.running.provenance.provenance`.

    Example:
        >>> mlp = BlockLatency(blocks=(("mlp",),), widths=((0, 4),), saved_ms=(6.0, 0.0))
        >>> table = LatencyTable("Made", {"mlp": (1, 4, 10)}, 10.0, (mlp,), {})
        >>> table.predict({"mlp": torch.tensor([4, 2, 0])}).tolist()
        [10.0, 7.0, 4.0]
    """

    architecture: str
    shapes: Mapping[str, tuple[int, int, int]]
    dense_ms: float
    blocks: tuple[BlockLatency, ...]
    conditions: Mapping[str, Any]

    def predict(self, widths: Mapping[str, Tensor]) -> Tensor:
        """Return the milliseconds that members of the given widths take.

        Args:
            widths: Pair name to the units that every head keeps, int64 ``[members]``.

        Returns:
            float64 ``[members]``.
        """
        saved = torch.zeros(())
        dense = {name: torch.tensor(width) for name, (_, width, _) in self.shapes.items()}
        all_widths = {**dense, **widths}
        for kind in self.blocks:
            table = kind.every_width()
            for names in kind.blocks:
                saved = saved + table[tuple(all_widths[name] for name in names)]
        return self.dense_ms - saved.double()

    def check(
        self, architecture: str, pairs: Sequence[Pair], unreached: Sequence[str] = ()
    ) -> None:
        """Raise `FingerprintError` unless the table is for a model of this class and these shapes.

        Args:
            architecture: Class name of the model.
            pairs: Its pairs.
            unreached: Names of pairs that are not among them and stay whole.

        Raises:
            FingerprintError: The class or the shape of a pair differs. The message says which.
        """
        if architecture != self.architecture:
            difference = f"the class is {architecture}, not {self.architecture}"
        else:
            found = pair_shapes(pairs)
            known = {n: shape for n, shape in self.shapes.items() if n not in unreached}
            names = sorted(n for n in {*found, *known} if found.get(n) != known.get(n))
            if not names:
                return
            difference = f"the pairs differ, for example {names[0]}"
        raise FingerprintError(f"the latency table is for another model: {difference}.")

    def scaled(self, factor: float) -> "LatencyTable":
        """Return the table of a machine that takes `factor` times as long; leave this one as it is.

        Args:
            factor: By what all times are multiplied.
        """
        blocks = tuple(
            replace(kind, saved_ms=tuple(factor * ms for ms in kind.saved_ms))
            for kind in self.blocks
        )
        return replace(self, dense_ms=factor * self.dense_ms, blocks=blocks)

    def __repr__(self) -> str:
        where = {name: self.conditions.get(name) for name in ("device", "threads", "batch")}
        return f"LatencyTable({self.architecture}: {self.dense_ms:.2f} ms dense, {where})"

    def save(self, file: str | os.PathLike[str]) -> None:
        """Write the table to one JSON file, atomically.

        Args:
            file: The file. An existing one is replaced.

        Raises:
            FileError: The file cannot be written.
        """
        head = {"format": "solpath.latency", "version": FORMAT_VERSION}
        write_file(Path(file), json_bytes(sealed(head | asdict(self))))

    @classmethod
    def load(cls, file: str | os.PathLike[str]) -> "LatencyTable":
        """Read a table that was written by `save`.

        Args:
            file: The file.

        Raises:
            FileError: The file is missing or damaged. The message names it and the field.
        """
        path = Path(file)
        value = read_json(path)
        advice = "a table of another version has to be measured again"
        check_format(path, value, "solpath.latency", FORMAT_VERSION, advice)
        check_seal(path, value)
        try:
            return cls(
                architecture=str(value["architecture"]),
                shapes={name: _shape(name, given) for name, given in value["shapes"].items()},
                dense_ms=float(value["dense_ms"]),
                blocks=tuple(BlockLatency.from_dict(kind) for kind in value["blocks"]),
                conditions=dict(value["conditions"]),
            )._checked()
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise FileError(f"{path}: {type(error).__name__} in field {error}.") from error

    def _checked(self) -> "LatencyTable":
        """Return the table; raise `ValueError` unless each pair is in one block, to its width."""
        named = list(chain.from_iterable(names for kind in self.blocks for names in kind.blocks))
        if sorted(named) != sorted(self.shapes):
            raise ValueError("blocks: must name every pair in shapes once")
        for kind in self.blocks:
            for names in kind.blocks:
                for name, points in zip(names, kind.widths, strict=True):
                    if points[-1] != self.shapes[name][1]:
                        raise ValueError(f"widths: the last of {name} must be its dense width")
        return self


def pair_shapes(pairs: Sequence[Pair]) -> dict[str, tuple[int, int, int]]:
    """Return heads, width and parameters per unit of every pair, by pair name.

    Args:
        pairs: The pairs of a model.
    """
    return {pair.name: (pair.heads, pair.width, pair.cost) for pair in pairs}


def _shape(name: str, given: Any) -> tuple[int, int, int]:
    """Check heads, width and parameters per unit that were read from a file."""
    heads, width, cost = given
    if not all(type(number) is int and number > 0 for number in (heads, width, cost)):
        raise ValueError(f"shapes[{name!r}]: must be three positive integers")
    return heads, width, cost
