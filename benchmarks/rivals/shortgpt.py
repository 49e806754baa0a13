"""ShortGPT: whole blocks leave, those first whose output is most like their input.

Men et al., "ShortGPT: Layers in Large Language Models are More Redundant Than You Expect", arXiv
2403.03853. The block influence is 1 - cosine of the input and the output of a block, the mean over
tokens. A block that leaves adds nothing to the residual stream: all its units and the biases after
them are zero. That drops it from models that norm before each layer; where the norm follows (BERT),
it stays. Blocks leave until the budget is nearest, so that sizes are those of whole blocks.
"""

import copy

import torch
from torch import nn

from rivals.moments import Calibration, block_of
from rivals.weights import keep_units_
from solpath.model.linear import linear_map


@torch.no_grad()
def prune(model: nn.Module, calibration: Calibration, keep: float) -> nn.Module:
    """The blocks of least influence."""
    pruned = copy.deepcopy(model)
    gone = dropped(calibration, keep)
    pairs = [pair for pair in calibration.pairs if block_of(pair) in gone]
    nothing = {p.name: torch.zeros(p.heads, p.width, dtype=torch.bool) for p in pairs}
    keep_units_(pruned, pairs, nothing)
    for pair in pairs:
        bias = linear_map(pruned, pair.right.module).bias
        if bias is not None and pair.kind != "qk":
            bias.zero_()
    return pruned


def dropped(calibration: Calibration, keep: float) -> set[str]:
    """The blocks that leave: as many of the least influence as come nearest to the budget."""
    cost = dict.fromkeys(calibration.influence, 0)
    for pair in calibration.pairs:
        cost[block_of(pair)] += pair.cost * pair.units
    order = sorted(calibration.influence, key=lambda block: calibration.influence[block])
    sizes = torch.tensor([0, *(cost[block] for block in order)]).double().cumsum(0)
    count = int((sizes / sum(cost.values()) - (1 - keep)).abs().argmin())
    return set(order[:count])
