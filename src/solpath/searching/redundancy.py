"""The unexplained variance of units, and the moments that it is computed from."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from solpath.model.hooks import Hook, hooked
from solpath.model.linear import linear_map
from solpath.pair import Pair
from solpath.running.forward import Batch, activation_mask
from solpath.searching.dynamics import unexplained_variance

Inputs = Mapping[str, Tensor]
"""Pair name to float64 ``[channels + 1, channels + 1]``: second moments of the channels that the
right-hand layer gets, summed over tokens. The last row and column hold the sums of the channels
and the number of tokens."""


@contextlib.contextmanager
def input_hooks(
    model: nn.Module, pairs: Sequence[Pair], batch: Batch
) -> Iterator[dict[str, Tensor]]:
    """Yield `Inputs` that add up while the model runs.

    The hooks are removed when the block ends.

    Args:
        model: The model that runs.
        pairs: Its pairs to watch.
        batch: What it runs on. Padding does not count.
    """
    totals: dict[str, Tensor] = {}

    def watch(total: Tensor) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            states = args[0].detach()
            weight = torch.ones_like(states[..., :1])
            keep = activation_mask(batch, states)
            weight = weight if keep is None else weight * keep.unsqueeze(-1)
            rows = torch.cat([states * weight, weight], -1).flatten(0, -2).double()
            total.add_((rows.T @ rows).cpu())  # a variance may be tiny beside the squared mean

        return hook

    def watched() -> Iterator[Hook]:
        for pair in pairs:
            size = linear_map(model, pair.right.module).in_features + 1
            totals[pair.name] = torch.zeros(size, size, dtype=torch.float64)
            module = model.get_submodule(pair.right.module)
            yield Hook(module, "before", watch(totals[pair.name]))

    with hooked(watched()):
        yield totals


def unexplained_variances(
    model: nn.Module, pairs: Sequence[Pair], inputs: Inputs, mask: Tensor
) -> Tensor:
    """Return the share of every unit's mean square that kept units cannot predict.

    A right-hand layer with a bias makes up for means, so moments are taken about the mean. Without
    a bias they are taken about 0. See docs/method.md, "Compensation".

    Args:
        model: Tells which right-hand layers have a bias.
        pairs: Its pairs.
        inputs: From `input_hooks`. Units of pairs that are not in it get 1.
        mask: Probability that each unit is kept, ``[units]``.

    Returns:
        The shares, in [0.0001, 1], float64 ``[units]``.
    """
    parts = []
    for pair, kept in zip(pairs, torch.split(mask.double(), [p.units for p in pairs]), strict=True):
        if pair.name not in inputs:
            parts.append(torch.ones_like(kept))
            continue
        moments = inputs[pair.name]
        tokens, square = moments[-1, -1], moments[:-1, :-1]
        energy = square.diagonal()
        if linear_map(model, pair.right.module).bias is not None:
            square = square - torch.outer(moments[-1, :-1], moments[-1, :-1]) / tokens
        unit = pair.unit_of_channel(pair.right)
        spread = square.diagonal().clamp(min=0)
        root = torch.maximum(spread, 1e-12 * energy).sqrt().clamp(min=1e-30)
        left = spread * unexplained_variance(square / torch.outer(root, root), kept[unit])
        total = torch.zeros_like(kept).index_add(0, unit, energy)
        own = torch.zeros_like(kept).index_add(0, unit, left)
        parts.append((own / total.clamp(min=1e-30)).clamp(1e-4, 1))
    return torch.cat(parts)
