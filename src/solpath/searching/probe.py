"""The engine for models in memory: forward-backward passes through a masked model."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from solpath.arch import is_foreign, type_of
from solpath.data.preparation import Preparation, preparing
from solpath.data.source import (
    BatchSource,
    batch_size,
    derive_seed,
    local_samples,
    slice_samples,
)
from solpath.errors import NonFiniteLossError, UnsupportedModelError
from solpath.model.basis import Basis, moment_hooks, obstacle, principal_basis, rotated
from solpath.model.checking import check_once
from solpath.model.counting import count_costs
from solpath.model.linear import linear_map
from solpath.model.masks import Masks, energy_hooks, mask_hooks, run_hooks
from solpath.objective import (
    Loss,
    Objective,
    Targets,
    at_least_float,
)
from solpath.pair import Pair, Side
from solpath.planning.cost import CostTable
from solpath.running.forward import Batch, device_of, output_tensor, row_not_finite, run
from solpath.running.modes import differentiating
from solpath.running.processes import process, sum_over_processes
from solpath.searching.redundancy import Inputs, input_hooks, unexplained_variances

_ENERGY_BATCHES = 4

Hooks = Callable[
    [nn.Module, Sequence[Pair], Batch],
    contextlib.AbstractContextManager[Mapping[str, Tensor]],
]
"""A context manager ``hooks(model, pairs, batch)``: while the model runs, it adds up some
statistic of every pair, by pair name and on the CPU."""


class Probe:
    """The `Engine` of a model that is whole in memory: hooks set masks, autograd gives gradients.

    `probing` makes it, freezes the model, and removes the hooks afterwards.

    Args:
        model: The dense model.
        pairs: Its pairs.
        source: The batches, by step.
        prepare: What the batches pass through; it names them in errors.
        masks: The masks that the hooked pairs obey.
        loss: Loss of the user, or None for the divergence from the dense model.
        seed: Seeds the mask draws and all other noise.
    """

    def __init__(
        self,
        model: nn.Module,
        pairs: Sequence[Pair],
        source: BatchSource,
        prepare: Preparation,
        masks: Masks,
        loss: Loss | None,
        seed: int,
    ) -> None:
        self._model, self._source, self._masks = model, source, masks
        self._prepare = prepare
        self._loss, self._seed = loss, seed
        self._device = device_of(model)
        self._rank, self._world = process(self._device)
        self._targets, self._compared = Targets(), Objective(self._first)
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

    def gradients(self, step: int, mask: Tensor, *, binary: bool) -> tuple[float, Tensor, Tensor]:
        """See `Engine.gradients`."""
        batch, low, high, size = self._local(step)
        target = self._target(step, batch)
        rows = mask.float().expand(high - low, -1)
        if binary:
            draws = [
                torch.rand(self.units, generator=self.generator("mask", step, i))
                for i in range(low, high)
            ]
            rows = (torch.stack(draws) < rows).float()
        leaves = self._set(rows)
        outputs = run(self._model, batch, labels=self._loss is not None)
        errors = self._errors(outputs, batch, target)
        loss = errors if target is None else errors.mean()
        gradients = _slopes(loss * (high - low), leaves)
        self._masks.units.clear()
        value = self._sum(loss.detach().double().cpu().view(1) * ((high - low) / size)).item()
        if not torch.isfinite(torch.tensor(value)):
            where = self._where(step, low, errors, target)
            raise NonFiniteLossError(f"the loss of {where} is {value} at step {step}.")
        return value, rows.double(), torch.cat([g.double().cpu() for g in gradients], 1)

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
        dense = torch.ones(self.units) if mask is None else mask.float()
        for step in range(start, start + batches):
            batch, low, high, size = self._local(step)
            target = self._target(step, batch)
            leaves = self._set(dense.repeat(high - low, 1))
            outputs = run(self._model, batch, labels=self._loss is not None)
            errors = self._errors(outputs, batch, target)
            loss = (errors if target is None else errors.mean()) * (high - low)
            if not torch.isfinite(loss):
                where = self._where(step, low, errors, target)
                raise NonFiniteLossError(f"the loss of {where} is {loss.item()}.")
            if target is None:
                slope = _slopes(loss, leaves)
                jacobian = slope
            else:
                slope = _slopes(loss, leaves, keep=True)
                output = output_tensor(outputs)
                noise = torch.stack(
                    [
                        torch.randn(output.shape[1:], generator=self.generator("sketch", step, i))
                        for i in range(low, high)
                    ]
                ).to(output.device)
                draw = self._compared.sketch(target, batch, noise)
                jacobian = _slopes((draw * at_least_float(output)).sum(), leaves)
            self._masks.units.clear()
            rows = torch.cat([j.double().cpu() for j in jacobian], 1)
            rows = rows.abs() if absolute else rows.square()
            first = torch.cat([s.double().cpu() for s in slope], 1)
            diagonal += self._sum(rows.sum(0)) / size
            gradient += self._sum(first.sum(0)) / size
        return diagonal / batches, gradient / batches

    @property
    def energy(self) -> dict[str, Tensor]:
        """See `Engine.energy`."""
        return {name: energy.double().cpu() for name, energy in self._masks.energy.items()}

    def measure_energy(self, batches: int) -> None:
        """Measure, on the dense model, what `Engine.energy` returns.

        Args:
            batches: Number of batches.
        """
        normed = [pair for pair in self.pairs if pair.norms]
        totals = self._add_up(batches, energy_hooks, normed)
        self._masks.energy |= {name: total.to(self._device) for name, total in totals.items()}

    def measure_basis(self, batches: int) -> dict[str, Tensor]:
        """See `Engine.measure_basis`."""
        pairs = [pair for pair in self.pairs if obstacle(self._model, pair) is None]
        return principal_basis(self._model, pairs, self._add_up(batches, moment_hooks, pairs))

    def measure_inputs(self, batches: int) -> Inputs:
        """See `Engine.measure_inputs`."""
        pairs = [pair for pair in self.pairs if pair.kind not in ("qk", "experts")]
        totals = self._add_up(batches, input_hooks, pairs)
        return {name: total for name, total in totals.items() if total.any()}

    def _add_up(self, batches: int, hooks: Hooks, pairs: Sequence[Pair]) -> dict[str, Tensor]:
        """Return what `hooks` add up on the dense model, over batches and all processes."""
        totals: dict[str, Tensor] = {}
        for step in range(batches if pairs else 0):
            batch, low = self._local(step)[:2]
            with torch.no_grad(), hooks(self._model, pairs, batch) as seen:
                outputs = run(self._model, batch, labels=False)
            if not all(value.isfinite().all() for value in seen.values()):
                first = next(part for part in tree_leaves(outputs) if isinstance(part, Tensor))
                where = self._place(step, low, row_not_finite(first))
                raise NonFiniteLossError(f"on {where} the dense model itself is not finite.")
            for name, value in seen.items():
                totals[name] = totals[name] + value if name in totals else value
        return {name: self._sum(total) for name, total in totals.items()}

    def rotated(self, basis: Basis) -> contextlib.AbstractContextManager[Any]:
        """See `Engine.rotated`."""
        return rotated(self._model, self.pairs, basis)

    def unexplained_variance(self, inputs: Inputs, mask: Tensor) -> Tensor:
        """See `Engine.unexplained_variance`."""
        return unexplained_variances(self._model, self.pairs, inputs, mask)

    def measure_reach(self, batches: int) -> Tensor:
        """See `Engine.measure_reach`."""
        seen = self._add_up(batches, run_hooks, self.pairs)
        return torch.stack([(seen[pair.name] > 0).all() for pair in self.pairs])

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

    def _target(self, step: int, batch: Batch) -> Tensor | None:
        """The dense model's output; None where a user's loss takes its place."""
        if self._loss is not None:
            return None
        index = self._source.index(step)
        return self._targets.get(index, lambda: self._compared.target(self._model, batch))

    def _errors(self, outputs: Any, batch: Batch, target: Tensor | None) -> Tensor:
        """The divergence of every sample; a user's loss is one number for all of them."""
        if target is None:
            assert self._loss is not None
            return self._loss(outputs, batch)
        return self._compared.divergence(target, outputs, batch)

    def _where(self, step: int, low: int, errors: Tensor, target: Tensor | None) -> str:
        """The words for the batch, and the row if it is one of this process, that is not finite."""
        place = self._place(step, low, row_not_finite(errors))
        dense = target is not None and row_not_finite(target) is not None
        return f"{place}, on which the dense model itself is not finite," if dense else place

    def _place(self, step: int, low: int, row: int | None) -> str:
        """The words for a row of this process in the batch of a step."""
        index = self._source.index(step)
        index = step if index is None else index
        return self._prepare.place(index, None if row is None else row + low)

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

    Raises:
        UnsupportedModelError: The model is in half precision on a CPU, or its table was registered
            and is wrong (see `check_table`).
        BatchError: There are no batches, or a single one in place of an iterable.
    """
    parameter = next(model.parameters())
    if device_of(model).type == "cpu" and parameter.dtype in (torch.float16, torch.bfloat16):
        raise UnsupportedModelError(
            f"the model is in {parameter.dtype} on the CPU, where masks lose their gradients to "
            "rounding; use model.float(), or a GPU."
        )
    with (
        preparing(model, device_of(model)) as prepare,
        differentiating(model),
        contextlib.ExitStack() as stack,
    ):
        source = BatchSource(batches, seed, prepare)
        if is_foreign(type_of(model)):
            check_once(model, slice_samples(source[0], 0, 2))
        masks = stack.enter_context(mask_hooks(model, pairs))
        probe = Probe(model, pairs, source, prepare, masks, loss, seed)
        probe.measure_energy(_ENERGY_BATCHES)
        yield probe


def _slopes(value: Tensor, leaves: list[Tensor], *, keep: bool = False) -> tuple[Tensor, ...]:
    """Return the gradients of `value` by the masks: 0 for pairs that the batch did not reach."""
    return torch.autograd.grad(
        value, leaves, retain_graph=keep, allow_unused=True, materialize_grads=True
    )
