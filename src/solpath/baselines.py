"""Other ways to order the units. Each gives the same `SolutionPath` as the search does.

`model`, `batches`, `seed` and `loss` are those of `solpath.search`, and so are the errors.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from solpath.config import check_count, check_number
from solpath.model.counting import count_costs
from solpath.model.discovery import find_pairs, fingerprint
from solpath.model.slicing import linear_map
from solpath.objective import Loss
from solpath.pair import Pair, Side
from solpath.planning.path import SolutionPath, unflatten
from solpath.pretrained import Name, for_batches
from solpath.searching.dynamics import sparse_copy
from solpath.searching.probe import Probe, probing


def random(
    model: nn.Module | Name, batches: Iterable[Any], *, seed: int = 0, loss: Loss | None = None
) -> SolutionPath:
    """A random order: the floor any method must beat."""
    with _probe(model, batches, loss, seed) as (model, pairs, probe):
        score = torch.rand(probe.units, generator=probe.generator("random"), dtype=torch.float64)
        return _path(model, pairs, probe, "random", score, {"seed": seed})


def magnitude(
    model: nn.Module | Name, batches: Iterable[Any], *, seed: int = 0, loss: Loss | None = None
) -> SolutionPath:
    """Norm of a unit's weights before the inner dimension times the norm after it.

    The product does not change when scale moves from one side to the other. It is divided by its
    mean over the pair, so that layers can be compared. `batches` only gives the sample that MACs
    are counted on and, for norms over the heads, what passes through them.
    """
    with _probe(model, batches, loss, seed) as (model, pairs, probe):
        parts = []
        for pair in pairs:
            left = sum(_norms(model, pair, side) for side in pair.left)
            product = (left * _norms(model, pair, pair.right)).sqrt()
            parts.append(product / product.mean().clamp(min=1e-30))
        return _path(model, pairs, probe, "magnitude", torch.cat(parts), {"seed": seed})


def taylor(
    model: nn.Module | Name,
    batches: Iterable[Any],
    *,
    seed: int = 0,
    loss: Loss | None = None,
    scale_batches: int = 16,
) -> SolutionPath:
    """First-order sensitivity per parameter: mean absolute derivative by the mask, per sample.

    With a user's loss the derivative is that of the loss; without one, where it is exactly 0 at
    the dense model, that of a random projection of the output with the loss's curvature.
    """
    check_count("scale_batches", scale_batches, 1)
    with _probe(model, batches, loss, seed) as (model, pairs, probe):
        score = probe.curvature(scale_batches, absolute=True)[0] / probe.cost
        config = {"seed": seed, "scale_batches": scale_batches}
        return _path(model, pairs, probe, "taylor", score, config)


def gauss_newton(
    model: nn.Module | Name,
    batches: Iterable[Any],
    *,
    seed: int = 0,
    loss: Loss | None = None,
    scale_batches: int = 16,
) -> SolutionPath:
    """Expected loss of removing a unit from the dense model, to second order, per parameter."""
    check_count("scale_batches", scale_batches, 1)
    with _probe(model, batches, loss, seed) as (model, pairs, probe):
        diagonal, slope = probe.curvature(scale_batches)
        score = (diagonal / 2 - slope) / probe.cost
        config = {"seed": seed, "scale_batches": scale_batches}
        return _path(model, pairs, probe, "gauss_newton", score, config)


def iterative(
    model: nn.Module | Name,
    batches: Iterable[Any],
    *,
    seed: int = 0,
    loss: Loss | None = None,
    keep: float = 0.05,
    stages: int = 12,
    scale_batches: int = 16,
    first_order: bool = True,
) -> SolutionPath:
    """Gauss-Newton elimination, linearised again at several sizes on the way down.

    Args:
        keep: share of the cost at the last stage; sizes fall geometrically to it.
        stages: linearisations.
        scale_batches: batches for each, different at every stage.
        first_order: use the gradient at the current size as well as the curvature.
    """
    check_number("keep", keep, 1e-3, 0.9)
    check_count("stages", stages, 1)
    check_count("scale_batches", scale_batches, 1)
    with _probe(model, batches, loss, seed) as (model, pairs, probe):
        mask = torch.ones(probe.units, dtype=torch.float64)
        score = torch.zeros_like(mask)
        removed = 0
        for stage in range(stages):
            diagonal, slope = probe.curvature(scale_batches, mask, start=stage * scale_batches)
            damage = (diagonal / 2 - slope * first_order) / probe.cost
            target = keep ** ((stage + 1) / stages) * float(probe.cost.sum())
            for group in _weakest_groups(pairs, mask, damage):
                if float((mask * probe.cost).sum()) <= target:
                    break
                removed += 1
                mask[group] = 0
                score[group] = removed
        rest = mask > 0
        score[rest] = removed + 1 + damage[rest].argsort().argsort().double()
        config = {
            "seed": seed,
            "keep": keep,
            "stages": stages,
            "scale_batches": scale_batches,
            "first_order": first_order,
        }
        name = "iterative" if first_order else "iterative_curvature"
        return _path(model, pairs, probe, name, score, config)


def iterative_curvature(
    model: nn.Module | Name,
    batches: Iterable[Any],
    *,
    seed: int = 0,
    loss: Loss | None = None,
    keep: float = 0.05,
    stages: int = 12,
    scale_batches: int = 16,
) -> SolutionPath:
    """`iterative` without the first-order term, which is the better one on some models."""
    return iterative(
        model,
        batches,
        seed=seed,
        loss=loss,
        keep=keep,
        stages=stages,
        scale_batches=scale_batches,
        first_order=False,
    )


def released(
    model: nn.Module | Name,
    batches: Iterable[Any],
    *,
    seed: int = 0,
    loss: Loss | None = None,
    steps: int = 200,
    learning_rate: float = 1e-3,
    lam: float = 3.0,
) -> SolutionPath:
    """The update rule of the authors' published code: Adam on the plain loss, no coupling.

    ``M ← Adam(∇L)``, ``V ← V + lr (M - Γ) / (1 - 0.9ᵗ)``, ``Γ = max(V - λ, 0)``. Units are ordered
    by V, which is finer than the published count of logged steps with Γ > 0; every head has its
    own mask, where the published code shares one.
    """
    check_count("steps", steps, 1)
    check_number("learning_rate", learning_rate, 1e-12, 1e3)
    check_number("lam", lam, 1e-6, 1e12)
    with _probe(model, batches, loss, seed) as (model, pairs, probe):
        mask = torch.ones(probe.units, dtype=torch.float64, requires_grad=True)
        adam = torch.optim.AdamW([mask], lr=learning_rate, eps=1e-4, weight_decay=0)
        dual = torch.zeros(probe.units, dtype=torch.float64)
        for k in range(steps):
            rows = probe.gradients(k, mask.detach(), binary=False)[2]
            mask.grad = probe.mean(rows, probe.batch_size(k))[0]
            adam.step()
            gamma = sparse_copy(dual, 1.0, lam)
            dual = dual + learning_rate / (1 - 0.9 ** (k + 1)) * (mask.detach() - gamma)
        config = {"seed": seed, "steps": steps, "learning_rate": learning_rate, "lam": lam}
        return _path(model, pairs, probe, "released", dual, config)


METHODS: Mapping[str, Callable[..., SolutionPath]] = {
    "random": random,
    "magnitude": magnitude,
    "taylor": taylor,
    "gauss_newton": gauss_newton,
    "iterative": iterative,
    "iterative_curvature": iterative_curvature,
    "released": released,
}
"""Every baseline by name."""


@contextmanager
def _probe(
    model: nn.Module | Name, batches: Iterable[Any], loss: Loss | None, seed: int
) -> Iterator[tuple[nn.Module, tuple[Pair, ...], Probe]]:
    model, batches = for_batches(model, batches)
    pairs = find_pairs(model)
    with probing(model, pairs, batches, loss=loss, seed=seed) as probe:
        yield model, pairs, probe


def _path(
    model: nn.Module,
    pairs: tuple[Pair, ...],
    probe: Probe,
    method: str,
    score: Tensor,
    config: Mapping[str, Any],
) -> SolutionPath:
    order = score.argsort(descending=True, stable=True)
    entry = torch.empty_like(score)
    entry[order] = probe.cost[order].cumsum(0) / probe.cost.sum()
    return SolutionPath(
        pairs=pairs,
        score=unflatten(pairs, score),
        entry_time=unflatten(pairs, entry),
        costs=count_costs(model, pairs, probe.first_sample()),
        method=method,
        config=config,
        fingerprint=fingerprint(model, pairs),
        energy=probe.energy,
    )


def _norms(model: nn.Module, pair: Pair, side: Side) -> Tensor:
    """Squared norm of every unit's weights in one layer. float64 ``[units]``."""
    linear = linear_map(model, side.module)
    along = linear.outputs if side.axis == 0 else 1 - linear.outputs
    unit = pair.unit_of_channel(side)
    channels = linear.weight.detach().double().cpu().square().sum(1 - along)
    channels = channels[side.offset : side.offset + len(unit)]
    return torch.zeros(pair.units, dtype=torch.float64).index_add(0, unit, channels)


def _weakest_groups(pairs: Sequence[Pair], mask: Tensor, damage: Tensor) -> Iterator[Tensor]:
    """Units of equal rank in every head of a pair, least mean damage first. int64 ``[heads]``."""
    sizes = [pair.units for pair in pairs]
    groups: list[tuple[float, int, Tensor]] = []
    start = 0
    for pair, alive, value in zip(
        pairs, torch.split(mask, sizes), torch.split(damage, sizes), strict=True
    ):
        alive = alive.view(pair.heads, pair.width) > 0
        rest = int(alive[0].sum())
        value = value.view(pair.heads, pair.width).masked_fill(~alive, -torch.inf)
        ordered, index = value.sort(dim=1, descending=True, stable=True)
        offset = start + torch.arange(pair.heads) * pair.width
        means = ordered[:, :rest].mean(0).tolist()
        groups += [(means[r], -r, offset + index[:, r]) for r in range(rest)]
        start += pair.units
    for _, _, group in sorted(groups, key=lambda g: g[:2]):
        yield group
