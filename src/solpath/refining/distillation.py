"""Batches with the dense model's outputs, and the distance of a smaller model to them."""

from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from solpath.data.source import BatchSource, local_samples
from solpath.errors import BatchError
from solpath.objective import Target, Targets, divergence_from, target_of
from solpath.running.forward import Batch, output_tensor, run
from solpath.running.processes import sum_over_processes


class DistillationBatch(NamedTuple):
    """This process's samples of one batch, and the dense model's outputs for them.

    Attributes:
        inputs: the samples.
        target: the dense model's outputs, ``[samples, ...]``.
        samples: in `inputs`.
        total: samples of the batch over all processes.
    """

    inputs: Batch
    target: Target
    samples: int
    total: int


class Distillation:
    """Distillation batches by step; targets are remembered, up to a limit, while batches repeat."""

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

    def __getitem__(self, step: int) -> DistillationBatch:
        rank, world = self._accelerator.process_index, self._accelerator.num_processes
        inputs, low, high, total = local_samples(self._source, step, self._device, rank, world)
        target = self._targets.get(step, lambda: self._target(inputs))
        return DistillationBatch(inputs, target, high - low, total)

    def _target(self, inputs: Batch) -> Target:
        with self.autocast():
            return target_of(self._dense, inputs)

    def autocast(self) -> torch.autocast:
        """The precision of the forward passes."""
        return torch.autocast(self._device.type, torch.bfloat16, enabled=self._bf16)

    def errors(self, model: nn.Module, batch: DistillationBatch) -> Tensor:
        """Divergence of every sample of a batch from the dense model. ``[samples]``."""
        with self.autocast():
            outputs = run(model, batch.inputs, labels=False)
        output = output_tensor(outputs)
        if output.shape != batch.target.output.shape:
            raise BatchError(
                f"the small model gives {list(output.shape)} and the dense one "
                f"{list(batch.target.output.shape)}; tune needs two models with equal outputs."
            )
        return divergence_from(batch.target, outputs, batch.inputs)

    def divergence(self, model: nn.Module) -> float:
        """Mean over the samples of all batches and all processes."""
        total = count = 0.0
        with torch.no_grad():
            for step in range(self._source.length or 0):
                batch = self[step]
                total += float(self.errors(model, batch).double().sum())
                count += batch.samples
        total, count = self.sum(total, count)
        return total / count

    def sum(self, *values: float) -> list[float]:
        """Each value summed over all processes."""
        total = sum_over_processes(torch.tensor(values, dtype=torch.float64), self._device)
        found: list[float] = total.tolist()
        return found
