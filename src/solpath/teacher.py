"""What the dense model teaches: batches with its outputs, and the distance of a model to them."""

from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from solpath.data import BatchSource, local_share
from solpath.errors import BatchError
from solpath.objective import Batch, divergence, has_logits, output_tensor, run, token_mask

_TARGET_CACHE_BYTES = 256 * 2**20


class Lesson(NamedTuple):
    """This process's samples of one batch, and the dense model's outputs for them.

    Attributes:
        batch: the samples.
        target: ``[samples, ...]``.
        logits: whether the target is logits.
        samples: in `batch`.
        total: samples of the batch over all processes.
    """

    batch: Batch
    target: Tensor
    logits: bool
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
        self._targets: dict[int, tuple[Tensor, bool]] = {}
        self._bytes = 0

    def __getitem__(self, step: int) -> Lesson:
        rank, world = self._accelerator.process_index, self._accelerator.num_processes
        batch, low, high, total = local_share(self._source, step, self._device, rank, world)
        return Lesson(batch, *self._target(step, batch), high - low, total)

    def _target(self, step: int, batch: Batch) -> tuple[Tensor, bool]:
        key = step % self._source.length if self._source.length else step
        if key not in self._targets:
            with torch.no_grad(), self.autocast():
                outputs = run(self._dense, batch, labels=False)
            target = (output_tensor(outputs).clone(), has_logits(outputs))
            if self._source.length is None or self._bytes + target[0].nbytes > _TARGET_CACHE_BYTES:
                return target
            self._bytes += target[0].nbytes
            self._targets[key] = target
        return self._targets[key]

    def autocast(self) -> torch.autocast:
        """The precision of the forward passes."""
        return torch.autocast(self._device.type, torch.bfloat16, enabled=self._bf16)

    def errors(self, model: nn.Module, lesson: Lesson) -> Tensor:
        """Divergence of every sample of a lesson. ``[samples]``."""
        with self.autocast():
            outputs = run(model, lesson.batch, labels=False)
        output = output_tensor(outputs)
        if output.shape != lesson.target.shape:
            raise BatchError(
                f"the small model gives {list(output.shape)} and the dense one "
                f"{list(lesson.target.shape)}; tune needs two models with equal outputs."
            )
        keep = token_mask(lesson.batch, output)
        return divergence(output, lesson.target, keep, logits=lesson.logits)

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
