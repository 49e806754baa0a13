"""Baselines: other ways to order the units. Each returns a `SolutionPath`, as the search does."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from solpath.config import check_count, check_number
from solpath.data.samples import union
from solpath.data.source import check_batches
from solpath.errors import ConfigError
from solpath.loading import for_batches
from solpath.model.discovery import find_pairs
from solpath.model.fingerprint import fingerprint
from solpath.objective import Loss
from solpath.pair import Fingerprint, Pair, unflatten
from solpath.planning.path import SolutionPath
from solpath.planning.removal import groups_by_rank, removal_order
from solpath.pretrained import Name
from solpath.running.claims import claimed
from solpath.running.modes import contained
from solpath.searching.dynamics import sparse_copy
from solpath.searching.engine import Engine, open_engine
from solpath.searching.signal import keep_pairs, keep_reached

_REACH_BATCHES = 4  # of methods that look at no gradient of the dense model


@contained
def random(
    model: nn.Module | Name, batches: Iterable[Any], *, seed: int = 0, loss: Loss | None = None
) -> SolutionPath:
    """Order the units at random: the floor that any method must beat.

    Args:
        model: See `solpath.search`.
        batches: See `solpath.search`. One is used to count multiply-accumulates, and a few for
            norms over the heads.
        seed: Seeds the order and a shuffling `DataLoader`.
        loss: Not used; it is taken because every baseline takes it.

    Raises:
        SolpathError: In the same cases as `solpath.search`.

    Example:
        >>> rival = solpath.baselines.random(model, batches, seed=1)
        >>> rival.config
        {'seed': 1}
    """
    with _opened(model, batches, loss, seed) as (engine, identity):
        keep_pairs(engine, engine.measure_reach(_REACH_BATCHES))
        score = torch.rand(engine.units, generator=engine.generator("random"), dtype=torch.float64)
        return _path(engine, identity, "random", score, {"seed": seed})


@contained
def magnitude(
    model: nn.Module | Name, batches: Iterable[Any], *, seed: int = 0, loss: Loss | None = None
) -> SolutionPath:
    """Order units by the norm of their weights before the inner dimension times that after it.

    The product stays the same when scale moves from one side to the other. It is divided by its
    mean over the pair, so that layers can be compared. Biases do not count.

    Args:
        model: See `solpath.search`.
        batches: See `solpath.search`. One is used to count multiply-accumulates, and a few for
            norms over the heads.
        seed: Seeds a shuffling `DataLoader`.
        loss: Not used; it is taken because every baseline takes it.

    Raises:
        SolpathError: In the same cases as `solpath.search`.

    Example:
        >>> solpath.baselines.magnitude(model, batches).method
        'magnitude'
    """
    with _opened(model, batches, loss, seed) as (engine, identity):
        keep_pairs(engine, engine.measure_reach(_REACH_BATCHES))
        parts = []
        for pair in engine.pairs:
            left = sum(engine.weight_norms(pair, side) for side in pair.left)
            product = (left * engine.weight_norms(pair, pair.right)).sqrt()
            parts.append(product / product.mean().clamp(min=1e-30))
        return _path(engine, identity, "magnitude", torch.cat(parts), {"seed": seed})


@contained
def taylor(
    model: nn.Module | Name,
    batches: Iterable[Any],
    *,
    seed: int = 0,
    loss: Loss | None = None,
    scale_batches: int = 16,
) -> SolutionPath:
    """Order units by the mean absolute derivative of the loss by their mask, per parameter.

    The derivative is taken for every sample at the dense model. Without a loss of yours the
    derivative of the objective is exactly 0 there; that of a random projection of the output, with
    the curvature of the objective, takes its place.

    Args:
        model, batches, loss: See `solpath.search`.
        seed: Seeds the projections and a shuffling `DataLoader`.
        scale_batches: Batches to average over. At least 1.

    Raises:
        ConfigError: `scale_batches` is below 1.
        SolpathError: In the same cases as `solpath.search`.

    Example:
        >>> solpath.baselines.taylor(model, batches, scale_batches=2).config["scale_batches"]
        2
    """
    check_count("scale_batches", scale_batches, 1)
    with _opened(model, batches, loss, seed) as (engine, identity):
        size = engine.curvature(scale_batches, absolute=True)[0]
        _, size = keep_reached(engine, size.square(), size)
        score = size / engine.cost
        config = {"seed": seed, "scale_batches": scale_batches}
        return _path(engine, identity, "taylor", score, config)


@contained
def gauss_newton(
    model: nn.Module | Name,
    batches: Iterable[Any],
    *,
    seed: int = 0,
    loss: Loss | None = None,
    scale_batches: int = 16,
) -> SolutionPath:
    """Order units by the loss of removing one from the dense model, to second order, per parameter.

    The second derivative is the Gauss-Newton diagonal (docs/method.md, "Objective"), or the
    empirical Fisher diagonal under a loss of yours.

    Args:
        model, batches, loss: See `solpath.search`.
        seed: Seeds the noise of the diagonal and a shuffling `DataLoader`.
        scale_batches: Batches to average over. At least 1.

    Raises:
        ConfigError: `scale_batches` is below 1.
        SolpathError: In the same cases as `solpath.search`.

    Example:
        >>> rival = solpath.baselines.gauss_newton(model, batches, scale_batches=2)
        >>> small = solpath.extract(model, rival.plan(sparsity=0.5))
    """
    check_count("scale_batches", scale_batches, 1)
    with _opened(model, batches, loss, seed) as (engine, identity):
        diagonal, slope = keep_reached(engine, *engine.curvature(scale_batches))
        score = (diagonal / 2 - slope) / engine.cost
        config = {"seed": seed, "scale_batches": scale_batches}
        return _path(engine, identity, "gauss_newton", score, config)


@contained
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
    """Remove units step by step, each time by a second-order expansion at the present size.

    At every stage the groups of units with the least estimated loss per parameter leave until its
    size is reached. Sizes fall geometrically. What remains is ordered by its last estimate.

    Args:
        model, batches, loss: See `solpath.search`.
        seed: Seeds the noise of the curvature and a shuffling `DataLoader`.
        keep: Share of the prunable parameters that stays at the last stage, in [0.001, 0.9].
        stages: Expansions on the way. At least 1.
        scale_batches: Batches for each of them. Every stage reads the next ones. At least 1.
        first_order: Use the gradient at the present size as well as the curvature.

    Raises:
        ConfigError: A setting has the wrong type or is out of its range.
        SolpathError: In the same cases as `solpath.search`.

    Example:
        >>> rival = solpath.baselines.iterative(model, batches, stages=3, scale_batches=2)
        >>> rival.method, rival.config["keep"]
        ('iterative', 0.05)
    """
    check_number("keep", keep, 1e-3, 0.9)
    check_count("stages", stages, 1)
    check_count("scale_batches", scale_batches, 1)
    with _opened(model, batches, loss, seed) as (engine, identity):
        diagonal, slope = keep_reached(engine, *engine.curvature(scale_batches))
        mask = torch.ones(engine.units, dtype=torch.float64)
        score = torch.zeros_like(mask)
        removed = 0
        for stage in range(stages):
            if stage:
                first = stage * scale_batches
                diagonal, slope = engine.curvature(scale_batches, mask, start=first)
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


@contained
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
    """Run `iterative` without its first-order term, which orders some models better.

    Args:
        model, batches, seed, loss, keep, stages, scale_batches: See `iterative`.

    Raises:
        SolpathError: In the same cases as `iterative`.

    Example:
        >>> rival = solpath.baselines.iterative_curvature(model, batches, stages=3, scale_batches=2)
        >>> rival.config["first_order"]
        False
    """
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


@contained
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
    """Order units by the update rule of the SPP authors' published code (DeiT search script).

    The rule runs Adam on the plain loss, without coupling: ``M ← Adam(∇L)``,
    ``V ← V + lr (M - Γ) / (1 - 0.9ᵗ)`` and ``Γ = max(V - λ, 0)``. It differs from that code in two
    points: units are ordered by V, which is finer than the count of logged steps with Γ > 0, and
    every head has a mask of its own.

    Args:
        model, batches: See `solpath.search`.
        loss: See `solpath.search`; it is needed. The divergence from the dense model's own output
            is least at the dense model, from where the rule would not move.
        seed: Seeds a shuffling `DataLoader`.
        steps: Updates, one batch each. At least 1.
        learning_rate: Step size of both updates, in [1e-12, 1000].
        lam: Threshold λ, in [1e-6, 1e12].

    Raises:
        ConfigError: There is no `loss`, or a setting has the wrong type or is out of its range.
        SolpathError: In the same cases as `solpath.search`.

    Example:
        >>> def loss(outputs, batch):
        ...     return torch.nn.functional.cross_entropy(outputs.logits, batch["labels"])
        >>> labelled = [{**one, "labels": one["input_ids"][:, 0] % 2} for one in batches]
        >>> rival = solpath.baselines.released(model, labelled, steps=4, loss=loss)
        >>> rival.method, rival.config["steps"]
        ('released', 4)
    """
    check_count("steps", steps, 1)
    check_number("learning_rate", learning_rate, 1e-12, 1e3)
    check_number("lam", lam, 1e-6, 1e12)
    if loss is None:
        raise ConfigError(
            "released needs loss=, such as that of a task with labels: the divergence from the "
            "dense model is least at the dense model, from where this rule would not move."
        )
    with _opened(model, batches, loss, seed) as (engine, identity):
        keep_pairs(engine, engine.measure_reach(_REACH_BATCHES))
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
"""Name to function of every baseline."""


@contextmanager
def _opened(
    model: nn.Module | Name, batches: Iterable[Any], loss: Loss | None, seed: int
) -> Iterator[tuple[Engine, Fingerprint]]:
    """Yield an engine for `model`, loaded if it is a name, and the fingerprint of the model."""
    check_batches(batches)
    model, batches = for_batches(model, batches)
    with claimed(model, doing="searched"):
        identity = fingerprint(model, find_pairs(model))
        with open_engine(model, batches, loss=loss, seed=seed) as engine:
            yield engine, identity


def _path(
    engine: Engine, identity: Fingerprint, method: str, score: Tensor, config: Mapping[str, Any]
) -> SolutionPath:
    """Return the path that orders units by `score`, the highest first."""
    order = score.argsort(descending=True, stable=True)
    entry = torch.empty_like(score)
    entry[order] = engine.cost[order].cumsum(0) / engine.cost.sum()
    reached = {pair.name for pair in engine.pairs}
    return SolutionPath(
        pairs=tuple(engine.pairs),
        score=unflatten(engine.pairs, score),
        entry_time=unflatten(engine.pairs, entry),
        costs=engine.count_costs(),
        unreached=tuple(name for name in identity.digests if name not in reached),
        method=method,
        config=config,
        fingerprint=identity,
        energy=engine.energy,
        seen=union(engine.new_samples()),
    )


def _weakest_groups(pairs: Sequence[Pair], mask: Tensor, damage: Tensor) -> Iterator[Tensor]:
    """Yield the remaining groups of units, the least mean damage first, as int64 ``[heads]``."""
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
