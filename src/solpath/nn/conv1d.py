"""The `Conv1D` of GPT-2, a linear layer whose weight is transposed, for any sizes."""

from torch import Tensor
from transformers.pytorch_utils import Conv1D


class CutConv1D(Conv1D):
    """A `Conv1D` that also runs without inputs or without outputs."""

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[..., in] -> [..., out]``."""
        return x @ self.weight + self.bias
