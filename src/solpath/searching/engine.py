"""What a search or a baseline may ask of a model, and which engine answers.

Searches see a model only through an `Engine`. To search a model whose weights are elsewhere,
write a second class with these methods and a second branch in `open_engine`; no search changes.
"""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from solpath.model.basis import Basis
from solpath.model.discovery import find_pairs
from solpath.objective import Loss
from solpath.pair import Pair, Side
from solpath.planning.cost import CostTable
from solpath.searching.estimate import Estimate
from solpath.searching.probe import probing
from solpath.searching.redundancy import Inputs


class Engine(Protocol):
    """What answers a search's questions to one model, on one stream of batches.

    All vectors run over the units of all pairs, laid end to end. In a distributed run every process
    sees the same batches, takes its own samples of each, and gets the same averages back. On one
    device the same seed gives the same bits, whichever engine answers.

    Attributes:
        pairs: The pairs of the model.
        units: Number of units.
        cost: Parameters of every unit, float64 ``[units]``.
        pair: Index of the pair of every unit, int64 ``[units]``.
    """

    pairs: Sequence[Pair]
    units: int
    cost: Tensor
    pair: Tensor

    @property
    def energy(self) -> Mapping[str, Tensor]:
        """Sums of squares of normed queries and keys; see `SolutionPath.energy`."""

    def generator(self, *stream: object) -> torch.Generator:
        """Return a random generator that depends only on the seed and on `stream`.

        Args:
            stream: Values that name the purpose, such as ``"mask", 3``.
        """

    def restrict(self, pairs: Sequence[Pair]) -> None:
        """Forget all other pairs: from now on vectors run over the units of `pairs`.

        Args:
            pairs: Some of the engine's pairs, in their order.
        """

    def batch_size(self, step: int) -> int:
        """Return the number of samples in batch `step`, over all processes.

        Args:
            step: Batch number.

        Raises:
            BatchError: The batch has no tensor or no samples.
        """

    def work(self, step: int) -> tuple[int, str]:
        """Return how much there is to compute in batch `step`; see `solpath.data.source.work_of`.

        Args:
            step: Batch number.
        """

    def new_samples(self) -> Tensor:
        """Return digests of the samples that were first read since the last call, in all processes.

        All processes must call it. What comes is int64 ``[samples]``, the same in each; a sample
        may be among them twice, or again. See `solpath.data.samples.sample_digests`.
        """

    def gradients(self, step: int, mask: Tensor, *, binary: bool) -> tuple[float, Tensor, Tensor]:
        """Return the loss, the masks and the mask gradients of one batch.

        Args:
            step: Batch number. It also seeds the draw of the masks.
            mask: Expected mask, ``[units]``.
            binary: Draw one mask of 0 and 1 for every sample. False uses `mask` itself.

        Returns:
            The mean loss over the whole batch; the mask of every local sample; the gradient of that
            sample's own loss by its mask. Both are float64 ``[local samples, units]``.

        Raises:
            BatchError: The batch is on another device, or has fewer samples than processes.
            NonFiniteLossError: The loss is NaN or infinite.
        """

    def mean(self, rows: Tensor, size: int) -> tuple[Tensor, Tensor]:
        """Return the mean over the samples of all processes, and the variance of that mean.

        Args:
            rows: One row for every local sample, ``[local samples, units]``.
            size: Samples in the whole batch.
        """

    def curvature(
        self, batches: int, mask: Tensor | None = None, *, start: int = 0, absolute: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Return the Gauss-Newton diagonal and the gradient at a fixed mask, averaged over batches.

        For the built-in objectives the diagonal is ``E[(∂⟨u, f⟩/∂M_i)²]``, where the covariance of
        u is the curvature of the loss in the output f. For a loss of the user it is the empirical
        Fisher diagonal ``E[(∂ℓ/∂M_i)²]`` over samples. See docs/method.md, "Objective".

        Args:
            batches: Number of batches.
            mask: Mask, ``[units]``. None is the dense model.
            start: Number of the first batch.
            absolute: Average absolute values in place of squares.

        Returns:
            The diagonal and the gradient of the loss, each float64 ``[units]``.

        Raises:
            BatchError: A batch is on another device, or has fewer samples than processes.
            NonFiniteLossError: The loss is NaN or infinite.
        """

    def measure_basis(self, batches: int) -> dict[str, Tensor]:
        """Return the principal axes of every pair that can be rotated, measured on the dense model.

        Args:
            batches: Number of batches.

        Returns:
            Pair name to axes, see `solpath.model.basis.principal_basis`.
        """

    def measure_inputs(self, batches: int) -> Inputs:
        """Return second moments of what right-hand layers of value-output and MLP pairs get.

        Args:
            batches: Number of batches.

        Returns:
            See `solpath.searching.redundancy.Inputs`. Pairs that no batch reached are left out.
        """

    def measure_reach(self, batches: int) -> Tensor:
        """Return which pairs run at all on the first batches, bool ``[pairs]``.

        Args:
            batches: Number of batches.
        """

    def rotated(self, basis: Basis) -> AbstractContextManager[Any]:
        """Return a context manager in which the units lie along `basis`.

        Args:
            basis: Pair name to axes; other pairs keep theirs.
        """

    def unexplained_variance(self, inputs: Inputs, mask: Tensor) -> Tensor:
        """Return the share of every unit's variance that kept units cannot predict, ``[units]``.

        Args:
            inputs: From `measure_inputs`.
            mask: Probability that each unit is kept, ``[units]``.
        """

    def weight_norms(self, pair: Pair, side: Side) -> Tensor:
        """Return the squared norm of every unit's weights in one layer, float64 ``[pair.units]``.

        Args:
            pair: One of `pairs`.
            side: The layer, one of the pair's sides.
        """

    def count_costs(self) -> CostTable:
        """Return what the model and every unit cost, counted on one sample of the first batch.

        Raises:
            BatchError: The batch is on another device, or has no samples.
            ConfigError: A measure does not count one whole number for every pair.
        """

    def estimate(self, passes: float, masks: int, looks: tuple[int, int] = (0, 0)) -> Estimate:
        """Return what some passes take, from one pass that is timed. Nothing is changed.

        Args:
            passes: Forward-backward passes, of one batch each.
            masks: Masks of all units that are kept, in half precision.
            looks: Batches on which `measure_inputs` is asked for moments, and how often
                `unexplained_variance` is asked for afterwards.
        """


def open_engine(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    loss: Loss | None,
    seed: int,
    recompute: bool | None = None,
    micro_batch: int | None = None,
) -> AbstractContextManager[Engine]:
    """Return a context manager that yields the engine of a model.

    When the block ends, the model is as it was found. Today every model is searched in memory.

    Args:
        model: The dense model.
        batches: See `solpath.search`.
        loss: See `solpath.search`.
        seed: Seeds the mask draws and all other noise.
        recompute: See `solpath.search`.
        micro_batch: See `solpath.search`.

    Raises:
        UnsupportedModelError: The model cannot be cut (see `find_pairs`), or it is in float16.
        BatchError: There are no batches, or a single one in place of an iterable.

    Example:
        >>> with open_engine(model, batches, loss=None, seed=0) as engine:
        ...     loss, masks, gradients = engine.gradients(0, torch.ones(engine.units), binary=False)
        >>> gradients.shape
        torch.Size([8, 256])
    """
    return probing(
        model,
        find_pairs(model),
        batches,
        loss=loss,
        seed=seed,
        recompute=recompute,
        micro_batch=micro_batch,
    )
