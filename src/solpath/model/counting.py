"""Count what a model takes under every measure, and each unit's part in it."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from solpath.errors import ConfigError
from solpath.model.hooks import Hook, hooked
from solpath.model.linear import linear_map
from solpath.pair import Pair
from solpath.planning.cost import CostTable
from solpath.running.forward import Batch, device_of, run


@dataclass(frozen=True)
class Seen:
    """One forward pass of a dense model on one sample: what a measure counts from.

    Attributes:
        model: the dense model; it may be on the meta device.
        pairs: what can be pruned in it.
        macs: multiply-accumulates of the pass.
        shapes: dotted path of every layer of a pair that ran, to the shapes of its inputs.
    """

    model: nn.Module
    pairs: Sequence[Pair]
    macs: int
    shapes: Mapping[str, Sequence[torch.Size]]


Measure = Callable[[Seen], tuple[int, Mapping[str, int]]]
"""What the dense model takes, and by pair name what one unit takes. Units must add up: a model
without some units takes as much less as the sum of theirs."""


def _params(seen: Seen) -> tuple[int, Mapping[str, int]]:
    """Parameters."""
    whole = sum(parameter.numel() for parameter in seen.model.parameters())
    return whole, {pair.name: pair.cost for pair in seen.pairs}


def _bytes(seen: Seen) -> tuple[int, Mapping[str, int]]:
    """Bytes of all parameters and saved buffers, a tied one once, in the dtype they have."""
    whole = sum(tensor.nbytes for tensor in saved_tensors(seen.model).values())
    return whole, {p.name: p.cost * _element_size(seen.model, p) for p in seen.pairs}


def _macs(seen: Seen) -> tuple[int, Mapping[str, int]]:
    """Multiply-accumulates of the sample."""
    return seen.macs, {pair.name: _unit_macs(seen, pair) for pair in seen.pairs}


def _cache(seen: Seen) -> tuple[int, Mapping[str, int]]:
    """Bytes of the key-value cache per generated token, in the dtype of its layers."""
    unit = {p.name: p.cache * _element_size(seen.model, p) for p in seen.pairs}
    return sum(pair.units * unit[pair.name] for pair in seen.pairs), unit


MEASURES: dict[str, Measure] = {
    "params": _params,
    "bytes": _bytes,
    "macs": _macs,
    "cache": _cache,
}
"""Every measure that a budget may be counted in, by name. Paths searched from now on know a
measure that is added here, and ``path.plan(Budget(name, value))`` cuts to it."""


def count_costs(model: nn.Module, pairs: Sequence[Pair], sample: Batch) -> CostTable:
    """Cost table of a dense model for one sample, under every measure in `MEASURES`.

    A unit takes part in its rows and columns of the linear layers, once per token, and a ``qk`` or
    ``vo`` unit also in one multiplication per pair of tokens and query head. Units of layers that
    did not run on the sample (the other tower, say) cost no MACs. Bytes are those of the dtype
    that the tensors have; the key-value cache is taken to have that of the key and value layers.

    Args:
        model: runs once, without gradients; may be on the meta device, with the sample.
        pairs: of the model.
        sample: a batch of one sample.

    Raises:
        ConfigError: a measure does not count one whole number for every pair.
    """
    shapes: dict[str, list[torch.Size]] = {}

    def note(path: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            shapes[path] = [arg.shape for arg in args if isinstance(arg, Tensor)]

        return hook

    def watched() -> Iterator[Hook]:
        for path in {side.module for pair in pairs for side in pair.sides}:
            yield Hook(model.get_submodule(path), "after", note(path))

    with hooked(watched()), _without_data(model):
        seen = Seen(model, pairs, count_macs(model, sample), shapes)
    named = sample.items() if isinstance(sample, Mapping) else [("input", sample)]
    dense, unit = {}, {}
    for name, measure in MEASURES.items():
        dense[name], unit[name] = measure(seen)
        counts = [dense[name], *(unit[name].get(pair.name) for pair in pairs)]
        if not all(type(count) is int for count in counts):
            raise ConfigError(f"measure {name!r} must count one whole number for every pair.")
    shapes_of = {key: tuple(value.shape) for key, value in named if isinstance(value, Tensor)}
    return CostTable(dense, unit, shapes_of)


def count_macs(model: nn.Module, batch: Batch) -> int:
    """Multiply-accumulates of one forward pass of the whole batch: matrix products, convolutions.

    Attention is run in its plain form while counting, because the counter knows no formula for
    some fused kernels.
    """
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        run(model, batch, labels=False)
    return int(counter.get_total_flops()) // 2


def saved_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and saved buffers, each once, under the first of its names."""
    distinct: dict[object, tuple[str, Tensor]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        key: object = id(tensor)
        if tensor.numel() and not tensor.is_meta:  # another view of the same memory is the same
            key = tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.shape
        distinct.setdefault(key, (name, tensor))
    return dict(distinct.values())


def _element_size(model: nn.Module, pair: Pair) -> int:
    return linear_map(model, pair.left[0].module).weight.element_size()


def _without_data(model: nn.Module) -> contextlib.AbstractContextManager[Any]:
    """On the meta device, fake tensors: models know these and do not look at values."""
    if device_of(model).type == "meta":
        return FakeTensorMode(allow_non_fake_inputs=True)
    return contextlib.nullcontext()


def _unit_macs(seen: Seen, pair: Pair) -> int:
    """MACs of one unit, from the shapes of what went into the layers."""
    first = pair.left[0].module
    if first not in seen.shapes:
        return 0
    # A fused module that gets query, key and value apart is looked up by what a side is.
    argument = {"qk": (0, 1), "vo": (2, 0), "mlp": (0, 0)}[pair.kind]
    sides = [(side, argument[0]) for side in pair.left] + [(pair.right, argument[1])]
    macs, rows, tokens = 0, [], []
    for side, index in sides:
        # Such a module does not call its output layer, which has a row for every query.
        given = seen.shapes.get(side.module, seen.shapes[first])
        shape = given[index] if index < len(given) else given[0]
        linear = linear_map(seen.model, side.module)
        outside = linear.in_features if side.axis == 0 else linear.out_features
        macs += side.repeat * pair.channels * outside * shape[:-1].numel()
        rows.append(shape[:-1].numel())
        tokens.append(shape[-2])
    if pair.kind != "mlp":
        # Logits and weighted sums: one multiplication for each query, key and query head.
        queries, keys = (rows[0], tokens[1]) if pair.kind == "qk" else (rows[1], tokens[0])
        macs += max(side.repeat for side in pair.sides) * pair.channels * queries * keys
    return macs
