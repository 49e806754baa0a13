"""The removal order: in which order groups of units leave, so that tensors stay dense.

All heads of a pair keep the same number of units, each head its own. So units leave in groups of
equal rank: the worst unit of every head together, then the second worst of every head, and so on.
A block is one or more such groups that leave together.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from solpath.pair import Pair


class Team(NamedTuple):
    """Pairs that lose ranks together, in equal proportion.

    Attributes:
        pairs: Indices of the pairs.
        ranks: How many ranks each of them loses in one block. Where the last block is cut short,
            it is cut short in the same proportion.
        weights: What a rank of each of them weighs in the mean value of a block.
    """

    pairs: tuple[int, ...]
    ranks: tuple[int, ...]
    weights: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class RemovalOrder:
    """Blocks of ranks in the order in which they leave.

    A block holds the ranks of one pair, or of the pairs of one team. Each part is int64
    ``[entries]``, one entry for every pair that loses ranks in a block.

    Attributes:
        pair: Index of the pair that loses the ranks.
        start: First rank that leaves, which is also the width of the pair once the block has left.
        ranks: Number of ranks, each of them one unit of every head.
        block: The block of the entry, counted from 0 and ascending.
    """

    pair: Tensor
    start: Tensor
    ranks: Tensor
    block: Tensor

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return int(self.block[-1]) + 1 if len(self.block) else 0

    def widths_after(self, pairs: Sequence[Pair], count: int) -> dict[str, int]:
        """Return the width of every pair once some blocks have left, by pair name.

        Args:
            pairs: Every pair, in the order that `pair` counts in.
            count: Number of blocks that have left.
        """
        dense = torch.tensor([pair.width for pair in pairs])
        gone = self.block < count
        left = dense.scatter_reduce(0, self.pair[gone], self.start[gone], "amin").tolist()
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
            width = torch.full((self.blocks + 1,), pair.width)
            own = self.pair == i
            width[1 + self.block[own]] = self.start[own]
            result[pair.name] = width.cummin(0).values
        return result


def removal_order(
    values: Sequence[Tensor], first: Sequence[int], teams: Sequence[Team] | None = None
) -> RemovalOrder:
    """Put the blocks of ranks of all pairs in order, the least mean value first.

    Within a pair a later rank never stays longer than an earlier one, whatever rounding says.

    Args:
        values: For every pair, the mean over its heads of the value at every rank, the best rank
            first, float64 ``[width]``.
        first: For every pair, the first rank that may leave. At the width of the pair, none may.
        teams: The pairs that lose ranks together; every pair is in one team. None lets every pair
            lose its ranks one by one.

    Example:
        >>> values = [torch.tensor([5.0, 1.0]).double(), torch.tensor([3.0]).double()]
        >>> order = removal_order(values, first=[0, 0])
        >>> list(zip(order.pair.tolist(), order.start.tolist()))
        [(0, 1), (1, 0), (0, 0)]
        >>> order = removal_order(values, [0, 0], [Team((0, 1), (2, 1), (1, 1))])
        >>> order.pair.tolist(), order.ranks.tolist(), order.blocks
        ([0, 1], [2, 1], 1)
    """
    if teams is None:
        teams = [Team((i,), (1,), (1,)) for i in range(len(values))]
    means, firsts = [torch.zeros(0).double()], []
    parts: list[tuple[Tensor, ...]] = []  # block, pair, start and ranks of every pair
    count = 0
    for team in teams:
        found = [
            _blocks(values[i], first[i], ranks)
            for i, ranks in zip(team.pairs, team.ranks, strict=True)
        ]
        size = min(len(start) for _, start, _ in found)
        members = [_Blocks(*(part[len(part) - size :] for part in member)) for member in found]
        means.append(_joint_mean(members, team.weights).cummin(0).values)
        firsts.append(members[0].start)
        block = torch.arange(count, count + size)
        for i, (_, start, length) in zip(team.pairs, members, strict=True):
            parts.append((block, torch.full_like(start, i), start, length))
        count += size
    mean, start = torch.cat(means), torch.cat(firsts)
    order = (-start).argsort(stable=True)  # of equals, the last rank leaves first
    order = order[mean[order].argsort(stable=True)]
    place = torch.empty_like(order).scatter_(0, order, torch.arange(count))
    block, pair, start, ranks = (torch.cat(column) for column in zip(*parts, strict=True))
    block, order = place[block].sort(stable=True)
    return RemovalOrder(pair[order], start[order], ranks[order], block)


class _Blocks(NamedTuple):
    """The blocks of one pair: the mean value, the first rank and the number of ranks of each."""

    mean: Tensor
    start: Tensor
    length: Tensor


def _blocks(ranks: Tensor, low: int, block: int) -> _Blocks:
    """Return the blocks of a pair, which start at every multiple of `block` from rank `low` on."""
    start = torch.arange(0, len(ranks), block)
    start = start[start >= low]
    length = (len(ranks) - start).clamp(max=block)
    total = torch.nn.functional.pad(ranks.cumsum(0), (1, 0))
    mean = ranks[start] if block == 1 else (total[start + length] - total[start]) / length
    return _Blocks(mean, start, length)


def _joint_mean(members: Sequence[_Blocks], weights: Sequence[int]) -> Tensor:
    """Return the mean value of the blocks of a team, every rank counted with its weight."""
    if len(members) == 1:
        return members[0].mean
    weighed = torch.stack([m.length * weight for m, weight in zip(members, weights, strict=True)])
    means = torch.stack([m.mean for m in members])
    return (means * weighed).sum(0) / weighed.sum(0)


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


_LOOKED_AT = 64  # ranks of every pair among which those that leave are looked for at first


class _Alike(NamedTuple):
    """Pairs of one shape.

    Attributes:
        pair: Indices of the pairs, int64 ``[n]``.
        units: Indices of their units among those of all pairs, int64 ``[n, heads, width]``.
    """

    pair: Tensor
    units: Tensor


class _Leaving(NamedTuple):
    """Groups in the order in which they leave.

    Attributes:
        pair: Index of the pair of every group, int64 ``[groups]``.
        place: Place of the group in its pair, 0 for the least, int64 ``[groups]``.
        share: Share of the cost that is left before the group leaves, float64 ``[groups]``.
        taken: Number of groups that every pair loses, int64 ``[pairs]``.
        limit: Highest value in every head that leaves, float64 ``[heads of all pairs]``.
    """

    pair: Tensor
    place: Tensor
    share: Tensor
    taken: Tensor
    limit: Tensor


class Elimination:
    """Units that leave from dense to empty, each time those with the least value at that time.

    They leave in groups: the remaining unit with the least value of every head of a pair, then the
    next of every head. Of equal values in a head, the later unit leaves first. Groups leave in the
    order of `removal_order`. All pairs of one shape are looked at together, and of every pair only
    as many ranks as may leave.

    Args:
        shapes: ``(heads, width)`` of every pair, in the order of the units.
        cost: Cost of each unit, float64 ``[units]``, equal within a pair.

    Attributes:
        entry: Share of the cost that is left before a unit leaves, float64 ``[units]``; 0 for those
            that remain.

    Example:
        >>> elimination = Elimination([(1, 3)], torch.ones(3).double())
        >>> elimination.shrink(2 / 3, torch.tensor([0.3, 0.2, 0.1]).double())
        >>> elimination.shrink(0.0, torch.tensor([0.1, 0.2, 0.3]).double())
        >>> elimination.entry.mul(3).tolist()
        [2.0, 1.0, 3.0]
    """

    def __init__(self, shapes: Sequence[tuple[int, int]], cost: Tensor) -> None:
        heads, self._rest = (torch.tensor(part) for part in zip(*shapes, strict=True))
        sizes = heads * self._rest
        first = sizes.cumsum(0) - sizes
        self._group_cost = cost[first] * heads
        self._pair_of_row = torch.arange(len(shapes)).repeat_interleave(heads)
        self._row = torch.arange(int(heads.sum()))
        self._row = self._row.repeat_interleave(self._rest[self._pair_of_row])
        self._total = self._left = float(cost.sum())
        self._gone = torch.zeros(len(cost), dtype=torch.bool)
        self._alike = []
        for shape in dict.fromkeys(shapes):
            pair = torch.tensor([i for i, other in enumerate(shapes) if other == shape])
            units = torch.arange(shape[0] * shape[1]).view(shape)
            self._alike.append(_Alike(pair, first[pair].view(-1, 1, 1) + units))
        self.entry = torch.zeros(len(cost), dtype=torch.float64)

    def shrink(self, size: float, value: Tensor) -> None:
        """Let the groups with the least mean value leave until `size` of the cost is left.

        Args:
            size: Share of the cost of all units. The last group that leaves may cross it.
            value: Value of every unit, float64 ``[units]``.
        """
        if self._left <= size * self._total:
            return
        value = value.masked_fill(self._gone, torch.inf)
        ranks = _LOOKED_AT
        while (leaving := self._leaving(size, value, ranks)) is None:
            ranks *= 4
        share = torch.zeros(len(self._rest), int(leaving.taken.max()), dtype=torch.float64)
        share[leaving.pair, leaving.place] = leaving.share
        unit = (value <= leaving.limit[self._row]).nonzero().flatten().flip(0)
        unit = unit[value[unit].argsort(stable=True)]
        unit = unit[self._row[unit].argsort(stable=True)]  # by head, in each the least value first
        row = self._row[unit]
        counts = row.bincount(minlength=len(self._pair_of_row))
        place, pair = (
            torch.arange(len(unit)) - (counts.cumsum(0) - counts)[row],
            self._pair_of_row[row],
        )
        leaves = place < leaving.taken[pair]  # more may have the highest value that leaves
        self.entry[unit[leaves]] = share[pair[leaves], place[leaves]]
        self._gone[unit[leaves]] = True
        self._rest = self._rest - leaving.taken
        self._left -= float(self._group_cost[leaving.pair].cumsum(0)[-1])

    def _leaving(self, size: float, value: Tensor, ranks: int) -> _Leaving | None:
        """Find the groups that leave among the least `ranks` of every pair; None if more may."""
        least = [
            value[units].topk(min(ranks, units.shape[2]), largest=False).values
            for _, units in self._alike
        ]
        means, pairs, places = [], [], []
        for part, (pair, _) in zip(least, self._alike, strict=True):
            mean = part.mean(1)  # rounding keeps its order, so that no better rank leaves first
            means.append(mean.flatten())
            pairs.append(pair.repeat_interleave(mean.shape[1]))
            places.append(torch.arange(mean.shape[1]).repeat(len(pair)))
        mean, pair, place = torch.cat(means), torch.cat(pairs), torch.cat(places)
        rank = self._rest[pair] - 1 - place
        mean, pair, place, rank = (part[rank >= 0] for part in (mean, pair, place, rank))
        order = (pair - rank * len(self._rest)).argsort()  # of equals, the last rank leaves first
        order = order[mean[order].argsort(stable=True)]
        cost = self._group_cost[pair[order]]
        before = self._left - (cost.cumsum(0) - cost)
        order = order[before > size * self._total]
        taken = pair[order].bincount(minlength=len(self._rest))
        if ((taken == ranks) & (taken < self._rest)).any():
            return None
        limit = torch.full((len(self._pair_of_row),), -torch.inf, dtype=torch.float64)
        for part, (own, units) in zip(least, self._alike, strict=True):
            last = (taken[own] - 1).view(-1, 1, 1)
            highest = part.gather(2, last.clamp(min=0).expand(*part.shape[:2], 1))
            highest = highest.masked_fill(last < 0, -torch.inf)
            limit[self._row[units[:, :, 0]]] = highest.squeeze(2)
        share = before[: len(order)] / self._total
        return _Leaving(pair[order], place[order], share, taken, limit)
