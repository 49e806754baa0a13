"""Statistics of the dense model's activations on the batches of a search."""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from time import perf_counter
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from solpath.data.preparation import Preparation
from solpath.data.source import BatchSource, local_samples
from solpath.errors import NonFiniteLossError
from solpath.model.basis import moment_hooks, obstacle, principal_basis
from solpath.model.masks import energy_hooks, run_hooks
from solpath.objective import Objective
from solpath.pair import Pair
from solpath.running.forward import Batch, row_not_finite, run
from solpath.running.memory import peak_memory
from solpath.running.processes import sum_over_processes
from solpath.searching.dynamics import unexplained_variance
from solpath.searching.redundancy import (
    Inputs,
    ScratchInputs,
    input_hooks,
    moment_bytes,
    parts_in_memory,
    unexplained_variances,
)

Hooks = Callable[
    [nn.Module, Sequence[Pair], Batch],
    AbstractContextManager[Mapping[str, Tensor]],
]
"""A context manager ``hooks(model, pairs, batch)``: while the model runs, it adds up some
statistic of every pair, by pair name and on the CPU."""

_TIMED = 512  # rows of the matrix on which a look is timed


class InputsWork(NamedTuple):
    """What the moments of a compensated search will take.

    Attributes:
        seconds: The time to measure them and to look at them.
        peak: Most bytes at a time, beyond those that are kept.
        kept: Bytes of moments that are kept in memory, not on a scratch file.
    """

    seconds: float
    peak: int
    kept: int


class Statistics:
    """Adds up what the dense model shows on the batches of a search, over all processes.

    Args:
        model: The dense model.
        source: The batches, by step.
        prepare: What the batches pass through; it names them in errors.
        objective: Runs the model as far as it is compared. None, under a loss of the user, runs it
            whole.
        rank: The number of this process.
        world: The number of processes.
    """

    def __init__(
        self,
        model: nn.Module,
        source: BatchSource,
        prepare: Preparation,
        objective: Objective | None,
        rank: int,
        world: int,
    ) -> None:
        self._model, self._source, self._prepare = model, source, prepare
        self._objective, self._rank, self._world = objective, rank, world
        self._looked_at: frozenset[str] = frozenset()  # pairs whose moments this process keeps
        self._scratch: ScratchInputs | None = None

    def energy(self, pairs: Sequence[Pair], batches: int) -> dict[str, Tensor]:
        """Return what `energy_hooks` add up, of the pairs with norms over their heads.

        Args:
            pairs: The pairs.
            batches: Number of batches.
        """
        return self._add_up(batches, energy_hooks, [pair for pair in pairs if pair.norms])

    def basis(self, pairs: Sequence[Pair], batches: int) -> dict[str, Tensor]:
        """Return the principal axes of the pairs that can be rotated; see `Engine.measure_basis`.

        Args:
            pairs: The pairs.
            batches: Number of batches.
        """
        pairs = [pair for pair in pairs if obstacle(self._model, pair) is None]
        return principal_basis(self._model, pairs, self._add_up(batches, moment_hooks, pairs))

    def reach(self, pairs: Sequence[Pair], batches: int) -> Tensor:
        """Return which pairs run at all, bool ``[pairs]``.

        Args:
            pairs: The pairs.
            batches: Number of batches.
        """
        seen = self._add_up(batches, run_hooks, pairs)
        return torch.stack([(seen[pair.name] > 0).all() for pair in pairs])

    def inputs(self, pairs: Sequence[Pair], batches: int) -> Inputs:
        """Return second moments of what right-hand layers get; see `Engine.measure_inputs`.

        Each process keeps those of its share of the pairs.

        Args:
            pairs: The pairs.
            batches: Number of batches.
        """
        own = self._own(pairs)
        self._looked_at = frozenset(pair.name for pair in own)
        parts = parts_in_memory(self._model, _watched(pairs))
        if len(parts) > 1:  # a pass over the batches for every part
            self.close()
            self._scratch = ScratchInputs(moment_bytes(self._model, _watched(own)))
        inputs: dict[str, Tensor] = {}
        for part in parts:
            totals = self._add_up(batches, input_hooks, part)
            for name in list(totals):
                total = totals.pop(name)
                if name in self._looked_at and total.any():
                    if self._scratch is None:
                        inputs[name] = total
                    else:
                        self._scratch.put(name, total)
                del total
        return inputs if self._scratch is None else self._scratch

    def inputs_work(self, pairs: Sequence[Pair], batches: int, looks: int) -> InputsWork:
        """Return what `inputs` and `unexplained_variance` will take, from one batch.

        Args:
            pairs: The pairs.
            batches: Number of batches that `inputs` will run. 0 for none of both.
            looks: How often `unexplained_variance` will run.
        """
        parts = parts_in_memory(self._model, _watched(pairs))
        if not batches or not parts:
            return InputsWork(0.0, 0, 0)
        own = [moment_bytes(self._model, [pair]) for pair in _watched(self._own(pairs))]
        largest = max(parts, key=lambda part: moment_bytes(self._model, part))
        size = moment_bytes(self._model, largest)
        start = perf_counter()
        one_batch, _ = peak_memory(lambda: self._add_up(1, input_hooks, largest))
        seconds = (perf_counter() - start) * batches * len(parts)
        measuring = one_batch + (size if batches > 1 else 0)  # a batch's beside the sum
        kept = sum(own) if len(parts) == 1 else 0
        looking = 3 * max(own, default=0)
        seconds += looks * _look_seconds(own)
        return InputsWork(seconds, max(measuring - kept, looking), kept)

    def unexplained_variance(self, pairs: Sequence[Pair], inputs: Inputs, mask: Tensor) -> Tensor:
        """Return the share of every unit's variance that kept units cannot predict, ``[units]``.

        Args:
            pairs: The pairs.
            inputs: From `inputs`.
            mask: Probability that each unit is kept, ``[units]``.
        """
        parts = zip(pairs, torch.split(mask, [pair.units for pair in pairs]), strict=True)
        shares = [
            unexplained_variances(self._model, [pair], inputs, kept)
            if pair.name in self._looked_at
            else torch.zeros(pair.units, dtype=torch.float64)
            for pair, kept in parts
        ]
        return sum_over_processes(torch.cat(shares))

    def place(self, step: int, row: int | None) -> str:
        """Return the words for a row of the batch of a step.

        Args:
            step: The number of the step.
            row: The number of the row in the whole batch, or None for the batch.
        """
        index = self._source.index(step)
        return self._prepare.place(step if index is None else index, row)

    def close(self) -> None:
        """Let go of what `inputs` keeps on disk."""
        if self._scratch is not None:
            self._scratch.close()

    def _own(self, pairs: Sequence[Pair]) -> Sequence[Pair]:
        """Return the pairs whose moments this process keeps."""
        return pairs[self._rank :: self._world]

    def _add_up(self, batches: int, hooks: Hooks, pairs: Sequence[Pair]) -> dict[str, Tensor]:
        """Return what `hooks` add up on the dense model, over batches and all processes."""
        totals: dict[str, Tensor] = {}
        for step in range(batches if pairs else 0):
            seen = self._seen(step, hooks, pairs)
            for name in list(seen):  # a value may be large, so none stays behind
                value = seen.pop(name)
                totals[name] = totals[name].add_(value) if name in totals else value
                del value
        return {name: sum_over_processes(total) for name, total in totals.items()}

    def _seen(self, step: int, hooks: Hooks, pairs: Sequence[Pair]) -> dict[str, Tensor]:
        """Return what `hooks` add up on the dense model, on the samples of this process."""
        batch, low = local_samples(self._source, step, self._rank, self._world)[:2]
        with torch.no_grad(), hooks(self._model, pairs, batch) as seen:
            if self._objective is None:
                outputs = run(self._model, batch, labels=False)
            else:
                outputs = self._objective.run(self._model, batch)
        if not all(value.isfinite().all() for value in seen.values()):
            first = next(part for part in tree_leaves(outputs) if isinstance(part, Tensor))
            row = row_not_finite(first)
            where = self.place(step, None if row is None else row + low)
            raise NonFiniteLossError(f"on {where} the dense model itself is not finite.")
        return dict(seen)


def _watched(pairs: Sequence[Pair]) -> list[Pair]:
    """Return the pairs whose moments are measured."""
    return [pair for pair in pairs if pair.kind not in ("qk", "experts")]


def _look_seconds(sizes: Sequence[int]) -> float:
    """Return about how long a look at matrices of so many bytes takes: a small one's, by cubes."""
    start = perf_counter()
    unexplained_variance(torch.eye(_TIMED, dtype=torch.float64), torch.ones(_TIMED).double())
    cubes = sum(math.sqrt(size / 8) ** 3 for size in sizes)
    return (perf_counter() - start) * cubes / _TIMED**3
