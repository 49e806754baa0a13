"""Passes of a masked model through the samples of one process, and the memory they take."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from solpath.data.source import BatchSource, batch_size, local_samples, slice_samples
from solpath.model.masks import Masks
from solpath.objective import Loss, Objective, Target, Targets, mean_loss
from solpath.pair import Pair
from solpath.running.forward import Batch, device_of, run
from solpath.running.memory import peak_memory
from solpath.running.processes import process


class Part(NamedTuple):
    """Some samples of one batch, which run at once.

    Attributes:
        batch: The samples.
        low: Number of the first one in the whole batch.
        high: Number after that of the last one.
        target: What the dense model gives them; None where a user's loss takes its place.
    """

    batch: Batch
    low: int
    high: int
    target: Target | None


class Passes:
    """Runs a model under masks, on some samples of this process at a time.

    Args:
        model: The dense model, whose pairs are hooked.
        source: The batches, by step.
        compared: How far outputs are from those of the dense model.
        masks: The masks that the hooked pairs obey.
        loss: Loss of the user, or None for the divergence from the dense model.
        micro_batch: Samples that run at once. None runs all samples of a batch.

    Attributes:
        pairs: The pairs that are masked.
        device: The device of the model.
    """

    def __init__(
        self,
        model: nn.Module,
        source: BatchSource,
        compared: Objective,
        masks: Masks,
        loss: Loss | None,
        micro_batch: int | None,
    ) -> None:
        self._model, self._source, self._masks = model, source, masks
        self._compared, self._loss, self._micro_batch = compared, loss, micro_batch
        self.pairs: Sequence[Pair] = ()
        self.device = device_of(model)
        self._rank, self._world = process(self.device)
        self._targets: Targets[list[Target]] = Targets()

    @property
    def samples(self) -> int:
        """Most samples of a batch that one process has."""
        return -(-batch_size(self._source[0]) // self._world)

    def local(self, step: int) -> tuple[Batch, int, int, int]:
        """Return the samples of this process in the batch of a step; see `local_samples`."""
        return local_samples(self._source, step, self._rank, self._world)

    def parts(self, step: int, *, remember: bool = True) -> Iterator[Part]:
        """Yield the samples of this process in the batch of a step, a micro-batch at a time.

        Args:
            step: Number of the step.
            remember: Whether their targets may come from an earlier step, and are kept for later
                ones.
        """
        batch, low, high, _ = self.local(step)
        each = self._micro_batch or high - low
        cuts = [(start, min(start + each, high)) for start in range(low, high, each)]
        batches = [slice_samples(batch, start - low, end - low) for start, end in cuts]
        targets: Sequence[Target | None] = [None] * len(cuts)
        if self._loss is None:
            index = self._source.index(step) if remember else None
            targets = self._targets.get(index, lambda: list(map(self._compared.target, batches)))
        for cut, part, target in zip(cuts, batches, targets, strict=True):
            yield Part(part, *cut, target)

    @contextmanager
    def masked(self, rows: Tensor) -> Iterator[list[Tensor]]:
        """Mask every sample by its own row while the block runs, and yield the masks by pair.

        Args:
            rows: The masks, ``[samples, units]``. What is yielded are leaves of autograd.
        """
        parts = torch.split(rows.to(self.device), [pair.units for pair in self.pairs], 1)
        leaves = [part.contiguous().requires_grad_() for part in parts]
        self._masks.units.update({p.name: leaf for p, leaf in zip(self.pairs, leaves, strict=True)})
        try:
            yield leaves
        finally:
            self._masks.units.clear()

    def run(self, part: Part) -> Any:
        """Return the outputs that are compared, under the masks; for a user's loss, the model's."""
        if part.target is None:
            return run(self._model, part.batch, labels=True)
        return self._compared.run(self._model, part.batch)

    def errors(self, outputs: Any, part: Part) -> Tensor:
        """Return the divergence of every sample; a user's loss is one number for all of them."""
        if part.target is None:
            assert self._loss is not None
            return mean_loss(self._loss, outputs, part.batch)
        return self._compared.divergence(part.target, outputs, part.batch)

    def step_memory(self) -> int:
        """Return about how many bytes a pass has alive beyond the weights.

        It grows with the samples in a straight line, which passes of one and of two samples of the
        first batch show, and with the largest batch, where that is known.
        """
        each = min(self.samples, self._micro_batch or self.samples)
        found = [self._memory(samples) for samples in range(1, min(each, 2) + 1)]
        of_first = found[0] + (each - 1) * (found[-1] - found[0])
        return round(of_first * self._source.largest)

    def _memory(self, samples: int) -> int:
        """Return how many bytes a pass of a few samples of the first batch has alive.

        If a user's loss does not take so few, the sum of the outputs takes its place.
        """
        batch = slice_samples(self._source[0], 0, samples)
        target = None if self._loss is not None else self._compared.target(batch)
        part = Part(batch, 0, samples, target)
        rows = torch.ones(samples, sum(pair.units for pair in self.pairs))

        def one_pass() -> None:
            with self.masked(rows) as leaves:
                mask_gradients(self.errors(self.run(part), part).sum(), leaves)

        def sum_of_outputs() -> None:
            with self.masked(rows) as leaves:
                values = tree_leaves(run(self._model, batch, labels=False))
                tensors = (value for value in values if isinstance(value, Tensor))
                mask_gradients(next(v for v in tensors if v.requires_grad).sum(), leaves)

        try:
            return peak_memory(one_pass, device=self.device, passing=True)[0]
        except Exception:
            if self._loss is None:
                raise
            return peak_memory(sum_of_outputs, device=self.device, passing=True)[0]


def mask_gradients(value: Tensor, leaves: list[Tensor], *, keep: bool = False) -> Tensor:
    """Return the gradients of a value by the masks, float64 ``[samples, units]`` on the CPU.

    They are 0 for pairs that the batch did not reach.

    Args:
        value: A scalar.
        leaves: The masks, from `Passes.masked`.
        keep: Whether there will be another backward pass through the same outputs.
    """
    slopes = torch.autograd.grad(
        value, leaves, retain_graph=keep, allow_unused=True, materialize_grads=True
    )
    return torch.cat(slopes, 1).double().cpu()
