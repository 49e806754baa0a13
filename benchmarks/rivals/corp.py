"""CORP: channels by energy; what leaves is an affine function of what stays.

Zhang and Yang, "CORP: Closed-Form One-shot Representation-Preserving Structured Pruning for
Transformers", arXiv 2602.05243. Hidden channels: removed ones are regressed on kept ones with their
means (ridge, shrinkage, float64) and folded into the right-hand weight and bias. Logits: the
product of the removed channels is fitted by a bilinear form of the kept ones, whose singular value
decomposition is folded into query and key. Uniform sparsity. Here the form is not symmetrised
first, which fits better, and the value channels, which the paper keeps, are treated as hidden
channels. Under rotary embeddings, norms over the heads or grouped queries, which the paper has not,
no matrix can be folded in: couples leave by energy alone. `prune_pooled` ranks all layers together
by the energy instead.
"""

import copy

import torch
from torch import Tensor, nn

from rivals.allocation import Widths, best, pooled, uniform
from rivals.moments import Calibration, Moments, couples
from rivals.weights import (
    add_bias_,
    channels,
    inner_bias,
    inner_weight,
    keep_units_,
    outputs,
    set_inner_,
    set_inner_bias_,
    set_outputs_,
)
from solpath.pair import Pair


def prune(model: nn.Module, calibration: Calibration, keep: float) -> nn.Module:
    """The same share of every layer."""
    return _prune(model, calibration, uniform(calibration.pairs, keep))


def prune_pooled(model: nn.Module, calibration: Calibration, keep: float) -> nn.Module:
    """One ranking of all layers."""
    return _prune(model, calibration, pooled(calibration.pairs, _scores(calibration), keep))


def _scores(calibration: Calibration) -> dict[str, Tensor]:
    """The energy of every unit, for logits that of its product, ``[heads, width]``."""
    scores = {}
    for pair in calibration.pairs:
        if pair.kind == "qk":
            query, key = calibration.query[pair.name], calibration.key[pair.name]
            scores[pair.name] = (couples(pair, query) * couples(pair, key)).sum(1)
        else:
            energy = calibration.inner[pair.name].energy
            scores[pair.name] = energy.view(pair.heads, -1, pair.width).sum(1)
    return scores


def _prune(model: nn.Module, calibration: Calibration, widths: Widths) -> nn.Module:
    kept = best(calibration.pairs, _scores(calibration), widths)
    pruned = copy.deepcopy(model)
    for pair in calibration.pairs:
        mask = kept[pair.name]
        if mask.all():
            continue
        if pair.kind == "qk" and not (pair.channels > 1 or pair.norms or pair.left[0].repeat > 1):
            _fit_logits_(pruned, calibration, pair, mask)
        elif pair.kind != "qk":
            stay = channels(pair, mask)
            moments = calibration.inner[pair.name]
            weight = outputs(model, pair)
            fit, constant = affine_fit(moments, stay)
            weight[stay] += fit.mT @ weight[~stay]
            add_bias_(pruned, pair.right, constant @ weight[~stay])
            set_outputs_(pruned, pair, weight)
    keep_units_(pruned, calibration.pairs, kept)
    return pruned


def affine_fit(moments: Moments, stay: Tensor) -> tuple[Tensor, Tensor]:
    """B and c of the best ``B x_stay + c`` for the other channels, ``stay`` bool ``[channels]``."""
    covariance = moments.covariance
    within = covariance[stay][:, stay]
    ridge = shrinkage(within, moments.count) * within.diagonal().mean()
    within = within + ridge * torch.eye(len(within)).double()
    fit = torch.linalg.solve(within, covariance[stay][:, ~stay]).mT
    return fit, moments.mean[~stay] - fit @ moments.mean[stay]


def shrinkage(covariance: Tensor, count: float) -> float:
    """Oracle approximating shrinkage towards a multiple of 1 (Chen et al., arXiv 0907.4698)."""
    size = len(covariance)
    trace, square = covariance.trace(), covariance.square().sum()
    rest = (square - trace.square() / size).clamp(min=1e-300)
    ratio = ((1 - 2 / size) * square + trace.square()) / ((count + 1 - 2 / size) * rest)
    return float(ratio.clamp(1e-8, 1))


def _fit_logits_(model: nn.Module, calibration: Calibration, pair: Pair, mask: Tensor) -> None:
    """Fold the best bilinear form of the kept channels into query and key."""
    query, key = pair.left[0], pair.right
    grams = calibration.query[pair.name].gram[:, 0], calibration.key[pair.name].gram[:, 0]
    parts = [[inner_weight(model, pair, s), inner_bias(model, pair, s)] for s in (query, key)]
    for head, stay in enumerate(mask):
        left, right = bilinear_fit(grams[0][head], grams[1][head], stay)
        for (weight, bias), turn in zip(parts, (left, right), strict=True):
            weight[head, 0, stay] = turn @ weight[head, 0, stay]
            bias[head, 0, stay] = turn @ bias[head, 0, stay]
    for side, (weight, bias) in zip((query, key), parts, strict=True):
        set_inner_(model, pair, side, weight)
        set_inner_bias_(model, pair, side, bias)


def bilinear_fit(
    query: Tensor, key: Tensor, stay: Tensor, ridge: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """L and R such that ``(L q_stay) · (R k_stay)`` is the best fit to ``q · k``.

    Args:
        query, key: second moments ``[width, width]`` of independent q and k.
        stay: bool ``[width]``.
        ridge: relative to the largest product of variances.
    """
    value_q, basis_q = torch.linalg.eigh(query[stay][:, stay])
    value_k, basis_k = torch.linalg.eigh(key[stay][:, stay])
    cross = query[stay][:, ~stay] @ key[~stay][:, stay]
    product = value_q.clamp(min=0).unsqueeze(1) * value_k.clamp(min=0)
    form = basis_q.mT @ cross @ basis_k / (product + ridge * product.max().clamp(min=1e-300))
    form = basis_q @ form @ basis_k.mT + torch.eye(len(value_q)).double()
    u, s, v = torch.linalg.svd(form)
    root = s.sqrt()
    return (u * root).mT, root.unsqueeze(1) * v
