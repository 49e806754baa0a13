"""Measure how close a smaller model stays to the dense model on held-out batches."""

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from solpath.data.source import check_batches, check_device
from solpath.errors import BatchError
from solpath.objective import at_least_float
from solpath.planning.cost import Achieved
from solpath.planning.plan import plan_of
from solpath.running.forward import device_of, forward, has_logits, output_mask, output_tensor, run
from solpath.running.modes import inferring
from solpath.running.provenance import provenance


@dataclass(frozen=True)
class Result:
    """What an evaluation found.

    Attributes:
        metrics: Name of a metric to its value. ``cosine`` and ``relative_error`` are always there;
            ``kl`` (nats) and ``agreement`` (share of positions with equal argmax) are there if the
            model gives logits; ``task`` is there if a task was given.
        samples: Number of samples.
        cost: Size of the model if it was extracted, otherwise None.
        provenance: Where the figures come from, see `solpath.running.provenance.provenance`.
    """

    metrics: Mapping[str, float]
    samples: int
    cost: Achieved | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        return {**asdict(self), "cost": None if self.cost is None else self.cost.to_dict()}

    def __repr__(self) -> str:
        metrics = ", ".join(f"{name}={value:.4f}" for name, value in self.metrics.items())
        size = f", {self.cost.params:,} parameters" if self.cost else ""
        return f"Result({metrics}, {self.samples:,} samples{size})"


def evaluate(
    model: nn.Module,
    reference: nn.Module | Sequence[Tensor],
    batches: Iterable[Any],
    *,
    task: Callable[[nn.Module], float] | None = None,
) -> Result:
    """Compare the outputs of `model` with those of the dense `reference`.

    With logits, every metric is a mean over the positions that are not padding. Without logits,
    every metric is a mean over samples: ``cosine`` compares the last hidden states averaged over
    the positions that are not padding, and ``relative_error`` compares them position by position.
    With y an output and t that of the reference, ``relative_error`` is ``|y - t|² / |t|²``, and
    ``kl`` is KL(t || y) in nats.

    Both models run in eval mode without gradients. They are left as they were found, and so is the
    state of torch's random number generators.

    Args:
        model: The smaller model, or the dense model inside ``with masked(model, plan):``.
        reference: The dense model, or its outputs on these batches from `reference_outputs`. Inside
            ``with masked(...)`` the outputs are needed, because there the dense model is masked.
        batches: The held-out batches. Each is run once.
        task: A function that is called with `model`. Its value is reported as ``metrics["task"]``.

    Returns:
        The metrics, with the size of the model and where the figures come from.

    Raises:
        BatchError: There are no batches, a batch is on another device than `model`, or an output is
            not finite or does not fit the reference.

    Example:
        >>> result = solpath.evaluate(small, model, batches)
        >>> sorted(result.metrics), result.samples
        (['agreement', 'cosine', 'kl', 'relative_error'], 96)
        >>> solpath.evaluate(model, model, batches).metrics["relative_error"]
        0.0
    """
    check_batches(batches)
    device = device_of(model)
    totals: Counter[str] = Counter()
    samples = 0
    dense = [reference] if isinstance(reference, nn.Module) else []
    with inferring(model, *dense):
        for i, (batch, target) in enumerate(_with_targets(reference, batches)):
            check_device(batch, device)
            output, logits = _run(model, batch)
            target = target.to(output.device)
            _check(i, output, target)
            compare = _compare_logits if logits else _compare_hidden
            totals.update(compare(output, target, output_mask(batch, output)))
            samples += output.shape[0]
        if not samples:
            raise BatchError("batches is empty; give at least one held-out batch.")
        count = totals.pop("count")
        metrics = {name: total / count for name, total in totals.items()}
        if task is not None:
            metrics["task"] = float(task(model))
    plan = plan_of(model)
    return Result(
        metrics=metrics,
        samples=samples,
        cost=None if plan is None else plan.achieved,
        provenance=provenance(output.device),
    )


def reference_outputs(model: nn.Module, batches: Iterable[Any]) -> list[Tensor]:
    """Return the outputs of the dense model, one tensor on the CPU per batch, for `evaluate`.

    Args:
        model: The dense model, which is left as it was found.
        batches: The batches, on the device of the model. Each is run once.

    Returns:
        What `forward` gives for every batch, in the order of the batches.

    Raises:
        BatchError: There are no batches, or a single one in place of several.

    Example:
        >>> targets = reference_outputs(model, batches)
        >>> with solpath.masked(model, path.plan(sparsity=0.5)):
        ...     solpath.evaluate(model, targets, batches).samples
        96
    """
    check_batches(batches)
    with inferring(model):
        outputs = [forward(model, batch).cpu() for batch in batches]
    if not outputs:
        raise BatchError("batches is empty; give at least one held-out batch.")
    return outputs


def _with_targets(
    reference: nn.Module | Sequence[Tensor], batches: Iterable[Any]
) -> Iterator[tuple[Any, Tensor]]:
    """Yield every batch with the output of the reference for it.

    Raise `BatchError` if there are more batches than outputs, or the other way round.
    """
    if isinstance(reference, nn.Module):
        for batch in batches:
            yield batch, forward(reference, batch)
        return
    end = object()
    for i, (batch, target) in enumerate(itertools.zip_longest(batches, reference, fillvalue=end)):
        if batch is end or not isinstance(target, Tensor):
            state = f"reference output {i} has no batch"
            if batch is not end:
                state = f"batch {i} has no reference output"
            raise BatchError(f"{state}; take reference_outputs(dense, batches) of these batches.")
        yield batch, target


def _run(model: nn.Module, batch: Any) -> tuple[Tensor, bool]:
    """Return the output of `model`, and whether it is logits."""
    outputs = run(model, batch, labels=False)
    return output_tensor(outputs), has_logits(outputs)


def _check(index: int, output: Tensor, target: Tensor) -> None:
    if output.shape != target.shape:
        raise BatchError(
            f"batch {index}: the model gives {list(output.shape)} and the reference "
            f"{list(target.shape)}; both must be run on the same batches."
        )
    for name, value in (("model", output), ("reference", target)):
        if not torch.isfinite(value).all():
            raise BatchError(f"batch {index}: the output of the {name} has NaN or infinite values.")


def _compare_logits(output: Tensor, target: Tensor, mask: Tensor | None) -> dict[str, float]:
    """Sum each metric over positions. Outputs are ``[B, ..., C]``, the mask ``[B, T]`` or None."""
    classes = output.shape[-1]
    y, t = (at_least_float(value).reshape(-1, classes) for value in (output, target))
    if mask is not None:
        y, t = y[mask.flatten()], t[mask.flatten()]
    log_y, log_t = y.log_softmax(-1), t.log_softmax(-1)
    error = (y - t).square().sum(-1) / t.square().sum(-1).clamp(min=_tiny(t))
    return {
        "cosine": functional.cosine_similarity(y, t).sum().item(),
        "kl": (log_t.exp() * (log_t - log_y)).sum().item(),
        "agreement": float((y.argmax(-1) == t.argmax(-1)).sum().item()),
        "relative_error": error.sum().item(),
        "count": len(y),
    }


def _compare_hidden(output: Tensor, target: Tensor, mask: Tensor | None) -> dict[str, float]:
    """Sum each metric over samples. Outputs are ``[B, ..., D]``, the mask ``[B, T]`` or None."""
    batch, width = output.shape[0], output.shape[-1]
    y, t = (at_least_float(value).reshape(batch, -1, width) for value in (output, target))
    if mask is None:
        mask = torch.ones(y.shape[:2], dtype=torch.bool, device=y.device)
    weight = mask.unsqueeze(-1).to(y.dtype)
    tokens = weight.sum(dim=1).clamp(min=1)
    error = ((y - t).square() * weight).sum(dim=(1, 2))
    size = (t.square() * weight).sum(dim=(1, 2)).clamp(min=_tiny(t))
    pooled_y, pooled_t = (y * weight).sum(dim=1) / tokens, (t * weight).sum(dim=1) / tokens
    return {
        "cosine": functional.cosine_similarity(pooled_y, pooled_t).sum().item(),
        "relative_error": (error / size).sum().item(),
        "count": batch,
    }


def _tiny(value: Tensor) -> float:
    return math.sqrt(torch.finfo(value.dtype).tiny)
