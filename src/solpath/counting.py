"""Count the multiply-accumulates of a model on one sample, and what each unit takes part in."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from solpath.cost import CostTable
from solpath.objective import run
from solpath.pair import Pair


def count_costs(model: nn.Module, pairs: Sequence[Pair], sample: Any) -> CostTable:
    """Cost table of a dense model for one sample.

    A unit takes part in its rows and columns of the linear layers, once per token, and a ``qk`` or
    ``vo`` unit also in one multiplication per pair of tokens and query head.

    Args:
        model: runs once, without gradients.
        sample: a batch of one sample.
    """
    rows: dict[str, tuple[int, int]] = {}

    def note(pair: Pair) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            shape = args[0].shape
            rows[pair.name] = (shape[:-1].numel(), shape[-2])

        return hook

    handles = [
        model.get_submodule(pair.mask_side.module).register_forward_hook(note(pair))
        for pair in pairs
    ]
    try:
        # The plain attention kernel, because the counter knows no formula for some fused ones.
        with (
            torch.no_grad(),
            sdpa_kernel(SDPBackend.MATH),
            FlopCounterMode(display=False) as counter,
        ):
            run(model, sample, labels=False)
    finally:
        for handle in handles:
            handle.remove()
    return CostTable(
        params=sum(parameter.numel() for parameter in model.parameters()),
        macs=counter.get_total_flops() // 2,
        sample={name: tuple(value.shape) for name, value in _named(sample)},
        unit_params={pair.name: pair.cost for pair in pairs},
        unit_macs={pair.name: _unit_macs(model, pair, *rows[pair.name]) for pair in pairs},
    )


def _unit_macs(model: nn.Module, pair: Pair, rows: int, tokens: int) -> int:
    weights = 0
    for side in pair.sides:
        linear = model.get_submodule(side.module)
        assert isinstance(linear, nn.Linear)
        outside = linear.in_features if side.axis == 0 else linear.out_features
        weights += side.repeat * pair.channels * outside
    if pair.kind != "mlp":
        weights += max(side.repeat for side in pair.sides) * pair.channels * tokens
    return weights * rows


def _named(sample: Any) -> list[tuple[str, Tensor]]:
    items = sample.items() if isinstance(sample, Mapping) else [("input", sample)]
    return [(name, value) for name, value in items if isinstance(value, Tensor)]
