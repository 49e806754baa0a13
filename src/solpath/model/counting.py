"""Count what a model takes, in bytes and multiply-accumulates, and each unit's part in it."""

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from solpath.data.source import shapes_of
from solpath.model.slicing import linear_map
from solpath.objective import run
from solpath.pair import Pair
from solpath.planning.cost import CostTable


def count_costs(model: nn.Module, pairs: Sequence[Pair], sample: Any) -> CostTable:
    """Cost table of a dense model for one sample.

    A unit takes part in its rows and columns of the linear layers, once per token, and a ``qk`` or
    ``vo`` unit also in one multiplication per pair of tokens and query head. Units of layers that
    did not run on the sample (the other tower, say) cost no MACs. Bytes are those of the dtype
    that the tensors have; the key-value cache is taken to have that of the key and value layers.

    Args:
        model: runs once, without gradients; may be on the meta device, with the sample.
        sample: a batch of one sample.
    """
    shapes: dict[str, list[torch.Size]] = {}

    def note(path: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Any) -> None:
            shapes[path] = [arg.shape for arg in args if isinstance(arg, Tensor)]

        return hook

    paths = {side.module for pair in pairs for side in pair.sides}
    handles = [model.get_submodule(path).register_forward_hook(note(path)) for path in paths]
    try:
        # The plain attention kernel, because the counter knows no formula for some fused ones.
        with (
            torch.no_grad(),
            _without_data(model),
            sdpa_kernel(SDPBackend.MATH),
            FlopCounterMode(display=False) as counter,
        ):
            run(model, sample, labels=False)
    finally:
        for handle in handles:
            handle.remove()
    size = {p.name: linear_map(model, p.left[0].module).weight.element_size() for p in pairs}
    unit_cache = {pair.name: pair.cache * size[pair.name] for pair in pairs}
    return CostTable(
        params=sum(parameter.numel() for parameter in model.parameters()),
        bytes=_saved_bytes(model),
        macs=counter.get_total_flops() // 2,
        cache=sum(pair.units * unit_cache[pair.name] for pair in pairs),
        sample=shapes_of(sample),
        unit_params={pair.name: pair.cost for pair in pairs},
        unit_bytes={pair.name: pair.cost * size[pair.name] for pair in pairs},
        unit_macs={pair.name: _unit_macs(model, pair, shapes) for pair in pairs},
        unit_cache=unit_cache,
    )


def _saved_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and saved buffers, each once, on the meta device too."""
    tensors = {id(tensor): tensor for tensor in model.state_dict(keep_vars=True).values()}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _without_data(model: nn.Module) -> contextlib.AbstractContextManager[Any]:
    """On the meta device, fake tensors: models know these and do not look at values."""
    if next(model.parameters()).is_meta:
        return FakeTensorMode(allow_non_fake_inputs=True)
    return contextlib.nullcontext()


def _unit_macs(model: nn.Module, pair: Pair, shapes: Mapping[str, list[torch.Size]]) -> int:
    """MACs of one unit, from the shapes of what went into the layers."""
    first = pair.left[0].module
    if first not in shapes:
        return 0
    # A fused module that gets query, key and value apart is looked up by what a side is.
    argument = {"qk": (0, 1), "vo": (2, 0), "mlp": (0, 0)}[pair.kind]
    sides = [(side, argument[0]) for side in pair.left] + [(pair.right, argument[1])]
    macs, rows, tokens = 0, [], []
    for side, index in sides:
        # Such a module does not call its output layer, which has a row for every query.
        given = shapes.get(side.module, shapes[first])
        shape = given[index] if index < len(given) else given[0]
        linear = linear_map(model, side.module)
        outside = linear.in_features if side.axis == 0 else linear.out_features
        macs += side.repeat * pair.channels * outside * shape[:-1].numel()
        rows.append(shape[:-1].numel())
        tokens.append(shape[-2])
    if pair.kind != "mlp":
        # Logits and weighted sums: one multiplication for each query, key and query head.
        queries, keys = (rows[0], tokens[1]) if pair.kind == "qk" else (rows[1], tokens[0])
        macs += max(side.repeat for side in pair.sides) * pair.channels * queries * keys
    return macs
