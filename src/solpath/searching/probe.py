"""The engine for models in memory: forward-backward passes through a masked model."""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from solpath.arch import is_foreign, type_of
from solpath.data.preparation import preparing
from solpath.data.samples import Recording
from solpath.data.source import (
    BatchSource,
    batch_size,
    derive_seed,
    slice_samples,
    work_of,
)
from solpath.errors import NonFiniteLossError, UnsupportedModelError
from solpath.model.basis import Basis, rotated
from solpath.model.checking import check_once
from solpath.model.counting import count_costs
from solpath.model.linear import linear_map
from solpath.model.masks import Masks, mask_hooks
from solpath.objective import (
    TARGET_CACHE_BYTES,
    Loss,
    Objective,
)
from solpath.pair import Pair, Side
from solpath.planning.cost import CostTable
from solpath.running.forward import device_of, output_tensor, row_not_finite
from solpath.running.memory import fits, free_memory, resident_bytes
from solpath.running.modes import differentiating, undoing
from solpath.running.placement import offloads
from solpath.running.processes import join_over_processes, process, sum_over_processes
from solpath.running.recompute import blocks_of, recomputing
from solpath.searching.estimate import Estimate
from solpath.searching.passes import Part, Passes, mask_gradients
from solpath.searching.redundancy import Inputs
from solpath.searching.statistics import Statistics

_ENERGY_BATCHES = 4
LARGE = 32 * 2**20  # bytes of weights from which on the memory of a step is looked at


class Probe:
    """The `Engine` of a model that is whole in memory: hooks set masks, autograd gives gradients.

    `probing` makes it, freezes the model, and removes the hooks afterwards.

    Args:
        model: The dense model.
        pairs: Its pairs.
        source: The batches, by step.
        recording: What all of them pass through.
        compared: How far outputs are from those of the dense model.
        statistics: Of the dense model on the batches.
        masks: The masks that the hooked pairs obey.
        passes: Runs the model under these masks.
        seed: Seeds the mask draws and all other noise.

    Attributes:
        recomputes: Whether `recomputing` is on.
    """

    def __init__(
        self,
        model: nn.Module,
        pairs: Sequence[Pair],
        source: BatchSource,
        recording: Recording,
        compared: Objective,
        statistics: Statistics,
        masks: Masks,
        passes: Passes,
        seed: int,
    ) -> None:
        self._model, self._source, self._recording = model, source, recording
        self._compared, self._statistics = compared, statistics
        self._masks, self._passes, self._seed = masks, passes, seed
        self.recomputes = False
        self.restrict(pairs)

    def restrict(self, pairs: Sequence[Pair]) -> None:
        """See `Engine.restrict`."""
        self.pairs = self._passes.pairs = pairs
        self.units = sum(pair.units for pair in pairs)
        sizes = torch.tensor([pair.units for pair in pairs])
        self.cost = torch.tensor([float(p.cost) for p in pairs], dtype=torch.float64)
        self.cost = self.cost.repeat_interleave(sizes)
        self.pair = torch.arange(len(pairs)).repeat_interleave(sizes)

    def generator(self, *stream: object) -> torch.Generator:
        """See `Engine.generator`."""
        return torch.Generator().manual_seed(derive_seed(self._seed, *stream))

    def new_samples(self) -> Tensor:
        """See `Engine.new_samples`."""
        return join_over_processes(self._recording.take())

    def gradients(self, step: int, mask: Tensor, *, binary: bool) -> tuple[float, Tensor, Tensor]:
        """See `Engine.gradients`."""
        _, low, high, size = self._passes.local(step)
        rows = mask.float().expand(high - low, -1)
        if binary:
            draws = [
                torch.rand(self.units, generator=self.generator("mask", step, i))
                for i in range(low, high)
            ]
            rows = (torch.stack(draws) < rows).float()
        value, slopes, seen = torch.zeros(1, dtype=torch.float64), [], []
        for part in self._passes.parts(step):
            with self._passes.masked(rows[part.low - low : part.high - low]) as leaves:
                errors = self._passes.errors(self._passes.run(part), part)
                loss = errors.mean() * (part.high - part.low)
                slopes.append(mask_gradients(loss, leaves))
            value += loss.detach().double().cpu() / size
            seen.append((part, errors.detach()))
        value = sum_over_processes(value)
        if not value.isfinite():
            where = self._where(step, seen)
            raise NonFiniteLossError(f"the loss of {where} is {value.item()} at step {step}.")
        return value.item(), rows.double(), torch.cat(slopes)

    def mean(self, rows: Tensor, size: int) -> tuple[Tensor, Tensor]:
        """See `Engine.mean`."""
        total, square = sum_over_processes(torch.stack([rows.sum(0), rows.square().sum(0)]))
        mean = total / size
        variance = (square / size - mean.square()).clamp(min=0) / max(size - 1, 1)
        return mean, variance

    def curvature(
        self, batches: int, mask: Tensor | None = None, *, start: int = 0, absolute: bool = False
    ) -> tuple[Tensor, Tensor]:
        """See `Engine.curvature`."""
        diagonal = torch.zeros(self.units, dtype=torch.float64)
        gradient = torch.zeros_like(diagonal)
        for step in range(start, start + batches):
            size = self._passes.local(step)[3]
            for part in self._passes.parts(step):
                rows, slopes = self._derivatives(step, part, mask)
                diagonal += (rows.abs() if absolute else rows.square()).sum(0) / size
                gradient += slopes.sum(0) / size
        return sum_over_processes(diagonal) / batches, sum_over_processes(gradient) / batches

    def _derivatives(self, step: int, part: Part, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the derivatives of the projected outputs of every sample, and those of its loss.

        Under a loss of the user both are those of the loss. At the dense model, where `mask` is
        None, the divergence is 0, and so is its derivative.
        """
        samples = part.high - part.low
        rows = torch.ones(self.units) if mask is None else mask.float()
        with self._passes.masked(rows.repeat(samples, 1)) as leaves:
            outputs = self._passes.run(part)
            slopes = torch.zeros(samples, self.units, dtype=torch.float64)
            if part.target is None or mask is not None:
                errors = self._passes.errors(outputs, part)
            else:
                errors = output_tensor(outputs)
            if not errors.isfinite().all():
                where = self._where(step, [(part, errors)])
                raise NonFiniteLossError(f"the loss of {where} is {float(errors.mean())}.")
            if part.target is None or mask is not None:
                loss, keep = errors.mean() * samples, part.target is not None
                slopes = mask_gradients(loss, leaves, keep=keep)
            if part.target is None:
                return slopes, slopes
            generators = [self.generator("sketch", step, i) for i in range(part.low, part.high)]
            draws = self._compared.projection(part.target, outputs, part.batch, generators)
            return mask_gradients(draws.sum(), leaves), slopes

    @property
    def energy(self) -> dict[str, Tensor]:
        """See `Engine.energy`."""
        return {name: energy.double().cpu() for name, energy in self._masks.energy.items()}

    def measure_energy(self, batches: int) -> None:
        """Measure, on the dense model, what `Engine.energy` returns.

        Args:
            batches: Number of batches.
        """
        totals = self._statistics.energy(self.pairs, batches)
        self._masks.energy |= {
            name: total.to(self._passes.device) for name, total in totals.items()
        }

    def measure_basis(self, batches: int) -> dict[str, Tensor]:
        """See `Engine.measure_basis`."""
        return self._statistics.basis(self.pairs, batches)

    def measure_inputs(self, batches: int) -> Inputs:
        """See `Engine.measure_inputs`."""
        return self._statistics.inputs(self.pairs, batches)

    def measure_reach(self, batches: int) -> Tensor:
        """See `Engine.measure_reach`."""
        return self._statistics.reach(self.pairs, batches)

    def unexplained_variance(self, inputs: Inputs, mask: Tensor) -> Tensor:
        """See `Engine.unexplained_variance`."""
        return self._statistics.unexplained_variance(self.pairs, inputs, mask)

    def rotated(self, basis: Basis) -> contextlib.AbstractContextManager[Any]:
        """See `Engine.rotated`."""
        return rotated(self._model, self.pairs, basis)

    def weight_norms(self, pair: Pair, side: Side) -> Tensor:
        """See `Engine.weight_norms`."""
        linear = linear_map(self._model, side.module)
        unit = pair.unit_of_channel(side)
        square = linear.read(linear.weight).double().cpu().square()
        channels = square.sum(linear.dim(1 - side.axis)).flatten()[pair.channels_of(side)]
        return torch.zeros(pair.units, dtype=torch.float64).index_add(0, unit, channels)

    def count_costs(self) -> CostTable:
        """See `Engine.count_costs`."""
        return count_costs(self._model, self.pairs, slice_samples(self._source[0], 0, 1))

    def batch_size(self, step: int) -> int:
        """See `Engine.batch_size`."""
        return batch_size(self._source[step])

    def work(self, step: int) -> tuple[int, str]:
        """See `Engine.work`."""
        return work_of(self._source[step])

    def estimate(self, passes: float, masks: int, looks: tuple[int, int] = (0, 0)) -> Estimate:
        """See `Engine.estimate`. Processes do not wait for each other."""
        known, distinct = self._source.index(1) is not None, self._source.length
        start = perf_counter()
        parts = list(self._passes.parts(1, remember=False))  # the model may be turned later
        target = perf_counter() - start
        start = perf_counter()
        for part in parts:
            with self._passes.masked(torch.ones(part.high - part.low, self.units)) as leaves:
                errors = self._passes.errors(self._passes.run(part), part)
                mask_gradients(errors.mean(), leaves)
        seconds = perf_counter() - start
        bytes_each = sum(v.nbytes for v in tree_leaves([p.target for p in parts]) if v is not None)
        times = min(passes, distinct) if known and distinct is not None else passes
        device, samples = self._passes.device, self._passes.samples
        work = self._statistics.inputs_work(self.pairs, *looks)
        return Estimate(
            seconds=seconds * passes + target * times + work.seconds,
            weights=resident_bytes(self._model),
            step=self._passes.step_memory(),
            moments=work.peak,
            kept=round(min(times * bytes_each, TARGET_CACHE_BYTES) if known else 0)
            + self.units * (4 * masks + 8 * (8 * samples + 16))
            + work.kept,
            free=free_memory(device),
            samples=self.batch_size(0),
            device=str(device),
            recompute=self.recomputes,
        )

    def _where(self, step: int, seen: Sequence[tuple[Part, Tensor]]) -> str:
        """The words for the batch, and the row if it is one of this process, that is not finite."""
        for part, errors in seen:
            row = row_not_finite(errors)
            if row is None:
                continue
            place = self._statistics.place(step, row + part.low)
            finite = all(value.isfinite().all() for value in tree_leaves(part.target))
            return place if finite else f"{place}, on which the dense model itself is not finite,"
        return self._statistics.place(step, None)


@contextlib.contextmanager
def probing(
    model: nn.Module,
    pairs: Sequence[Pair],
    batches: Iterable[Any],
    *,
    loss: Loss | None,
    seed: int,
    recompute: bool | None = None,
    micro_batch: int | None = None,
) -> Iterator[Probe]:
    """Yield a `Probe` of `model`, frozen and hooked, and leave the model as it was found.

    Weights, buffers, hooks, training flags, ``requires_grad`` and torch's random state come back
    bit for bit, whatever happens in the block.

    Args:
        model: The dense model.
        pairs: Its pairs.
        batches: See `solpath.search`.
        loss: See `solpath.search`.
        seed: Seeds the mask draws and all other noise.
        recompute: See `solpath.search`.
        micro_batch: See `solpath.search`.

    Raises:
        UnsupportedModelError: The model is in float16, or its table was registered and is wrong
            (see `check_table`).
        BatchError: There are no batches, or a single one in place of an iterable.
    """
    parameter = next(model.parameters())
    if parameter.dtype == torch.float16:
        raise UnsupportedModelError(
            "the model is in float16, in which the gradients of masks underflow; load it with "
            "dtype=torch.bfloat16 or dtype=torch.float32."
        )
    with (
        preparing(model, device_of(model)) as prepare,
        differentiating(model),
        contextlib.ExitStack() as stack,
    ):
        recording = Recording(prepare)
        source = BatchSource(batches, seed, recording)
        if is_foreign(type_of(model)):
            check_once(model, slice_samples(source[0], 0, 2))
        masks = stack.enter_context(mask_hooks(model, pairs))
        compared = Objective(model, lambda: source[0])
        objective = compared if loss is None else None
        if objective is not None:
            objective.learn(source[0])  # of the model as it is, before its axes are turned
        statistics = Statistics(model, source, prepare, objective, *process(device_of(model)))
        stack.enter_context(undoing(statistics.close))
        passes = Passes(model, source, compared, masks, loss, micro_batch)
        probe = Probe(model, pairs, source, recording, compared, statistics, masks, passes, seed)
        probe.measure_energy(_ENERGY_BATCHES)
        if recompute is None:
            recompute = any(map(offloads, model.modules())) or (
                resident_bytes(model) > LARGE and not fits(passes.step_memory(), device_of(model))
            )
        if recompute:
            blocks = blocks_of(model, [pair.right.module for pair in pairs])
            stack.enter_context(recomputing(model, blocks))
            probe.recomputes = True
        yield probe
