"""How many units every head of a pair keeps, so that the kept share of parameters is the budget."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from rivals.moments import block_of
from rivals.weights import Kept
from solpath.pair import Pair

Widths = dict[str, int]


def kept_share(pairs: Sequence[Pair], widths: Mapping[str, int]) -> float:
    """Share of the prunable parameters that is kept."""
    kept = sum(pair.cost * pair.heads * widths[pair.name] for pair in pairs)
    return kept / sum(pair.cost * pair.units for pair in pairs)


def uniform(pairs: Sequence[Pair], keep: float) -> Widths:
    """The same share of every pair."""
    return round_widths(pairs, dict.fromkeys((pair.name for pair in pairs), keep), keep)


def round_widths(pairs: Sequence[Pair], shares: Mapping[str, float], keep: float) -> Widths:
    """Whole widths near `shares` whose cost is nearest to the budget; the largest parts go up."""
    exact = {pair.name: shares[pair.name] * pair.width for pair in pairs}
    widths = {name: int(value + 1e-9) for name, value in exact.items()}
    rest = (keep - kept_share(pairs, widths)) * sum(pair.cost * pair.units for pair in pairs)
    for pair in sorted(pairs, key=lambda pair: widths[pair.name] - exact[pair.name]):
        step = pair.cost * pair.heads
        if widths[pair.name] < pair.width and step / 2 <= rest:
            widths[pair.name] += 1
            rest -= step
    return widths


def by_influence(
    pairs: Sequence[Pair],
    influence: Mapping[str, float],
    keep: float,
    epsilon: float,
    most: float = 0.85,
) -> Widths:
    """Sparsity of a block from the softmax of ``-influence / epsilon``, the same for its pairs.

    Blocks above the sparsity `most` are held there, and the others share what is over; where the
    budget is small, a block may keep half of it.
    """
    blocks = list(influence)
    score = torch.tensor([influence[block] for block in blocks], dtype=torch.float64)
    cost = dict.fromkeys(blocks, 0)
    for pair in pairs:
        cost[block_of(pair)] += pair.cost * pair.units
    weight = torch.tensor([cost[block] for block in blocks], dtype=torch.float64)
    weight /= weight.sum()
    most = max(most, 1 - keep / 2)
    phi = torch.softmax(-score / epsilon, 0)
    held = torch.zeros_like(phi, dtype=torch.bool)
    while True:
        over = 1 - keep - most * float(weight[held].sum())
        scaled = phi * over / float((weight * phi)[~held].sum() or 1)
        scaled[held] = most
        if not (scaled > most + 1e-12).any():
            break
        held |= scaled > most
    sparsity = dict(zip(blocks, scaled.tolist(), strict=True))
    return round_widths(pairs, {p.name: 1 - sparsity[block_of(p)] for p in pairs}, keep)


def pooled(pairs: Sequence[Pair], score: Mapping[str, Tensor], keep: float) -> Widths:
    """Widths from one ranking of all layers: a unit's share of its pair's score, per parameter.

    Args:
        score: pair name to ``[heads, width]``, not negative; ranks of all heads leave together.
    """
    entries = []
    for pair in pairs:
        ranks = score[pair.name].double().sort(dim=1, descending=True).values.mean(0)
        share = ranks / ranks.sum().clamp(min=1e-300) / pair.cost / pair.heads
        entries += [(float(value), -rank, pair) for rank, value in enumerate(share)]
    widths = {pair.name: 0 for pair in pairs}
    budget = keep * sum(pair.cost * pair.units for pair in pairs)
    for _, _, pair in sorted(entries, key=lambda entry: entry[:2], reverse=True):
        step = pair.cost * pair.heads
        if step / 2 > budget:
            break
        widths[pair.name] += 1
        budget -= step
    return widths


def best(pairs: Sequence[Pair], score: Mapping[str, Tensor], widths: Mapping[str, int]) -> Kept:
    """The units with the highest score in every head."""
    kept = {}
    for pair in pairs:
        order = score[pair.name].argsort(dim=1, descending=True, stable=True)
        mask = torch.zeros(pair.heads, pair.width, dtype=torch.bool)
        kept[pair.name] = mask.scatter_(1, order[:, : widths[pair.name]], True)
    return kept
