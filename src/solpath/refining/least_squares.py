"""Ridge regression from moments: what a layer lacks, fitted in closed form."""

from typing import NamedTuple

import torch
from torch import Tensor


class Moments(NamedTuple):
    """What a least-squares fit needs to know of the tokens, in float64.

    Let x be an input followed by 1, r what is to be added to the output, w the weight of a token.

    Attributes:
        square: Σ w x xᵀ, ``[in + 1, in + 1]``.
        cross: Σ w r xᵀ, ``[out, in + 1]``.
    """

    square: Tensor
    cross: Tensor

    @classmethod
    def zeros(cls, outputs: int, inputs: int, device: torch.device) -> "Moments":
        """Return the moments of no tokens; `inputs` counts the 1 that follows an input."""
        shapes = (inputs, inputs), (outputs, inputs)
        return cls(*(torch.zeros(s, dtype=torch.float64, device=device) for s in shapes))

    def plus_(self, square: Tensor, cross: Tensor) -> "Moments":
        """Add the moments of other tokens in place."""
        self.square.add_(square)
        self.cross.add_(cross)
        return self

    def lacking(self, present: Tensor) -> "Moments":
        """Return the moments with r less what a layer ``[out, in + 1]`` already gives."""
        return Moments(self.square, self.cross - present @ self.square)

    def mapped(self, weight: Tensor) -> "Moments":
        """Return the moments with ``weight @ r`` in place of r."""
        return Moments(self.square, weight @ self.cross)

    def solve(self, ridge: float, bias: bool) -> Tensor:
        """Return the change of weight and bias, ``[out, in + 1]``, with 0 for an absent bias."""
        square, cross = self.square[:-1, :-1], self.cross[:, :-1]
        mean_input = self.square[-1, :-1] / self.square[-1, -1]
        mean_lack = self.cross[:, -1] / self.square[-1, -1]
        if bias:
            square = square - self.square[-1, -1] * torch.outer(mean_input, mean_input)
            cross = cross - self.square[-1, -1] * torch.outer(mean_lack, mean_input)
        energy = square.diagonal().clamp(min=0)
        pull = ridge * energy + 1e-6 * energy.sum() / max(len(energy), 1) + 1e-30
        weight = torch.linalg.solve(square + pull.diag(), cross.T).T
        shift = mean_lack - weight @ mean_input if bias else torch.zeros_like(mean_lack)
        return torch.cat([weight, shift.unsqueeze(1)], 1)

    def gain(self, change: Tensor) -> float:
        """Return by how much a change lowers the sum of the weighted squared errors."""
        return float((change * (2 * self.cross - change @ self.square)).sum())
