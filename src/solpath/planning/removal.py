"""The order in which groups of units leave a model whose tensors must stay dense.

All heads of a pair keep the same number of units, each head its own. So units leave in groups of
equal rank: the worst unit of every head together, then the second worst of every head, and so on.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from solpath.pair import Pair


@dataclass(frozen=True, eq=False)
class RemovalOrder:
    """Blocks of ranks in the order they leave. int64 ``[blocks]`` each.

    Attributes:
        pair: index of the pair that loses the block.
        start: first rank of the block; the pair is as wide as this once the block is gone.
        ranks: ranks in the block, each of them one unit of every head.
    """

    pair: Tensor
    start: Tensor
    ranks: Tensor

    def widths_after(self, pairs: Sequence[Pair], count: int) -> dict[str, int]:
        """Width of every pair once the first `count` blocks are gone."""
        dense = torch.tensor([pair.width for pair in pairs])
        left = dense.scatter_reduce(0, self.pair[:count], self.start[:count], "amin").tolist()
        return dict(zip((pair.name for pair in pairs), left, strict=True))

    def every_width(self, pairs: Sequence[Pair]) -> dict[str, Tensor]:
        """`widths_after` every count. Pair name to int64 ``[blocks + 1]``."""
        result = {}
        for i, pair in enumerate(pairs):
            width = torch.full((len(self.pair) + 1,), pair.width)
            own = self.pair == i
            width[1:][own] = self.start[own]
            result[pair.name] = width.cummin(0).values
        return result


def removal_order(values: Sequence[Tensor], first: Sequence[int], block: int = 1) -> RemovalOrder:
    """Put the blocks of ranks of all pairs in order, the least mean value first.

    Args:
        values: by pair, float64 ``[width]``: mean over the heads of the value at every rank, the
            best rank first. Later ranks never stay longer than earlier ones, whatever rounding
            says.
        first: by pair, the first rank that may leave; from the width on, none does.
        block: ranks that leave together.
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
    """The groups of one pair that are still there, the best rank first.

    Args:
        value: ``[heads, width]``; the higher stays longer.
        alive: bool ``[heads, width]``, equally many in every head; None is all of them.

    Returns:
        Mean value of every rank, ``[ranks]``, and the units of each, int64 ``[heads, ranks]``.
    """
    rest = value.shape[1] if alive is None else int(alive[0].sum())
    value = value if alive is None else value.masked_fill(~alive, -torch.inf)
    ordered, unit = value.sort(dim=1, descending=True, stable=True)
    return ordered[:, :rest].mean(0), unit[:, :rest]
