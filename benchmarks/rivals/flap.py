"""FLAP: the units that fluctuate least around their mean, which goes into the bias.

An et al., "Fluctuation-based Adaptive Structured Pruning for Large Language Models", AAAI 2024,
arXiv 2312.11983, repository CASIA-IVA-Lab/FLAP. Score: variance of an input channel of the output
projection or of fc2 times the squared norm of its weights (WIFV; squared for attention),
standardised per layer, the mean over a head, all layers ranked together against what a head and a
neuron cost (AL-AM). Whole heads leave, as published, so that heads do not keep equal widths.
`prune_channels` ranks the channels of the heads instead: the queries and keys of a layer keep as
many as the values, by the variance of the query times the energy of the key.
"""

import copy

import torch
from torch import Tensor, nn

from rivals.allocation import best
from rivals.moments import Calibration
from rivals.weights import Kept, add_bias_, channels, keep_units_, outputs
from solpath.pair import Pair


def prune(model: nn.Module, calibration: Calibration, keep: float) -> nn.Module:
    """Whole heads and neurons."""
    groups = []
    for pair, score in _standardised(model, calibration):
        if pair.kind == "mlp":
            groups += [
                (float(value), pair.cost, pair, i) for i, value in enumerate(score.flatten())
            ]
        else:
            logits = _logits(calibration, pair)
            cost = pair.width * pair.cost + logits.width * logits.cost
            groups += [(float(value), cost, pair, i) for i, value in enumerate(score.mean(1))]
    kept = {p.name: torch.zeros(p.heads, p.width, dtype=torch.bool) for p in calibration.pairs}
    for pair, i in _affordable(calibration, groups, keep):
        if pair.kind == "mlp":
            kept[pair.name][0, i] = True
        else:
            kept[pair.name][i] = kept[_logits(calibration, pair).name][i] = True
    return _finish(model, calibration, kept)


def prune_channels(model: nn.Module, calibration: Calibration, keep: float) -> nn.Module:
    """Channels of heads, as many in every head of a layer, and neurons."""
    scores, groups = {}, []
    for pair, score in _standardised(model, calibration):
        scores[pair.name], cost = score, float(pair.heads * pair.cost)
        if pair.kind == "vo":
            logits = _logits(calibration, pair)
            cost += logits.units * logits.cost / pair.width
            query, key = calibration.query[logits.name], calibration.key[logits.name]
            product = (query.variance * key.energy).sum(1)
            scores[logits.name] = product.unflatten(1, (logits.channels, -1)).sum(1)
        ranks = score.sort(dim=1, descending=True).values.mean(0)
        groups += [(float(value), cost, pair, rank) for rank, value in enumerate(ranks)]
    widths: dict[str, int] = {pair.name: 0 for pair in calibration.pairs}
    for pair, _ in _affordable(calibration, groups, keep):
        widths[pair.name] += 1
        if pair.kind == "vo":
            logits = _logits(calibration, pair)
            widths[logits.name] = round(widths[pair.name] * logits.width / pair.width)
    return _finish(model, calibration, best(calibration.pairs, scores, widths))


def _standardised(model: nn.Module, calibration: Calibration) -> list[tuple[Pair, Tensor]]:
    """The scores of ``vo`` and ``mlp`` pairs, ``[heads, width]`` each."""
    found = []
    for pair in calibration.pairs:
        if pair.kind == "qk":
            continue
        score = calibration.inner[pair.name].variance * outputs(model, pair).square().sum(1)
        score = score if pair.kind == "mlp" else score.square()
        score = (score - score.mean()) / score.std().clamp(min=1e-300)
        found.append((pair, score.view(pair.heads, -1, pair.width).mean(1)))
    return found


def _logits(calibration: Calibration, pair: Pair) -> Pair:
    """The ``qk`` pair of the attention of a ``vo`` pair."""
    name = pair.name.removesuffix("vo") + "qk"
    return next(other for other in calibration.pairs if other.name == name)


def _affordable(
    calibration: Calibration, groups: list[tuple[float, float, Pair, int]], keep: float
) -> list[tuple[Pair, int]]:
    """The best groups, as many as come nearest to the budget."""
    groups = sorted(groups, key=lambda group: group[0], reverse=True)
    spent = torch.tensor([0.0, *(cost for _, cost, _, _ in groups)]).double().cumsum(0)
    budget = keep * sum(pair.cost * pair.units for pair in calibration.pairs)
    return [(pair, i) for _, _, pair, i in groups[: int((spent - budget).abs().argmin())]]


def _finish(model: nn.Module, calibration: Calibration, kept: Kept) -> nn.Module:
    """Put the mean of what leaves into the bias after it."""
    pruned = copy.deepcopy(model)
    for pair in calibration.pairs:
        if pair.kind != "qk":
            gone = ~channels(pair, kept[pair.name])
            mean = calibration.inner[pair.name].mean
            add_bias_(pruned, pair.right, (mean * gone) @ outputs(model, pair))
    keep_units_(pruned, calibration.pairs, kept)
    return pruned
