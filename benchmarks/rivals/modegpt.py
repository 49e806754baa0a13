"""MoDeGPT: Nyström for neurons, CR for queries and keys, SVD for values and outputs.

Lin et al., "MoDeGPT: Modular Decomposition for Large Language Model Compression", ICLR 2025, arXiv
2408.09632. Neurons with the highest ridge leverage stay, and fc2 becomes the least squares fit to
its dense output. Query and key channels stay by ||C_q^½[:, i]|| · ||C_k^½[:, i]||. Value and output
become the SVD of C^½ W_v W_o. The sparsity of a block is the softmax of minus its influence (1 -
cosine of input and output). Under rotary embeddings both channels of a couple are scored together,
by their energy, which no rotation changes. `prune_uniform` cuts every block alike.
"""

import copy

import torch
from torch import Tensor, nn

from rivals.allocation import Widths, best, by_influence, uniform
from rivals.moments import Calibration, Moments, couples
from rivals.weights import (
    add_bias_,
    inner_bias,
    inner_weight,
    keep_units_,
    outputs,
    set_inner_,
    set_inner_bias_,
    set_outputs_,
)
from solpath.pair import Pair

EPSILON = 0.2
LEVERAGE_RIDGE = 1.0
REFIT_RIDGE = 1e-4


def prune(model: nn.Module, calibration: Calibration, keep: float) -> nn.Module:
    """Blocks by their influence."""
    widths = by_influence(calibration.pairs, calibration.influence, keep, EPSILON)
    return decompose(model, calibration, widths, refit=True)


def prune_uniform(model: nn.Module, calibration: Calibration, keep: float) -> nn.Module:
    """Every block alike."""
    return decompose(model, calibration, uniform(calibration.pairs, keep), refit=True)


def decompose(
    model: nn.Module, calibration: Calibration, widths: Widths, *, refit: bool
) -> nn.Module:
    """Cut every pair to its width; `refit` is the Nyström step for fc2."""
    pruned = copy.deepcopy(model)
    scores = {}
    for pair in calibration.pairs:
        if pair.kind == "qk":
            scores[pair.name] = cr_score(calibration, pair)
        elif pair.kind == "mlp":
            scores[pair.name] = leverage(calibration.inner[pair.name], LEVERAGE_RIDGE).unsqueeze(0)
    cut = [pair for pair in calibration.pairs if pair.name in scores]
    kept = best(cut, scores, widths)
    keep_units_(pruned, cut, kept)
    for pair in calibration.pairs:
        if pair.kind == "vo":
            rotate_values_(pruned, calibration, pair, widths[pair.name])
        elif pair.kind == "mlp" and refit:
            gram, stay = calibration.inner[pair.name].gram, kept[pair.name][0]
            weight = refitted(gram, outputs(model, pair), stay, REFIT_RIDGE)
            set_outputs_(pruned, pair, weight)
    return pruned


def cr_score(calibration: Calibration, pair: Pair) -> Tensor:
    """Norms of the columns of both roots, multiplied; ``[heads, width]``."""
    query, key = (couples(pair, side[pair.name]) for side in (calibration.query, calibration.key))
    return (query * key).sqrt().sum(1)


def leverage(moments: Moments, ridge: float) -> Tensor:
    """The diagonal of C (C + ridge · mean(diag C))⁻¹, ``[channels]``."""
    gram = moments.gram
    damped = gram + ridge * gram.diagonal().mean() * torch.eye(len(gram)).double()
    return torch.linalg.solve(damped, gram).diagonal()


def refitted(gram: Tensor, weight: Tensor, stay: Tensor, ridge: float) -> Tensor:
    """Least squares for ``x · weight`` from the channels that stay; zeros elsewhere.

    The ridge pulls towards the weight that is there, so that nothing changes when all stay.
    """
    within = gram[stay][:, stay]
    damped = within + ridge * gram.diagonal().mean() * torch.eye(len(within)).double()
    new = torch.zeros_like(weight)
    new[stay] = weight[stay] + torch.linalg.solve(damped, gram[stay][:, ~stay] @ weight[~stay])
    return new


def rotate_values_(model: nn.Module, calibration: Calibration, pair: Pair, rank: int) -> None:
    """Keep the first `rank` directions of the values, by the SVD of C^½ W_v W_o.

    With G the second moment of the values without their bias, that is the SVD of G^½ W_o. The bias
    of the values goes through the dense output projection into its bias: attention weights sum
    to 1.
    """
    if rank == pair.width:
        return
    side = pair.left[0]
    value, bias = inner_weight(model, pair, side), inner_bias(model, pair, side)
    output = inner_weight(model, pair, pair.right)
    repeated = bias.expand(-1, pair.right.repeat, -1)
    add_bias_(model, pair.right, torch.einsum("hrw,hrwo->o", repeated, output))
    moments = calibration.value[pair.name]
    mean, shift = moments.mean[:, 0], bias[:, 0]
    cross = mean.unsqueeze(2) * shift.unsqueeze(1)
    gram = moments.gram[:, 0] - cross - cross.mT + shift.unsqueeze(2) * shift.unsqueeze(1)
    energy, axes = torch.linalg.eigh(gram)
    root = energy.clamp(min=1e-10 * float(energy.max())).sqrt().unsqueeze(1)
    joined = output.transpose(1, 2).flatten(2)
    u, s, v = torch.linalg.svd(axes * root @ axes.mT @ joined, full_matrices=False)
    turn = s[:, :rank, None] * u[:, :, :rank].mT @ (axes / root @ axes.mT)
    set_inner_(model, pair, side, (turn @ value[:, 0]).unsqueeze(1))
    set_inner_bias_(model, pair, side, torch.zeros_like(bias))
    rows = v[:, :rank].unflatten(2, (pair.right.repeat, -1)).transpose(1, 2)
    set_inner_(model, pair, pair.right, rows)
