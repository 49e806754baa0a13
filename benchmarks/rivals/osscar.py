"""OSSCAR: units leave one by one, each time the one whose loss least squares repairs best.

Meng et al., "OSSCAR: One-Shot Structured Pruning in Vision and Language Models with Combinatorial
Optimization", ICML 2024, arXiv 2403.12983, repository mazumder-lab/OSSCAR. The output of fc2 and of
the output projection is fitted in the mean square; removing unit j costs ||W_j||² / (G⁻¹)_jj, after
which weights and G⁻¹ are updated by rank one, and the weights on the final support are the exact
solution. Left out: the swaps of its local search. Here a round takes one channel of every head (of
every query head, where several share a key), so that heads keep equal widths, and queries and keys,
of which its objective knows nothing, leave by MoDeGPT's CR score. Uniform; `prune_pooled` ranks all
layers together by the error each unit adds.
"""

import copy

import torch
from torch import Tensor, nn

from rivals.allocation import Widths, best, pooled, uniform
from rivals.modegpt import cr_score, refitted
from rivals.moments import Calibration
from rivals.weights import channels, keep_units_, outputs, set_outputs_

RIDGE = 1e-3


def prune(model: nn.Module, calibration: Calibration, keep: float) -> nn.Module:
    """The same share of every layer."""
    return _prune(model, calibration, uniform(calibration.pairs, keep))


def prune_pooled(model: nn.Module, calibration: Calibration, keep: float) -> nn.Module:
    """One ranking of all layers."""
    score = {}
    for pair in calibration.pairs:
        if pair.kind == "qk":
            score[pair.name] = cr_score(calibration, pair).square()
        else:
            added, order = _eliminated(model, calibration)[pair.name]
            sorted_ = added.gather(1, order.argsort(1)).cummax(1).values
            score[pair.name] = sorted_.gather(1, order.argsort(1).argsort(1))
    return _prune(model, calibration, pooled(calibration.pairs, score, keep))


def _prune(model: nn.Module, calibration: Calibration, widths: Widths) -> nn.Module:
    score = {}
    for pair in calibration.pairs:
        if pair.kind == "qk":
            score[pair.name] = cr_score(calibration, pair)
        else:
            score[pair.name] = _eliminated(model, calibration)[pair.name][1]
    kept = best(calibration.pairs, score, widths)
    pruned = copy.deepcopy(model)
    keep_units_(pruned, calibration.pairs, kept)
    for pair in calibration.pairs:
        if pair.kind != "qk":
            gram, stay = calibration.inner[pair.name].gram, channels(pair, kept[pair.name])
            set_outputs_(pruned, pair, refitted(gram, outputs(model, pair), stay, RIDGE))
    return pruned


def _eliminated(model: nn.Module, calibration: Calibration) -> dict[str, tuple[Tensor, Tensor]]:
    """Added error and place in the order of every unit, once for all sizes."""

    def compute() -> dict[str, tuple[Tensor, Tensor]]:
        found = {}
        for pair in calibration.pairs:
            if pair.kind != "qk":
                gram, weight = calibration.inner[pair.name].gram, outputs(model, pair)
                if pair.right.repeat > 1:
                    added, order = eliminate_groups(
                        gram, weight, pair.heads, pair.right.repeat, RIDGE
                    )
                else:
                    added, order = eliminate(gram, weight, pair.heads, RIDGE)
                found[pair.name] = added.view(pair.heads, -1), order.view(pair.heads, -1)
        return found

    found: dict[str, tuple[Tensor, Tensor]] = calibration.once("osscar", compute)
    return found


def eliminate(
    gram: Tensor, weight: Tensor, heads: int = 1, ridge: float = 0.0, stop: int = 0
) -> tuple[Tensor, Tensor]:
    """Remove all channels but `stop` one by one, the one that costs least first.

    Args:
        gram: second moment of the channels, ``[n, n]``.
        weight: ``[n, outputs]``.
        heads: channels of that many heads, end to end; a round takes one of each.
        ridge: relative to the mean of the diagonal of `gram`.

    Returns:
        The squared error that each channel added, and when it left (1, 2, ...; the rest last).
    """
    size = len(gram)
    damping = ridge * gram.diagonal().mean()
    inverse = torch.linalg.inv(gram + damping * torch.eye(size).double())
    weight, alive = weight.clone(), torch.arange(size)
    head_of = torch.arange(size) // (size // heads)
    added, order = torch.zeros(size).double(), torch.full((size,), size + 1.0).double()
    left_this_round = torch.zeros(heads, dtype=torch.bool)
    gone = torch.zeros(size, dtype=torch.bool)
    for step in range(size - stop):
        if step % 64 == 0:  # smaller matrices are faster
            rest = ~gone
            inverse, weight = inverse[rest][:, rest].contiguous(), weight[rest]
            alive, head_of, gone = alive[rest], head_of[rest], gone[rest]
        cost = weight.square().sum(1) / inverse.diagonal()
        j = int(cost.masked_fill(gone | left_this_round[head_of], torch.inf).argmin())
        added[alive[j]], order[alive[j]] = cost[j], step + 1
        column = inverse[:, j].clone()
        pivot = float(column[j])
        weight.addr_(column, weight[j].clone(), alpha=-1 / pivot)
        inverse.addr_(column, column, alpha=-1 / pivot)
        inverse[j, j] = 1.0  # never looked at again; no division by zero
        gone[j] = True
        left_this_round[head_of[j]] = True
        if left_this_round.all():
            left_this_round[:] = False
    return added, order


def eliminate_groups(
    gram: Tensor, weight: Tensor, heads: int, repeat: int, ridge: float = 0.0
) -> tuple[Tensor, Tensor]:
    """The same for grouped queries: a unit is one channel of each of `repeat` heads.

    Args:
        gram: second moment of the channels, laid out as ``[heads, repeat, width]``.

    Returns:
        As `eliminate`, for every unit of every head, ``[heads * width]``.
    """
    size = len(gram)
    index = torch.arange(size).view(heads, repeat, -1).transpose(1, 2).flatten(0, 1)
    head_of = torch.arange(len(index)) // (len(index) // heads)
    damping = ridge * gram.diagonal().mean()
    inverse = torch.linalg.inv(gram + damping * torch.eye(size).double())
    weight = weight.clone()
    added, order = torch.zeros(len(index)).double(), torch.zeros(len(index)).double()
    gone = torch.zeros(len(index), dtype=torch.bool)
    left_this_round = torch.zeros(heads, dtype=torch.bool)
    for step in range(len(index)):
        blocks = inverse[index.unsqueeze(2), index.unsqueeze(1)]
        rows = weight[index]
        cost = (rows * torch.linalg.solve(blocks, rows)).sum((1, 2))
        j = int(cost.masked_fill(gone | left_this_round[head_of], torch.inf).argmin())
        added[j], order[j] = cost[j], step + 1
        own = index[j]
        columns = torch.linalg.solve(blocks[j], inverse[own]).mT  # [size, repeat]
        weight = weight - columns @ weight[own]
        inverse = inverse - columns @ inverse[own]
        inverse[own] = inverse[:, own] = 0
        inverse[own, own] = 1.0  # never looked at again; no division by zero
        gone[j] = True
        left_this_round[head_of[j]] = True
        if left_this_round.all():
            left_this_round[:] = False
    return added, order
