"""WPAC: principal axes of the heads, tokens weighted by what they matter; neurons by Taylor.

Li et al., "Stratified Knowledge-Density Super-Network for Scalable Vision Transformers", AAAI 2026,
arXiv 2511.11683. Values are turned to the principal axes of their token-weighted second moment, and
the output projection back; query and key are turned by one orthogonal matrix, from the sum of their
moments; the first axes stay. A token weighs |activation · gradient|, summed over its channels.
Neurons leave by the first-order Taylor score. Uniform. Left out: the training with its importance-
aware dropout. The gradient is that of a random projection of the output with the curvature of the
loss, as there are no labels. Queries and keys that stand before a rotary embedding, a norm over the
heads or grouped queries, which the paper has not, cannot be turned: their couples stay by the same
weighted moments. `prune_pooled` ranks all layers together, axes by their eigenvalues.
"""

import contextlib
import copy

import torch
from torch import Tensor, nn

from rivals.allocation import Widths, best, pooled, uniform
from rivals.moments import Calibration, by_head
from rivals.weights import (
    inner_bias,
    inner_weight,
    keep_units_,
    set_inner_,
    set_inner_bias_,
)
from solpath.divergence import curvature_sketch
from solpath.objective import kind_of
from solpath.pair import Pair, Side
from solpath.running.forward import output_mask, output_tensor, run

Axes = tuple[Tensor, Tensor | None]
"""Eigenvalues ``[heads, width]`` and axes as rows ``[heads, width, width]``, largest first.

Of heads that cannot be turned, the moments of the units and no axes.
"""


def prune(model: nn.Module, calibration: Calibration, keep: float) -> nn.Module:
    """The same share of every layer."""
    return _prune(model, calibration, uniform(calibration.pairs, keep))


def prune_pooled(model: nn.Module, calibration: Calibration, keep: float) -> nn.Module:
    """One ranking of all layers."""
    axes, taylor = _found(model, calibration)
    score = {name: value for name, (value, _) in axes.items()} | taylor
    return _prune(model, calibration, pooled(calibration.pairs, score, keep))


def _prune(model: nn.Module, calibration: Calibration, widths: Widths) -> nn.Module:
    axes, taylor = _found(model, calibration)
    pruned = copy.deepcopy(model)
    scores = dict(taylor)
    for pair in calibration.pairs:
        if pair.kind == "mlp":
            continue
        values, vectors = axes[pair.name]
        if vectors is None:
            scores[pair.name] = values
        elif widths[pair.name] < pair.width:
            turn = vectors[:, : widths[pair.name]].unsqueeze(1)
            for side in pair.sides:
                set_inner_(pruned, pair, side, turn @ inner_weight(model, pair, side))
                if side.axis == 0:
                    bias = inner_bias(model, pair, side).unsqueeze(-1)
                    set_inner_bias_(pruned, pair, side, (turn @ bias).squeeze(-1))
    chosen = [pair for pair in calibration.pairs if pair.name in scores]
    keep_units_(pruned, chosen, best(chosen, scores, widths))
    return pruned


def _found(model: nn.Module, calibration: Calibration) -> tuple[dict[str, Axes], dict[str, Tensor]]:
    found: tuple[dict[str, Axes], dict[str, Tensor]] = calibration.once(
        "wpac", lambda: _measure(model, calibration)
    )
    return found


def _measure(
    model: nn.Module, calibration: Calibration
) -> tuple[dict[str, Axes], dict[str, Tensor]]:
    """The axes of the heads, and the Taylor score of neurons, from one gradient per batch."""
    model = copy.deepcopy(model).requires_grad_(True)
    sides: list[tuple[Pair, Side]] = []
    for pair in calibration.pairs:
        sides += [(pair, pair.right)] if pair.kind == "mlp" else [(pair, pair.left[0])]
        sides += [(pair, pair.right)] if pair.kind == "qk" else []
    seen: dict[int, Tensor] = {}
    moments = {p.name: torch.zeros(p.heads, p.width, p.width).double() for p, _ in sides}
    energy = {p.name: torch.zeros(p.heads, p.width).double() for p, _ in sides if not _turns(p)}
    taylor = {p.name: torch.zeros(1, p.width).double() for p, _ in sides if p.kind == "mlp"}
    generator = torch.Generator().manual_seed(0)
    with contextlib.ExitStack() as stack:
        for i, (pair, side) in enumerate(sides):
            stack.callback(_catch(model, pair, side, seen, i).remove)
        for batch in calibration.batches:
            result = run(model, batch, labels=False)
            output, kind = output_tensor(result), kind_of(model, result)
            noise = torch.randn(output.shape, generator=generator)
            mask = output_mask(batch, output)
            sketch = curvature_sketch(output.detach(), mask, noise, kind=kind)
            states = [seen[i] for i in range(len(sides))]
            slopes = torch.autograd.grad((sketch * output).sum(), states)
            for (pair, side), state, slope in zip(sides, states, slopes, strict=True):
                product = (state.detach() * slope).double()
                if pair.kind == "mlp":
                    taylor[pair.name] += product.sum(1).abs().sum(0)
                    continue
                if pair.norms:
                    dim = pair.norms[0].heads_dim
                    state, product = (t.movedim(dim, 2).flatten(2) for t in (state, product))
                rows = by_head(pair, side, state.detach().double().flatten(0, -2))
                weight = product.sum(-1).abs().flatten().unsqueeze(-1)
                if pair.name in energy:
                    square = (rows.square() * weight).sum((1, 2))
                    energy[pair.name] += square.unflatten(1, (pair.channels, -1)).sum(1)
                    continue
                rows = rows[:, 0]
                moments[pair.name] += rows.mT @ (rows * weight)
    axes: dict[str, Axes] = {name: (value, None) for name, value in energy.items()}
    for pair in calibration.pairs:
        if pair.kind != "mlp" and pair.name not in energy:
            values, vectors = torch.linalg.eigh(moments[pair.name])
            axes[pair.name] = values.flip(-1).clamp(min=0), vectors.flip(-1).mT
    return axes, taylor


def _turns(pair: Pair) -> bool:
    """Whether nothing stands between the two maps; of a ``vo`` pair and neurons nothing does."""
    return pair.kind != "qk" or not (pair.channels > 1 or pair.norms or pair.left[0].repeat > 1)


def _catch(
    model: nn.Module, pair: Pair, side: Side, seen: dict[int, Tensor], i: int
) -> torch.utils.hooks.RemovableHandle:
    path = side.module
    if pair.norms:
        path = pair.norms[0 if side is pair.left[0] else 1].module
    module = model.get_submodule(path)
    if side.axis == 0:
        return module.register_forward_hook(lambda module, args, out: seen.update({i: out}))
    return module.register_forward_pre_hook(lambda module, args: seen.update({i: args[0]}))
