"""The engine for models in memory: forward-backward passes through a masked model."""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from time import perf_counter
from typing import Any, NamedTuple

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
    local_samples,
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
    Target,
    Targets,
)
from solpath.pair import Pair, Side
from solpath.planning.cost import CostTable
from solpath.running.forward import Batch, device_of, output_tensor, row_not_finite, run
from solpath.running.memory import fits, free_memory, peak_memory, resident_bytes
from solpath.running.modes import differentiating, undoing
from solpath.running.placement import offloads
from solpath.running.processes import join_over_processes, process, sum_over_processes
from solpath.running.recompute import blocks_of, recomputing
from solpath.searching.estimate import Estimate
from solpath.searching.redundancy import Inputs
from solpath.searching.statistics import Statistics

_ENERGY_BATCHES = 4
LARGE = 32 * 2**20  # bytes of weights from which on the memory of a step is looked at


class _Part(NamedTuple):
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
        loss: Loss of the user, or None for the divergence from the dense model.
        seed: Seeds the mask draws and all other noise.
        micro_batch: Samples that run at once. None runs all samples of a batch.

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
        loss: Loss | None,
        seed: int,
        micro_batch: int | None,
    ) -> None:
        self._model, self._source, self._masks = model, source, masks
        self._micro_batch, self._recording = micro_batch, recording
        self.recomputes = False
        self._loss, self._seed = loss, seed
        self._device = device_of(model)
        self._rank, self._world = process(self._device)
        self._targets: Targets[list[Target]] = Targets()
        self._compared, self._statistics = compared, statistics
        self.restrict(pairs)

    def restrict(self, pairs: Sequence[Pair]) -> None:
        """See `Engine.restrict`."""
        self.pairs = pairs
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
        _, low, high, size = self._local(step)
        rows = mask.float().expand(high - low, -1)
        if binary:
            draws = [
                torch.rand(self.units, generator=self.generator("mask", step, i))
                for i in range(low, high)
            ]
            rows = (torch.stack(draws) < rows).float()
        value, slopes, seen = torch.zeros(1, dtype=torch.float64), [], []
        for part in self._parts(step):
            leaves = self._set(rows[part.low - low : part.high - low])
            errors = self._errors(self._run(part), part)
            loss = errors.mean() * (part.high - part.low)
            slopes.append(_slopes(loss, leaves))
            self._masks.units.clear()
            value += loss.detach().double().cpu() / size
            seen.append((part, errors.detach()))
        value = self._sum(value)
        if not value.isfinite():
            where = self._where(step, seen)
            raise NonFiniteLossError(f"the loss of {where} is {value.item()} at step {step}.")
        return value.item(), rows.double(), torch.cat(slopes)

    def mean(self, rows: Tensor, size: int) -> tuple[Tensor, Tensor]:
        """See `Engine.mean`."""
        total, square = self._sum(torch.stack([rows.sum(0), rows.square().sum(0)]))
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
            size = self._local(step)[3]
            for part in self._parts(step):
                rows, slopes = self._derivatives(step, part, mask)
                diagonal += (rows.abs() if absolute else rows.square()).sum(0) / size
                gradient += slopes.sum(0) / size
        return self._sum(diagonal) / batches, self._sum(gradient) / batches

    def _derivatives(self, step: int, part: _Part, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the derivatives of the projected outputs of every sample, and those of its loss.

        Under a loss of the user both are those of the loss. At the dense model, where `mask` is
        None, the divergence is 0, and so is its derivative.
        """
        samples = part.high - part.low
        rows = torch.ones(self.units) if mask is None else mask.float()
        leaves = self._set(rows.repeat(samples, 1))
        outputs = self._run(part)
        slopes = torch.zeros(samples, self.units, dtype=torch.float64)
        if part.target is None or mask is not None:
            errors = self._errors(outputs, part)
        else:
            errors = output_tensor(outputs)
        if not errors.isfinite().all():
            where = self._where(step, [(part, errors)])
            raise NonFiniteLossError(f"the loss of {where} is {float(errors.mean())}.")
        if part.target is None or mask is not None:
            slopes = _slopes(errors.mean() * samples, leaves, keep=part.target is not None)
        if part.target is None:
            projected = slopes
        else:
            generators = [self.generator("sketch", step, i) for i in range(part.low, part.high)]
            draws = self._compared.projection(part.target, outputs, part.batch, generators)
            projected = _slopes(draws.sum(), leaves)
        self._masks.units.clear()
        return projected, slopes

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
        self._masks.energy |= {name: total.to(self._device) for name, total in totals.items()}

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
        return count_costs(self._model, self.pairs, slice_samples(self._first(), 0, 1))

    def batch_size(self, step: int) -> int:
        """See `Engine.batch_size`."""
        return batch_size(self._source[step])

    def work(self, step: int) -> tuple[int, str]:
        """See `Engine.work`."""
        return work_of(self._source[step])

    def step_memory(self) -> int:
        """Return about how many bytes a pass has alive beyond the weights.

        It grows with the samples in a straight line, which passes of one and of two samples show.
        """
        each = -(-self.batch_size(0) // self._world)
        each = min(each, self._micro_batch or each)
        found = [self._pass_memory(samples) for samples in range(1, min(each, 2) + 1)]
        return found[0] + (each - 1) * (found[-1] - found[0])

    def _pass_memory(self, samples: int) -> int:
        """Return how many bytes a pass of a few samples of the first batch has alive.

        A user's loss may not take so few; the sum of the outputs takes its place.
        """
        batch = slice_samples(self._first(), 0, samples)
        target = None if self._loss is not None else self._compared.target(batch)
        part = _Part(batch, 0, samples, target)

        def one_pass() -> None:
            leaves = self._set(torch.ones(samples, self.units))
            if target is None:
                values = tree_leaves(run(self._model, batch, labels=False))
                value = next(v for v in values if isinstance(v, Tensor) and v.requires_grad).sum()
            else:
                value = self._errors(self._run(part), part).sum()
            _slopes(value, leaves)

        peak, _ = peak_memory(one_pass, device=self._device, passing=True)
        self._masks.units.clear()
        return peak

    def estimate(self, passes: float, masks: int, looks: tuple[int, int] = (0, 0)) -> Estimate:
        """See `Engine.estimate`. Processes do not wait for each other."""
        known, distinct = self._source.index(1) is not None, self._source.length
        start = perf_counter()
        parts = list(self._parts(1))  # with their targets, which are remembered if they can be
        target = perf_counter() - start
        start = perf_counter()
        for part in parts:
            leaves = self._set(torch.ones(part.high - part.low, self.units))
            _slopes(self._errors(self._run(part), part).mean(), leaves)
            self._masks.units.clear()
        seconds = perf_counter() - start
        bytes_each = sum(v.nbytes for v in tree_leaves([p.target for p in parts]) if v is not None)
        times = min(passes, distinct) if known and distinct is not None else passes
        samples = -(-self.batch_size(0) // self._world)
        work = self._statistics.inputs_work(self.pairs, *looks)
        return Estimate(
            seconds=seconds * passes + target * times + work.seconds,
            weights=resident_bytes(self._model),
            step=self.step_memory(),
            moments=work.peak,
            kept=round(min(times * bytes_each, TARGET_CACHE_BYTES))
            + self.units * (4 * masks + 8 * (8 * samples + 16))
            + work.kept,
            free=free_memory(self._device),
            samples=self.batch_size(0),
            device=str(self._device),
            recompute=self.recomputes,
        )

    def _local(self, step: int) -> tuple[Batch, int, int, int]:
        return local_samples(self._source, step, self._rank, self._world)

    def _set(self, rows: Tensor) -> list[Tensor]:
        """Mask each sample by its row of `rows`, ``[samples, units]``; return the masks by pair."""
        parts = torch.split(rows.to(self._device), [pair.units for pair in self.pairs], 1)
        leaves = [part.contiguous().requires_grad_() for part in parts]
        self._masks.units.update({p.name: leaf for p, leaf in zip(self.pairs, leaves, strict=True)})
        return leaves

    def _first(self) -> Batch:
        return self._source[0]

    def _parts(self, step: int) -> Iterator[_Part]:
        """Yield the samples of this process in the batch of a step, a micro-batch at a time."""
        batch, low, high, _ = self._local(step)
        each = self._micro_batch or high - low
        cuts = [(start, min(start + each, high)) for start in range(low, high, each)]
        batches = [slice_samples(batch, start - low, end - low) for start, end in cuts]
        targets: Sequence[Target | None] = [None] * len(cuts)
        if self._loss is None:
            index = self._source.index(step)
            targets = self._targets.get(index, lambda: list(map(self._compared.target, batches)))
        for cut, part, target in zip(cuts, batches, targets, strict=True):
            yield _Part(part, *cut, target)

    def _run(self, part: _Part) -> Any:
        """The outputs that are compared, under the masks; those of the model for a user's loss."""
        if part.target is None:
            return run(self._model, part.batch, labels=True)
        return self._compared.run(self._model, part.batch)

    def _errors(self, outputs: Any, part: _Part) -> Tensor:
        """The divergence of every sample; a user's loss is one number for all of them."""
        if part.target is None:
            assert self._loss is not None
            return self._loss(outputs, part.batch)
        return self._compared.divergence(part.target, outputs, part.batch)

    def _where(self, step: int, seen: Sequence[tuple[_Part, Tensor]]) -> str:
        """The words for the batch, and the row if it is one of this process, that is not finite."""
        for part, errors in seen:
            row = row_not_finite(errors)
            if row is None:
                continue
            place = self._statistics.place(step, row + part.low)
            finite = all(value.isfinite().all() for value in tree_leaves(part.target))
            return place if finite else f"{place}, on which the dense model itself is not finite,"
        return self._statistics.place(step, None)

    def _sum(self, values: Tensor) -> Tensor:
        return sum_over_processes(values)


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
        statistics = Statistics(model, source, prepare, objective, *process(device_of(model)))
        stack.enter_context(undoing(statistics.close))
        probe = Probe(
            model, pairs, source, recording, compared, statistics, masks, loss, seed, micro_batch
        )
        probe.measure_energy(_ENERGY_BATCHES)
        if recompute is None:
            recompute = any(map(offloads, model.modules())) or (
                resident_bytes(model) > LARGE and not fits(probe.step_memory(), device_of(model))
            )
        if recompute:
            blocks = blocks_of(model, [pair.right.module for pair in pairs])
            stack.enter_context(recomputing(model, blocks))
            probe.recomputes = True
        yield probe


def _slopes(value: Tensor, leaves: list[Tensor], *, keep: bool = False) -> Tensor:
    """Return the gradients of `value` by the masks, float64 ``[samples, units]`` on the CPU.

    They are 0 for pairs that the batch did not reach.
    """
    slopes = torch.autograd.grad(
        value, leaves, retain_graph=keep, allow_unused=True, materialize_grads=True
    )
    return torch.cat(slopes, 1).double().cpu()
