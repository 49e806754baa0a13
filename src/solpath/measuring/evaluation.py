"""How close a smaller model stays to the dense one on held-out batches."""

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
        metrics: name to value. ``cosine`` and ``relative_error`` always; ``kl`` (nats) and
            ``agreement`` (share of equal argmax) when the model gives logits; ``task`` when asked.
        samples: samples seen.
        cost: size of the model when it was extracted, otherwise None.
        provenance: command, commit, versions, device, threads, time.
    """

    metrics: Mapping[str, float]
    samples: int
    cost: Achieved | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
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

    With logits, every position that is not padding counts once. Without logits, the last hidden
    state is averaged over the positions of each sample that are not padding, and ``cosine`` is
    between those averages; ``relative_error`` stays position by position, sample by sample.
    ``relative_error`` is ``|y - t|^2 / |t|^2`` with t the output of the reference.

    Both models run in eval mode without gradients and are left as found, and so is the state of
    torch's random number generators.

    Args:
        model: the smaller model, or the dense one inside ``with masked(model, plan):``.
        reference: the dense model, or its outputs from `reference_outputs` for these batches.
            Inside ``with masked(...)`` take the outputs: the dense model is masked there.
        batches: held-out batches, each run once.
        task: called with `model`; what it returns is reported as ``metrics["task"]``.

    Raises:
        BatchError: no batches, or on another device than `model`; an output that does not fit the
            reference, or is not finite.
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
    """Outputs of the dense model for `evaluate`, one tensor per batch, kept on the CPU.

    Raises:
        BatchError: no batches.
    """
    with inferring(model):
        outputs = [forward(model, batch).cpu() for batch in batches]
    if not outputs:
        raise BatchError("batches is empty; give at least one held-out batch.")
    return outputs


def _with_targets(
    reference: nn.Module | Sequence[Tensor], batches: Iterable[Any]
) -> Iterator[tuple[Any, Tensor]]:
    """Pair every batch with the reference's output for it."""
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
    """The output of `model`, and whether it is logits."""
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
    """Sums over positions. ``[B, ..., C]`` twice, mask ``[B, T]`` or None."""
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
    """Sums over samples. ``[B, ..., D]`` twice, mask ``[B, T]`` or None."""
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
