"""Make distillation batches, and measure how far a model is from the dense model on them."""

from typing import NamedTuple, cast

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from solpath.data.preparation import Preparation
from solpath.data.source import BatchSource, check_device, local_samples, work_of
from solpath.errors import BatchError
from solpath.objective import Loss, Objective, Targets, mean_loss
from solpath.running.forward import Batch, device_of, output_tensor, row_not_finite, run
from solpath.running.processes import sum_over_processes


class DistillationBatch(NamedTuple):
    """The samples of one batch that this process takes, with the dense model's outputs for them.

    Attributes:
        inputs: The samples, as the models take them.
        target: The dense targets, ``[samples, ...]``; None where a loss takes their place.
        step: The number of the batch.
        low: The number of the first sample of `inputs` in the batch.
        samples: Number of samples in `inputs`.
        total: Number of samples of the batch over all processes.
        work: How much there is to compute in the batch over all processes, with its unit.
    """

    inputs: Batch
    target: Tensor | None
    step: int
    low: int
    samples: int
    total: int
    work: tuple[int, str]


class Distillation:
    """Distillation batches by step number, and the divergence of a model on them.

    Dense targets are remembered up to a limit, if `source` knows how many batches repeat.

    Args:
        dense: The dense model.
        source: The batches.
        prepare: What the batches pass through; it names them in errors.
        device: The device of the models and the batches.
        accelerator: Knows which samples of a batch this process takes.
        bf16: Whether forward passes run in bfloat16 autocast.
        loss: A user's loss, in place of the divergence from the dense model.

    Attributes:
        loss: As given.
    """

    def __init__(
        self,
        dense: nn.Module,
        source: BatchSource,
        prepare: Preparation,
        device: torch.device,
        accelerator: Accelerator,
        *,
        bf16: bool,
        loss: Loss | None,
    ) -> None:
        self._dense, self._source, self._device = dense, source, device
        self._prepare = prepare
        self._accelerator, self._bf16 = accelerator, bf16
        self.loss = loss
        self._targets: Targets[Tensor] = Targets()
        self._compared = Objective(dense, self._first, whole=True)

    def __getitem__(self, step: int) -> DistillationBatch:
        rank, world = self._accelerator.process_index, self._accelerator.num_processes
        inputs, low, high, total = local_samples(self._source, step, rank, world)
        target = None
        if self.loss is None:
            target = self._targets.get(self._source.index(step), lambda: self._target(inputs))
        work = work_of(self._source[step])
        return DistillationBatch(inputs, target, step, low, high - low, total, work)

    def _first(self) -> Batch:
        return self._source[0]

    def _target(self, inputs: Batch) -> Tensor:
        check_device(inputs, device_of(self._dense))
        with self.autocast():
            return cast("Tensor", self._compared.target(inputs))

    def autocast(self) -> torch.autocast:
        """Return a block that sets the precision of the forward passes.

        Nothing is kept of the weights in bfloat16: torch forgets them only at the end of the
        outermost block, which may be the caller's, around all updates.
        """
        kind, on = self._device.type, self._bf16
        return torch.autocast(kind, torch.bfloat16, enabled=on, cache_enabled=False)

    def errors(self, model: nn.Module, batch: DistillationBatch) -> Tensor:
        """Return the divergence of every sample of a batch from the dense model, ``[samples]``.

        Args:
            model: The smaller model, on the device of the batch.
            batch: A distillation batch, from this object by step number.

        Raises:
            BatchError: The outputs of the two models differ in shape.
            ConfigError: The loss is not one that can be trained on, see `mean_loss`.
        """
        with self.autocast():
            outputs = run(model, batch.inputs, labels=self.loss is not None)
            if self.loss is not None:
                return mean_loss(self.loss, outputs, batch.inputs).expand(batch.samples)
        output = output_tensor(outputs)
        assert batch.target is not None
        if output.shape != batch.target.shape:
            raise BatchError(
                f"the small model gives {list(output.shape)} and the dense one "
                f"{list(batch.target.shape)}; tune needs two models with equal outputs."
            )
        return self._compared.divergence(batch.target, outputs, batch.inputs)

    def where_not_finite(self, batch: DistillationBatch, errors: Tensor) -> str:
        """Return the words for a batch, and for its first row whose error is not finite.

        The row is left out where it is not known: under a loss, which is one number for all rows,
        and where another process has it.

        Args:
            batch: A distillation batch, from this object by step number.
            errors: From `errors`, for this batch.
        """
        row = None if self.loss is not None else row_not_finite(errors)
        index = self._source.index(batch.step)
        index = batch.step if index is None else index
        return self._prepare.place(index, None if row is None else row + batch.low)

    def first_not_finite(self, model: nn.Module) -> str:
        """Return the words for the first batch on which a model's divergence is not finite."""
        with torch.no_grad():
            for step in range(self._source.length or 0):
                errors = self.errors(model, batch := self[step])
                if not errors.isfinite().all():
                    return self.where_not_finite(batch, errors)
        return "some batch of another process"

    def divergence(self, model: nn.Module) -> float:
        """Return the mean divergence of `model` over the samples of all batches and all processes.

        The source must know how many batches it has.
        """
        total = count = 0.0
        with torch.no_grad():
            for step in range(self._source.length or 0):
                batch = self[step]
                total += float(self.errors(model, batch).double().sum())
                count += batch.samples
        total, count = self.sum(total, count)
        return total / count

    def sum(self, *values: float) -> list[float]:
        """Return the sum of each value over all processes."""
        total = sum_over_processes(torch.tensor(values, dtype=torch.float64))
        found: list[float] = total.tolist()
        return found
