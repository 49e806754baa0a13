"""What a search will take, said before it starts."""

from typing import NamedTuple


class Estimate(NamedTuple):
    """What a search will take on this machine.

    Attributes:
        seconds: Its time, from one pass that was timed.
        weights: Bytes of the weights, which are there already.
        step: Most bytes that a pass has alive beyond the weights.
        moments: Most bytes that the moments of a compensated search take while they are measured
            or looked at, beyond those that are kept.
        kept: Bytes of what is kept from step to step: dense targets, masks, moments in memory.
        free: Bytes that the process can still allocate.
        samples: Samples in a batch, over all processes.
        device: Where the model runs.
        recompute: Whether activations are computed again in the backward pass.
    """

    seconds: float
    weights: int
    step: int
    moments: int
    kept: int
    free: int
    samples: int
    device: str
    recompute: bool

    @property
    def memory(self) -> int:
        """Bytes in all, weights included; the program itself is not."""
        return self.weights + self._beyond

    @property
    def _beyond(self) -> int:
        return max(self.step, self.moments) + self.kept

    def line(self, steps: int) -> str:
        """Return the estimate as one line.

        Args:
            steps: Steps of the search.
        """
        parts = [
            f"{steps} steps of {self.samples} samples on {self.device}: about "
            f"{duration(self.seconds)} and {size(self.memory)} of memory, "
            f"{size(self.weights)} of it the weights"
        ]
        if self.recompute:
            parts.append("activations are computed again, block by block, to save memory")
        if self._beyond > self.free:
            smaller = "give smaller batches, or micro_batch=1"
            remedy = smaller if self.step > self.moments else "search with compensated=False"
            parts.append(f"only {size(self.free)} are free: {remedy}")
        return "; ".join(parts)


def size(count: int) -> str:
    """Return bytes as text, such as ``"1.4 GB"``.

    Example:
        >>> size(1_400_000_000)
        '1.4 GB'
    """
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{max(count, 1e5) / 1e6:.1f} MB"


def duration(seconds: float) -> str:
    """Return seconds as text, such as ``"12 min"``.

    Example:
        >>> duration(720.0), duration(5400.0), duration(3.2)
        ('12 min', '1.5 h', '3 s')
    """
    if seconds < 90:
        return f"{max(round(seconds), 1)} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
