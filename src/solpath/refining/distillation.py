"""What the dense model teaches: batches with its outputs, and the distance of a model to them."""

from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from solpath.data.source import BatchSource, local_share
from solpath.errors import BatchError
from solpath.objective import Batch, Target, Targets, divergence_from, output_tensor, run, target_of


class Lesson(NamedTuple):
    """This process's samples of one batch, and the dense model's outputs for them.

    Attributes:
        batch: the samples.
        target: outputs ``[samples, ...]``.
        samples: in `batch`.
        total: samples of the batch over all processes.
    """

    batch: Batch
    target: Target
    samples: int
    total: int


class Lessons:
    """Lessons by step. Targets are remembered, up to a limit, while batches repeat."""

    def __init__(
        self,
        dense: nn.Module,
        source: BatchSource,
        device: torch.device,
        accelerator: Accelerator,
        *,
        bf16: bool,
    ) -> None:
        self._dense, self._source, self._device = dense, source, device
        self._accelerator, self._bf16 = accelerator, bf16
        self._targets = Targets(source.length)

    def __getitem__(self, step: int) -> Lesson:
        rank, world = self._accelerator.process_index, self._accelerator.num_processes
        batch, low, high, total = local_share(self._source, step, self._device, rank, world)
        target = self._targets.get(step, lambda: self._target(batch))
        return Lesson(batch, target, high - low, total)

    def _target(self, batch: Batch) -> Target:
        with self.autocast():
            return target_of(self._dense, batch)

    def autocast(self) -> torch.autocast:
        """The precision of the forward passes."""
        return torch.autocast(self._device.type, torch.bfloat16, enabled=self._bf16)

    def errors(self, model: nn.Module, lesson: Lesson) -> Tensor:
        """Divergence of every sample of a lesson. ``[samples]``."""
        with self.autocast():
            outputs = run(model, lesson.batch, labels=False)
        output = output_tensor(outputs)
        if output.shape != lesson.target.output.shape:
            raise BatchError(
                f"the small model gives {list(output.shape)} and the dense one "
                f"{list(lesson.target.output.shape)}; tune needs two models with equal outputs."
            )
        return divergence_from(lesson.target, outputs, lesson.batch)

    def divergence(self, model: nn.Module) -> float:
        """Mean over the samples of all batches and all processes."""
        total = count = 0.0
        with torch.no_grad():
            for step in range(self._source.length or 0):
                lesson = self[step]
                total += float(self.errors(model, lesson).double().sum())
                count += lesson.samples
        total, count = self.sum(total, count)
        return total / count

    def sum(self, *values: float) -> list[float]:
        """Each value summed over all processes."""
        if self._accelerator.num_processes == 1:
            return list(values)
        local = torch.tensor(values, dtype=torch.float64, device=self._device)
        total: list[float] = self._accelerator.reduce(local, "sum").tolist()
        return total
