"""Other ways to order the units. Each gives the same `SolutionPath` as the search does.

`model`, `batches`, `seed` and `loss` are those of `solpath.search`, and so are the errors.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from solpath.config import check_count, check_number
from solpath.model.discovery import find_pairs
from solpath.model.fingerprint import fingerprint
from solpath.objective import Loss
from solpath.pair import Fingerprint, Pair
from solpath.planning.path import SolutionPath, unflatten
from solpath.planning.removal import groups_by_rank, removal_order
from solpath.pretrained import Name, for_batches
from solpath.searching.dynamics import sparse_copy
from solpath.searching.engine import Engine, open_engine


def random(
    model: nn.Module | Name, batches: Iterable[Any], *, seed: int = 0, loss: Loss | None = None
) -> SolutionPath:
    """A random order: the floor any method must beat."""
    with _opened(model, batches, loss, seed) as (engine, identity):
        score = torch.rand(engine.units, generator=engine.generator("random"), dtype=torch.float64)
        return _path(engine, identity, "random", score, {"seed": seed})


def magnitude(
    model: nn.Module | Name, batches: Iterable[Any], *, seed: int = 0, loss: Loss | None = None
) -> SolutionPath:
    """Norm of a unit's weights before the inner dimension times the norm after it.

    The product does not change when scale moves from one side to the other. It is divided by its
    mean over the pair, so that layers can be compared. `batches` only gives the sample that MACs
    are counted on and, for norms over the heads, what passes through them.
    """
    with _opened(model, batches, loss, seed) as (engine, identity):
        parts = []
        for pair in engine.pairs:
            left = sum(engine.weight_norms(pair, side) for side in pair.left)
            product = (left * engine.weight_norms(pair, pair.right)).sqrt()
            parts.append(product / product.mean().clamp(min=1e-30))
        return _path(engine, identity, "magnitude", torch.cat(parts), {"seed": seed})


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
    with _opened(model, batches, loss, seed) as (engine, identity):
        score = engine.curvature(scale_batches, absolute=True)[0] / engine.cost
        config = {"seed": seed, "scale_batches": scale_batches}
        return _path(engine, identity, "taylor", score, config)


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
    with _opened(model, batches, loss, seed) as (engine, identity):
        diagonal, slope = engine.curvature(scale_batches)
        score = (diagonal / 2 - slope) / engine.cost
        config = {"seed": seed, "scale_batches": scale_batches}
        return _path(engine, identity, "gauss_newton", score, config)


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
    with _opened(model, batches, loss, seed) as (engine, identity):
        mask = torch.ones(engine.units, dtype=torch.float64)
        score = torch.zeros_like(mask)
        removed = 0
        for stage in range(stages):
            diagonal, slope = engine.curvature(scale_batches, mask, start=stage * scale_batches)
            damage = (diagonal / 2 - slope * first_order) / engine.cost
            target = keep ** ((stage + 1) / stages) * float(engine.cost.sum())
            for group in _weakest_groups(engine.pairs, mask, damage):
                if float((mask * engine.cost).sum()) <= target:
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
        return _path(engine, identity, name, score, config)


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
    with _opened(model, batches, loss, seed) as (engine, identity):
        mask = torch.ones(engine.units, dtype=torch.float64, requires_grad=True)
        adam = torch.optim.AdamW([mask], lr=learning_rate, eps=1e-4, weight_decay=0)
        dual = torch.zeros(engine.units, dtype=torch.float64)
        for k in range(steps):
            rows = engine.gradients(k, mask.detach(), binary=False)[2]
            mask.grad = engine.mean(rows, engine.batch_size(k))[0]
            adam.step()
            gamma = sparse_copy(dual, 1.0, lam)
            dual = dual + learning_rate / (1 - 0.9 ** (k + 1)) * (mask.detach() - gamma)
        config = {"seed": seed, "steps": steps, "learning_rate": learning_rate, "lam": lam}
        return _path(engine, identity, "released", dual, config)


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
def _opened(
    model: nn.Module | Name, batches: Iterable[Any], loss: Loss | None, seed: int
) -> Iterator[tuple[Engine, Fingerprint]]:
    model, batches = for_batches(model, batches)
    identity = fingerprint(model, find_pairs(model))
    with open_engine(model, batches, loss=loss, seed=seed) as engine:
        yield engine, identity


def _path(
    engine: Engine, identity: Fingerprint, method: str, score: Tensor, config: Mapping[str, Any]
) -> SolutionPath:
    order = score.argsort(descending=True, stable=True)
    entry = torch.empty_like(score)
    entry[order] = engine.cost[order].cumsum(0) / engine.cost.sum()
    return SolutionPath(
        pairs=tuple(engine.pairs),
        score=unflatten(engine.pairs, score),
        entry_time=unflatten(engine.pairs, entry),
        costs=engine.count_costs(),
        method=method,
        config=config,
        fingerprint=identity,
        energy=engine.energy,
    )


def _weakest_groups(pairs: Sequence[Pair], mask: Tensor, damage: Tensor) -> Iterator[Tensor]:
    """Units of equal rank in every head of a pair, least mean damage first. int64 ``[heads]``."""
    sizes = [pair.units for pair in pairs]
    shapes = [(pair.heads, pair.width) for pair in pairs]
    values = [
        part.view(shape) for part, shape in zip(torch.split(damage, sizes), shapes, strict=True)
    ]
    alive = [
        part.view(shape) > 0 for part, shape in zip(torch.split(mask, sizes), shapes, strict=True)
    ]
    groups = [groups_by_rank(value, here) for value, here in zip(values, alive, strict=True)]
    order = removal_order([mean for mean, _ in groups], [0] * len(groups))
    starts = [0, *accumulate(sizes)]
    for i, rank in zip(order.pair.tolist(), order.start.tolist(), strict=True):
        heads, width = shapes[i]
        yield starts[i] + torch.arange(heads) * width + groups[i][1][:, rank]
