"""LLM-Pruner: coupled structures by the first-order Taylor expansion of the loss.

Ma et al., "LLM-Pruner: On the Structural Pruning of Large Language Models", NeurIPS 2023, arXiv
2305.11627. A group is all that must leave together: the rows of gate and up and the column of down,
or the rows and columns of a channel of the heads. It matters as much as the sum of |weight ·
gradient| over its parameters. The first eighth of the blocks and the last sixteenth stay whole, and
the others lose equal shares. The loss is that of the next token. Left out: the training with
low-rank adapters. Whole heads leave in the paper; here their channels do, as many in every head, as
a head of Gemma 3 270M is all that a layer has of keys and values.
"""

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from rivals.allocation import best, round_widths, uniform
from rivals.moments import Calibration, block_of
from rivals.weights import keep_units_
from solpath.model.linear import linear_map
from solpath.pair import Pair
from solpath.running.forward import forward

BATCHES = 16
FIRST, LAST = 8, 16  # one in so many blocks stays whole at the start and at the end


def prune(model: nn.Module, calibration: Calibration, keep: float) -> nn.Module:
    """The same share of every layer that is cut."""
    score = calibration.once("llm_pruner", lambda: importance(model, calibration))
    pruned = copy.deepcopy(model)
    widths = _widths(calibration.pairs, keep)
    keep_units_(pruned, calibration.pairs, best(calibration.pairs, score, widths))
    return pruned


def importance(model: nn.Module, calibration: Calibration) -> dict[str, Tensor]:
    """The sum of |weight · gradient| over the parameters of every unit, ``[heads, width]``."""
    layers = {side.module for pair in calibration.pairs for side in pair.sides}
    parameters = {
        (layer, name): parameter
        for layer in sorted(layers)
        for name, parameter in linear_map(model, layer).parameters().items()
    }
    before = {key: parameter.requires_grad for key, parameter in parameters.items()}
    total = {key: torch.zeros_like(parameter) for key, parameter in parameters.items()}
    try:
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        for batch in calibration.batches[:BATCHES]:
            loss = _loss(model, batch)
            slopes = torch.autograd.grad(loss, list(parameters.values()))
            for key, slope in zip(parameters, slopes, strict=True):
                total[key] += slope
    finally:
        for key, parameter in parameters.items():
            parameter.requires_grad_(before[key])
    return {pair.name: _of_units(model, pair, total) for pair in calibration.pairs}


def _of_units(model: nn.Module, pair: Pair, slopes: dict[tuple[str, str], Tensor]) -> Tensor:
    score = torch.zeros(pair.units).double()
    for side in pair.sides:
        linear = linear_map(model, side.module)
        for name, parameter in linear.parameters().items():
            if name == "bias" and side.axis == 1:
                continue
            dim = 0 if name == "bias" else linear.dim(side.axis)
            product = (parameter.detach() * slopes[side.module, name]).double().abs()
            channels = product.movedim(dim, 0).flatten(1).sum(1) if product.dim() > 1 else product
            score.index_add_(0, pair.unit_of_channel(side), channels[pair.channels_of(side)])
    return score.view(pair.heads, pair.width)


def _loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Cross-entropy of the next token, without padding."""
    output, wanted = forward(model, batch)[:, :-1], batch["input_ids"][:, 1:]
    if "attention_mask" in batch:
        wanted = wanted.masked_fill(batch["attention_mask"][:, 1:] == 0, -100)
    return functional.cross_entropy(output.flatten(0, 1), wanted.flatten())


def _widths(pairs: Sequence[Pair], keep: float) -> dict[str, int]:
    blocks = list(dict.fromkeys(block_of(pair) for pair in pairs))
    count = len(blocks)
    cut = set(blocks[round(count / FIRST) : count - round(count / LAST)])
    weight = {pair.name: pair.cost * pair.units for pair in pairs}
    inside = sum(weight[pair.name] for pair in pairs if block_of(pair) in cut)
    share = 1 - (1 - keep) * sum(weight.values()) / inside
    if share < keep / 4:  # blocks that stay whole would leave too little of the others
        return uniform(pairs, keep)
    shares = {pair.name: share if block_of(pair) in cut else 1.0 for pair in pairs}
    return round_widths(pairs, shares, keep)
