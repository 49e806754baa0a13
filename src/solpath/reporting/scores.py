"""How good one model is, in numbers with intervals, and what the numbers are called."""

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn

from solpath.errors import ConfigError
from solpath.reporting.family import Metric

DISTANCES = (
    Metric("loss", "Loss", lower=True),
    Metric("kl", "KL from the dense model, nats", lower=True),
    Metric("agreement", "Agreement with the dense model", lower=False),
    Metric("cosine", "Cosine to the dense model", lower=False),
    Metric("relative_error", "Squared error ÷ squared output", lower=True),
)
"""The metrics of `solpath.evaluate`, the one that people decide by first."""
TASKS = (
    Metric("task", "Task", lower=False),
    Metric("accuracy", "Accuracy", lower=False),
    Metric("f1_macro", "F1, averaged over classes", lower=False),
    Metric("perplexity", "Perplexity", lower=True),
    Metric("loss", "Loss at the next token, nats", lower=True),
    Metric("recall@1", "Retrieval accuracy", lower=False),
    Metric("recall@5", "Retrieval among the first 5", lower=False),
)
"""The metrics of `solpath.reporting.tasks`, and of a task that gives one number."""


@dataclass(frozen=True)
class Scores:
    """How good one model is.

    Attributes:
        metrics: Name of a metric to its value.
        intervals: Name of a metric to the ends of its 95 % confidence interval, where it has one.
        lower: Names of the metrics of which lower values are better, besides those of `TASKS`.
    """

    metrics: Mapping[str, float]
    intervals: Mapping[str, Sequence[float]] = field(default_factory=dict)
    lower: Collection[str] = ()


Task = Callable[[nn.Module], float | Mapping[str, float] | Scores]
"""A function that scores a model at its task: one number, or name of a metric to its value."""


def scores_at(task: Task, models: Mapping[str, nn.Module]) -> dict[str, Scores]:
    """Return name to the scores of every model at a task.

    Args:
        task: The task.
        models: Name to model.

    Raises:
        ConfigError: The task does not give every model the same metrics, or one is not finite.
    """
    found = {}
    for name, model in models.items():
        value = task(model)
        if not isinstance(value, Scores):
            named = value if isinstance(value, Mapping) else {"task": value}
            value = Scores({key: float(number) for key, number in named.items()})
        found[name] = value
        for key, number in value.metrics.items():
            if not math.isfinite(number):
                raise ConfigError(
                    f"the task gives {key}={number} for {name}; give a finite number."
                )
    first = next(iter(found.values()))
    for name, one in found.items():
        if not one.metrics or list(one.metrics) != list(first.metrics):
            raise ConfigError(
                f"task must give the same metrics for all models; it gave {list(one.metrics)} for "
                f"{name} and {list(first.metrics)} for {next(iter(found))}."
            )
    return found


def metrics_of(task: Scores) -> tuple[Metric, ...]:
    """Return the metrics of a task, in its order; a name that is not known is its own title."""
    known = {one.key: one for one in TASKS}
    return tuple(
        known.get(name) or Metric(name, name.replace("_", " "), lower=name in task.lower)
        for name in task.metrics
    )


def both(task: Scores, distance: Scores) -> Scores:
    """Return the scores at a task, followed by those of the distance.

    Raises:
        ConfigError: A metric is among both.
    """
    if twice := task.metrics.keys() & distance.metrics.keys():
        raise ConfigError(
            f"both the task and the distance give {min(twice)!r}; give the task's another name, or "
            "leave loss= out."
        )
    return Scores(
        {**task.metrics, **distance.metrics}, {**task.intervals, **distance.intervals}, task.lower
    )


def shown(metrics: Iterable[Metric]) -> tuple[Metric, ...]:
    """Return the two metrics to show first: the main one, and the next that is a distance.

    Args:
        metrics: All metrics, the main one first.
    """
    main, *rest = metrics
    distances = {one.key for one in DISTANCES}
    second = next((one for one in rest if one.key in distances - {"loss"}), None)
    return (main, *([second] if second is not None else rest[:1]))
