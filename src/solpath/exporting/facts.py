"""What is known of an exported model, for its card and its record."""

from collections.abc import Sequence
from pathlib import Path

from torch import nn

from solpath.errors import ConfigError
from solpath.exporting.card import Facts
from solpath.exporting.formats import Counted, Format
from solpath.exporting.origin import Origin
from solpath.exporting.parity import Parity
from solpath.measuring.evaluation import Result
from solpath.planning.plan import Plan, plan_of
from solpath.running.provenance import version_of

_KINDS = {"qk": "query and key", "vo": "value and output", "mlp": "MLP", "experts": "experts"}
_PACKAGES = ("solpath", "torch", "transformers")


def check_evaluation(model: nn.Module, evaluation: Result | None) -> None:
    """Raise `ConfigError` unless an evaluation is one of a model of the sizes of this one.

    Args:
        model: The model that is exported.
        evaluation: What `evaluate` returned, or None.
    """
    if evaluation is None:
        return
    if not isinstance(evaluation, Result):
        raise ConfigError(f"evaluation must be what solpath.evaluate returned, got {evaluation!r}.")
    plan = plan_of(model)
    expected, found = None if plan is None else plan.achieved, evaluation.cost
    if expected != found:
        sizes = [
            "the dense model" if cost is None else f"a model of {cost.params:,} parameters"
            for cost in (found, expected)
        ]
        raise ConfigError(
            f"evaluation is of {sizes[0]}, and {sizes[1]} is exported; evaluate that one."
        )


def facts_of(
    model: nn.Module,
    format: Format,
    folder: Path,
    origin: Origin,
    parity: Sequence[Parity],
    counted: Counted | None,
    evaluation: Result | None,
) -> Facts:
    """Return what the card of an exported folder says.

    Args:
        model: The model that was exported.
        format: What it was written in.
        folder: The folder, without a card.
        origin: What is known of the dense model.
        parity: What was found when both were run.
        counted: Sizes of what was written, where they are not those of the plan.
        evaluation: What `evaluate` found of the model, or None.
    """
    plan = plan_of(model)
    return Facts(
        model=type(model).__name__,
        title=format.title,
        loads=format.loads(model, folder),
        library=format.library,
        origin=origin,
        sizes=sizes_of(plan) if counted is None else counted.sizes,
        cut=_cut(plan) if plan else (),
        padded={} if counted is None else counted.padded,
        file_bytes=sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()),
        asked={} if plan is None else {n: v for n, v in plan.asked.items() if v is not None},
        metrics={} if evaluation is None else evaluation.metrics,
        intervals={} if evaluation is None else evaluation.intervals,
        samples=0 if evaluation is None else evaluation.samples,
        parity=parity,
        runtime=format.runtime(),
        versions={name: version_of(name) for name in _PACKAGES},
    )


def sizes_of(plan: Plan | None) -> dict[str, tuple[int, int]]:
    """Return what was counted, to the number in the dense model and in the one of a plan.

    Args:
        plan: The plan, or None, of which nothing is counted.
    """
    if plan is None:
        return {}
    size = plan.achieved
    counts = {"parameters": (size.params, size.params_share)}
    counts["multiply-accumulates"] = size.macs, size.macs_share
    return {name: (round(n / share), n) for name, (n, share) in counts.items() if n and share}


def _cut(plan: Plan) -> list[tuple[str, int, int, int]]:
    """Return what is kept of the pairs of every kind and width: the least and the most."""
    groups: dict[tuple[str, int], list[int]] = {}
    for pair in plan.pairs:
        key = _KINDS[pair.kind], pair.width * pair.channels
        groups.setdefault(key, []).append(plan.widths[pair.name] * pair.channels)
        if plan.heads:
            whole = f"heads of {_KINDS[pair.kind]}", pair.heads
            kept = plan.heads.get(pair.name)
            groups.setdefault(whole, []).append(pair.heads if kept is None else len(kept))
    rows = [(kind, min(kept), max(kept), whole) for (kind, whole), kept in groups.items()]
    return [row for row in rows if not row[0].startswith("heads of") or row[1] < row[3]]
