"""What a search or a baseline may ask of a model, and which implementation answers.

Searches see a model through an `Engine` only. One that holds the weights in another place is a
second class with these methods and a second branch in `open_engine`; no search changes.
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
from solpath.searching.probe import probing
from solpath.searching.redundancy import Inputs


class Engine(Protocol):
    """Gradients, curvature and statistics of one masked model on one stream of batches.

    All vectors run over the units of all pairs laid end to end. In a distributed run every process
    sees the same batches, takes its share of the samples of each, and gets the same averages back.
    The same seed gives the same bits, whichever engine answers on one device.

    Attributes:
        pairs: what can be pruned in the model.
        units: number of units.
        cost: parameters per unit, float64 ``[units]``.
        pair: index of the pair of every unit, int64 ``[units]``.
    """

    pairs: Sequence[Pair]
    units: int
    cost: Tensor
    pair: Tensor

    @property
    def energy(self) -> Mapping[str, Tensor]:
        """Sums of squares of normed queries and keys; see `SolutionPath.energy`."""

    def generator(self, *stream: object) -> torch.Generator:
        """A random generator that depends on the seed and on `stream` only."""

    def batch_size(self, step: int) -> int:
        """Samples of batch `step`, over all processes."""

    def gradients(self, step: int, mask: Tensor, *, binary: bool) -> tuple[float, Tensor, Tensor]:
        """Loss, mask and mask gradient of every local sample of batch `step`.

        Args:
            step: batch number; also the stream of the draw.
            mask: expected mask, ``[units]``.
            binary: draw 0/1 masks from it, one for every sample; else use it as it is.

        Returns:
            Mean loss over the whole batch; masks used and gradients of each sample's own loss,
            both float64 ``[local samples, units]``.

        Raises:
            NonFiniteLossError: the loss is NaN or infinite.
        """

    def mean(self, rows: Tensor, size: int) -> tuple[Tensor, Tensor]:
        """Mean over all samples of all processes, and the variance of that mean.

        Args:
            rows: ``[local samples, units]``.
            size: samples in the whole batch.
        """

    def curvature(
        self, batches: int, mask: Tensor | None = None, *, start: int = 0, absolute: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Gauss-Newton diagonal and gradient at a fixed mask, averaged over some batches.

        For the built-in objectives the diagonal is ``E[(∂⟨u, f⟩/∂M_i)²]`` with u drawn with the
        covariance of the output's loss curvature; for a user's loss it is the empirical Fisher
        ``E[(∂ℓ/∂M_i)²]`` over samples.

        Args:
            batches: how many.
            mask: ``[units]``; None is the dense model.
            start: number of the first batch.
            absolute: return ``E[|·|]`` in place of the mean square.

        Returns:
            Diagonal and gradient of the loss, float64 ``[units]``.
        """

    def measure_basis(self, batches: int) -> dict[str, Tensor]:
        """Principal axes of every pair that can be rotated, from some batches of the dense model.

        Returns:
            See `solpath.model.basis.principal_basis`.
        """

    def measure_inputs(self, batches: int) -> Inputs:
        """What the right-hand layers of value-output and MLP pairs see, on some batches."""

    def rotated(self, basis: Basis) -> AbstractContextManager[Any]:
        """A block in which the units are those along `basis`."""

    def unexplained_variance(self, inputs: Inputs, mask: Tensor) -> Tensor:
        """Share of every unit's variance that the kept units cannot predict. ``[units]``."""

    def weight_norms(self, pair: Pair, side: Side) -> Tensor:
        """Squared norm of every unit's weights in one layer of `pair`. float64 ``[pair.units]``."""

    def count_costs(self) -> CostTable:
        """What the model and every unit cost, on the first sample of the first batch."""


def open_engine(
    model: nn.Module, batches: Iterable[Any], *, loss: Loss | None, seed: int
) -> AbstractContextManager[Engine]:
    """The engine for a model, which leaves the model as it was found when the block ends.

    Today every model is searched where it is, in memory.

    Args:
        model: the dense model.
        batches: see `solpath.search`.
        loss: see `solpath.search`.
        seed: of the mask draws and of all other noise.

    Raises:
        UnsupportedModelError: see `find_pairs`; or half precision on a CPU.
    """
    return probing(model, find_pairs(model), batches, loss=loss, seed=seed)
