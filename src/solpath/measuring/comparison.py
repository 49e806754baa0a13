"""Compare the outputs of several models with those of the dense model, batch by batch.

Logits of a large vocabulary are never whole: they are computed and compared some tokens at a time.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from solpath.errors import BatchError
from solpath.measuring.intervals import mean_interval, share_interval
from solpath.measuring.metrics import compare, spread_errors
from solpath.model.head import LazyLogits, logits_in_parts, parts
from solpath.objective import kind_of
from solpath.running.forward import attended, output_mask, output_tensor, row_not_finite, run

Target = Tensor | LazyLogits
"""The output of the dense model for one batch: a tensor, or logits that come in parts."""


class Tally:
    """Collects what was compared of one model, sample by sample."""

    def __init__(self) -> None:
        self._sums: dict[str, list[Tensor]] = defaultdict(list)
        self._values: list[tuple[Tensor, Tensor, Tensor | None]] = []  # of a regression

    def add(self, sums: Mapping[str, Tensor]) -> None:
        """Add the sums over every sample of a batch.

        Args:
            sums: See `solpath.measuring.metrics.compare`.
        """
        for name, rows in sums.items():
            self._sums[name].append(rows)

    def keep(self, output: Tensor, target: Tensor, mask: Tensor | None) -> None:
        """Keep the outputs of a regression for one batch: their spread is that of all batches.

        Args:
            output: See `solpath.measuring.metrics.spread_errors`.
            target: See there.
            mask: See there.
        """
        self._values.append((output, target, mask))

    def summary(self) -> tuple[dict[str, float], dict[str, tuple[float, float]]]:
        """Return name to mean of every metric, and name to its interval where there is one."""
        ratios = {name: torch.cat(rows) for name, rows in self._sums.items()}
        counts = ratios.pop("count", torch.empty(0))
        pairs = {name: (sums, counts) for name, sums in ratios.items()}
        if self._values:
            pairs["relative_error"] = spread_errors(self._values)
        means = {name: float(sums.sum() / counts.sum()) for name, (sums, counts) in pairs.items()}
        found = {
            name: (share_interval if name == "agreement" else mean_interval)(*pair)
            for name, pair in pairs.items()
        }
        return means, {name: ends for name, ends in found.items() if ends is not None}


def dense_output(model: nn.Module, batch: Any, *, optional: bool = False) -> Target | None:
    """Return the output of the dense model for one batch.

    Args:
        model: The model, in eval mode.
        batch: The batch, on the model's device.
        optional: Whether None is returned for outputs that cannot be compared.

    Raises:
        BatchError: The model returns no output that can be compared.
    """
    lazy = logits_in_parts(model, batch)
    if lazy is not None:
        return lazy
    outputs = run(model, batch, labels=False)
    try:
        return output_tensor(outputs)
    except BatchError:
        if optional:
            return None
        raise


def compare_batch(
    models: Mapping[str, nn.Module],
    tallies: Mapping[str, Tally],
    target: Target,
    batch: Any,
    place: Callable[[int | None], str],
) -> None:
    """Run models on one batch, and add to their tallies how near they are to the dense model.

    Args:
        models: Name to model, in eval mode; messages call the models by these names.
        tallies: Name to tally.
        target: The output of the dense model for the batch.
        batch: The batch, on the models' device.
        place: Returns the words for the batch, or for a row of it, see `Preparation.place`.

    Raises:
        BatchError: An output is not finite, or has another shape than the target.
    """
    large: dict[str, Target] = {}
    for name, model in models.items():
        lazy = logits_in_parts(model, batch)
        outputs = run(model, batch, labels=False) if lazy is None else None
        output: Target = output_tensor(outputs) if lazy is None else lazy
        if output.shape != target.shape:
            raise BatchError(
                f"{place(None)}: {name} gives {list(output.shape)} and the reference "
                f"{list(target.shape)}; both must be run on the same batches."
            )
        if isinstance(output, LazyLogits) or isinstance(target, LazyLogits):
            large[name] = output
            continue
        goal, kind = target.to(output.device), kind_of(model, outputs)
        _check_finite(name, output, goal, place)
        mask = attended(batch, output) if kind == "spans" else output_mask(batch, output)
        if kind == "regression":
            tallies[name].keep(output, goal, mask)
            continue
        tallies[name].add(compare(output, goal, mask, kind=kind))
    if not large:
        return
    mask = output_mask(batch, torch.zeros(()).expand(target.shape))  # of this shape, no memory
    sums: dict[str, dict[str, Tensor]] = {name: {} for name in large}
    for start, stop in parts(target.shape):
        part = _part(target, start, stop)
        for name, whole in large.items():
            output = _part(whole, start, stop)
            goal = part.to(output.device)
            _check_finite(name, output, goal, place)
            counted = None if mask is None else mask[:, start:stop]
            for metric, rows in compare(output, goal, counted, kind="classes").items():
                sums[name][metric] = sums[name].get(metric, 0) + rows
    for name, found in sums.items():
        tallies[name].add(found)


def _part(logits: Target, start: int, stop: int) -> Tensor:
    return logits.part(start, stop) if isinstance(logits, LazyLogits) else logits[:, start:stop]


def _check_finite(
    name: str, output: Tensor, target: Tensor, place: Callable[[int | None], str]
) -> None:
    for whose, value in ((name, output), ("the reference", target)):
        if not torch.isfinite(value).all():
            raise BatchError(
                f"{place(row_not_finite(value))}: the output of {whose} has NaN or infinite values."
            )
