"""The removal order: in which order groups of units leave, so that tensors stay dense.

All heads of a pair keep the same number of units, each head its own. So units leave in groups of
equal rank: the worst unit of every head together, then the second worst of every head, and so on.
A block is one or more such groups that leave together.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from solpath.pair import Pair


@dataclass(frozen=True, eq=False)
class RemovalOrder:
    """Blocks of ranks in the order in which they leave, each part int64 ``[blocks]``.

    Attributes:
        pair: Index of the pair that loses the block.
        start: First rank of the block, which is also the width of the pair once the block has
            left.
        ranks: Number of ranks in the block, each of them one unit of every head.
    """

    pair: Tensor
    start: Tensor
    ranks: Tensor

    def widths_after(self, pairs: Sequence[Pair], count: int) -> dict[str, int]:
        """Return the width of every pair once some blocks have left, by pair name.

        Args:
            pairs: Every pair, in the order that `pair` counts in.
            count: Number of blocks that have left.
        """
        dense = torch.tensor([pair.width for pair in pairs])
        left = dense.scatter_reduce(0, self.pair[:count], self.start[:count], "amin").tolist()
        return dict(zip((pair.name for pair in pairs), left, strict=True))

    def every_width(self, pairs: Sequence[Pair]) -> dict[str, Tensor]:
        """Return the width of every pair after 0, 1, 2, ... blocks have left.

        Args:
            pairs: Every pair, in the order that `pair` counts in.

        Returns:
            Pair name to int64 ``[blocks + 1]``.
        """
        result = {}
        for i, pair in enumerate(pairs):
            width = torch.full((len(self.pair) + 1,), pair.width)
            own = self.pair == i
            width[1:][own] = self.start[own]
            result[pair.name] = width.cummin(0).values
        return result


def removal_order(values: Sequence[Tensor], first: Sequence[int], block: int = 1) -> RemovalOrder:
    """Put the blocks of ranks of all pairs in order, the least mean value first.

    Within a pair a later rank never stays longer than an earlier one, whatever rounding says.

    Args:
        values: For every pair, the mean over its heads of the value at every rank, the best rank
            first, float64 ``[width]``.
        first: For every pair, the first rank that may leave. At the width of the pair, none may.
        block: Ranks that leave together.

    Example:
        >>> values = [torch.tensor([5.0, 1.0]).double(), torch.tensor([3.0]).double()]
        >>> order = removal_order(values, first=[0, 0])
        >>> list(zip(order.pair.tolist(), order.start.tolist()))
        [(0, 1), (1, 0), (0, 0)]
    """
    means, starts, pairs, lengths = [torch.zeros(0).double()], [], [], []
    for i, (ranks, low) in enumerate(zip(values, first, strict=True)):
        start = torch.arange(0, len(ranks), block)
        start = start[start >= low]
        length = (len(ranks) - start).clamp(max=block)
        total = torch.nn.functional.pad(ranks.cumsum(0), (1, 0))
        mean = ranks[start] if block == 1 else (total[start + length] - total[start]) / length
        means.append(mean.cummin(0).values)
        starts.append(start)
        pairs.append(torch.full_like(start, i))
        lengths.append(length)
    mean, start, pair, ranks = (torch.cat(parts) for parts in (means, starts, pairs, lengths))
    order = (-start).argsort(stable=True)  # of equals, the last rank leaves first
    order = order[mean[order].argsort(stable=True)]
    return RemovalOrder(pair[order], start[order], ranks[order])


def groups_by_rank(value: Tensor, alive: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Group the remaining units of one pair by their rank in their head, the best rank first.

    Args:
        value: Value of every unit, ``[heads, width]``. Units with a higher value stay longer.
        alive: Units that remain, bool ``[heads, width]``, equally many in every head. None is all.

    Returns:
        The mean value at every rank, ``[ranks]``, and the units of every rank, int64
        ``[heads, ranks]``.

    Example:
        >>> mean, units = groups_by_rank(torch.tensor([[1.0, 3.0], [4.0, 2.0]]))
        >>> mean.tolist(), units.tolist()
        ([3.5, 1.5], [[1, 0], [0, 1]])
    """
    rest = value.shape[1] if alive is None else int(alive[0].sum())
    value = value if alive is None else value.masked_fill(~alive, -torch.inf)
    ordered, unit = value.sort(dim=1, descending=True, stable=True)
    return ordered[:, :rest].mean(0), unit[:, :rest]
