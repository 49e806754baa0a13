"""Count what a dense model and each of its units cost under every measure."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from solpath.errors import ConfigError
from solpath.model.discovery import find_blocks
from solpath.model.linear import layer_at, linear_map
from solpath.model.placed import distinct_parameters, tied_names
from solpath.nn.experts import counted_forward, is_experts
from solpath.nn.slim import become_, slim_class
from solpath.pair import Pair, Side
from solpath.planning.cost import CostTable
from solpath.running.forward import Batch, device_of, run
from solpath.running.hooks import Hook, hooked
from solpath.running.memory import parts_of
from solpath.running.modes import differentiating, entered, undoing

_KERNELS = [kernel for name, kernel in SDPBackend.__members__.items() if name != "ERROR"]
_FUSED = [op for op in flop_registry if "scaled_dot_product" in str(op)]


@dataclass(frozen=True)
class Seen:
    """One forward pass of a dense model on one sample, for the measures to count from.

    Attributes:
        model: The dense model. It may be on the meta device.
        pairs: The pairs of the model.
        macs: The multiply-accumulates of the pass.
        shapes: Dotted path of every layer of a pair that ran, to the shapes of its inputs, one
            sequence for each time that it ran.
    """

    model: nn.Module
    pairs: Sequence[Pair]
    macs: int
    shapes: Mapping[str, Sequence[Sequence[torch.Size]]]


Measure = Callable[[Seen], tuple[int, Mapping[str, int]]]
"""A function that returns the cost of the dense model, and pair name to the cost of one unit.

The costs of units must add up: a model without some units must cost less by exactly their sum.
"""


def _params(seen: Seen) -> tuple[int, Mapping[str, int]]:
    """Count parameters, a tied one once."""
    whole = sum(parameter.numel() for _, parameter in distinct_parameters(seen.model))
    return whole, {pair.name: pair.cost for pair in seen.pairs}


def _bytes(seen: Seen) -> tuple[int, Mapping[str, int]]:
    """Count the bytes of all parameters and saved buffers in their own dtype, a tied one once."""
    whole = sum(tensor.nbytes for tensor in saved_tensors(seen.model).values())
    return whole, {p.name: p.cost * _element_size(seen.model, p) for p in seen.pairs}


def _macs(seen: Seen) -> tuple[int, Mapping[str, int]]:
    """Count the multiply-accumulates of the sample."""
    return seen.macs, {pair.name: _unit_macs(seen, pair) for pair in seen.pairs}


def _cache(seen: Seen) -> tuple[int, Mapping[str, int]]:
    """Count the bytes of the key-value cache per generated token, in the dtype of its layers."""
    unit = {p.name: p.cache * _element_size(seen.model, p) for p in seen.pairs}
    blocks = find_blocks(seen.model, checked=True) if seen.pairs else ()
    sites = [site for block in blocks for site in block.sites]
    whole = sum(site.keys * _element_size(seen.model, site.vo) for site in sites)
    return whole + sum(pair.units * unit[pair.name] for pair in seen.pairs), unit


MEASURES: dict[str, Measure] = {
    "params": _params,
    "bytes": _bytes,
    "macs": _macs,
    "cache": _cache,
}
"""Every measure that a budget can be counted in, by name.

A measure that you add here is known to every path that is searched afterwards, and
``path.plan(Budget(name, value))`` cuts to it.
"""


def count_costs(model: nn.Module, pairs: Sequence[Pair], sample: Batch) -> CostTable:
    """Count what a dense model and its units cost on one sample, under every measure in `MEASURES`.

    A unit costs its rows and columns of the linear layers once per token. A ``qk`` or ``vo`` unit
    also costs one multiply-accumulate for each query, key and query head. A unit of experts costs
    its share of what a token runs through, which is the same for all experts of a layer and rounded
    down to a whole number. Units of layers that did
    not run on the sample (those of another tower, for example) cost no MACs. Bytes are counted in
    the dtype that the tensors have, and the key-value cache in that of the layers it belongs to.

    Args:
        model: The dense model. It runs once, without gradients. It may be on the meta device if the
            sample is there too.
        pairs: The pairs of the model.
        sample: A batch of one sample.

    Returns:
        The cost table of the model.

    Raises:
        ConfigError: A measure does not return one whole number for the model and for every pair.

    Example:
        >>> sample = {"input_ids": batch["input_ids"][:1]}
        >>> costs = count_costs(model, solpath.find_pairs(model), sample)
        >>> {name: costs.dense[name] for name in MEASURES}
        {'params': 37922, 'bytes': 151688, 'macs': 296000, 'cache': 0}
    """
    shapes: dict[str, list[list[torch.Size]]] = {}

    def note(path: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            given = [arg.shape for arg in args if isinstance(arg, Tensor)]
            shapes.setdefault(path, []).append(given)

        return hook

    def watched() -> Iterator[Hook]:
        for path in {side.module for pair in pairs for side in pair.sides}:
            yield Hook(layer_at(model, path), "after", note(path))

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
    """Count the multiply-accumulates of matrix products and convolutions in one forward pass.

    Attention is counted as its two products over all queries and keys, whichever kernel runs it;
    experts as one product for every token and each of its experts.

    Args:
        model: Any model. It runs once, without gradients.
        batch: The batch to run. All of its samples count.

    Returns:
        Half the floating-point operations of the pass.
    """
    # What is known of fused kernels fails on grouped heads, and is counted by shapes anyway.
    counter = FlopCounterMode(display=False, custom_mapping=dict.fromkeys(_FUSED, _nothing))
    # The counter fails on a slice of a whole parameter (DeBERTa's positions) unless that is frozen.
    shapes = _ShapeCounter(counter)
    plain = torch.no_grad(), sdpa_kernel(SDPBackend.MATH), _counted_experts(model)
    with differentiating(model), entered(*plain, counter, shapes):
        run(model, batch, labels=False)
    return int(counter.get_total_flops()) // 2 + shapes.missed


def _nothing(*args: Any, **kwargs: Any) -> int:
    return 0


class _ShapeCounter(TorchFunctionMode):
    """Counts attention and linear layers by their shapes, while any kernel runs them.

    The counter knows no formula for some fused kernels, and others pad their inputs. The plain
    kernel, which it can count, takes memory for every query, key and head. It still runs the
    attention inside `nn.MultiheadAttention`, which cannot be seen from here. Nor does it know
    products of whole numbers, in which layers run whose weights and inputs torchao quantises.

    Args:
        counter: Counts everything else.

    Attributes:
        missed: Multiply-accumulates of these that the counter has not seen.
    """

    def __init__(self, counter: FlopCounterMode) -> None:
        super().__init__()
        self._counter = counter
        self.missed = 0

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run one function, and count it if it is attention or a linear layer."""
        kwargs = kwargs or {}
        if func is functional.linear:
            before = self._counter.get_total_flops()
            output = func(*args, **kwargs)
            seen = int(self._counter.get_total_flops() - before) // 2
            weight = args[1] if len(args) > 1 else kwargs["weight"]
            self.missed += output.numel() * weight.shape[-1] - seen
            return output
        if func is not functional.scaled_dot_product_attention:
            return func(*args, **kwargs)
        before = self._counter.get_total_flops()
        with sdpa_kernel(_KERNELS):
            output = func(*args, **kwargs)
        seen = int(self._counter.get_total_flops() - before) // 2
        named = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
        query, key, value = (named[name] for name in ("query", "key", "value"))
        met = output.shape[:-1].numel() * key.shape[-2]
        self.missed += met * (query.shape[-1] + value.shape[-1]) - seen
        return output


@contextlib.contextmanager
def _counted_experts(model: nn.Module) -> Iterator[None]:
    """Let all experts of a model run in a way that can be counted until the block ends."""
    stock = [(module, type(module)) for module in model.modules() if is_experts(module)]

    def restore() -> None:
        for module, kind in stock:
            become_(module, kind)

    with undoing(restore):
        for module, kind in stock:
            become_(module, slim_class(kind, counted_forward))  # type: ignore[arg-type]
        yield


def saved_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters and saved buffers of a model, each once, under its first name.

    Of those that torchao has quantised, the parts are returned; see `parts_of`.
    """
    distinct: dict[object, tuple[str, Tensor]] = {}
    tied = tied_names(model)
    for name, whole in model.state_dict(keep_vars=True).items():
        for part, tensor in parts_of(whole).items():
            key: object = tied.get(name, name) + part if tied else id(tensor)
            if not tied and tensor.numel() and not tensor.is_meta:  # one view of memory is one
                key = tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.shape
            distinct.setdefault(key, (name + part, tensor))
    return dict(distinct.values())


def _element_size(model: nn.Module, pair: Pair) -> int:
    return linear_map(model, pair.left[0].module).weight.element_size()


def _without_data(model: nn.Module) -> contextlib.AbstractContextManager[Any]:
    """Return a block of fake tensors for a model on the meta device, or one that does nothing.

    Models recognise fake tensors and do not look at their values.
    """
    if device_of(model).type == "meta":
        return entered(FakeTensorMode(allow_non_fake_inputs=True))
    return contextlib.nullcontext()


def _unit_macs(seen: Seen, pair: Pair) -> int:
    """Return the MACs of one unit of `pair`, from the shapes that went into its layers."""
    first = pair.left[0].module
    if first not in seen.shapes:
        return 0
    # nn.MultiheadAttention takes query, key and value as three inputs; every side reads its own.
    if pair.kind == "experts":  # their inputs are the tokens, and the experts of every token
        runs = sum(experts.numel() for _, experts, *_ in seen.shapes[first])
        return runs * sum(_outside(seen.model, side) for side in pair.sides) // pair.heads
    argument = {"qk": (0, 1), "vo": (2, 0), "mlp": (0, 0)}[pair.kind]
    sides = [(side, argument[0]) for side in pair.left] + [(pair.right, argument[1])]
    macs, rows, tokens = 0, [], []
    for side, index in sides:
        # nn.MultiheadAttention does not call its output layer, which has one row for every query.
        calls = seen.shapes.get(side.module, seen.shapes[first])
        shapes = [given[index] if index < len(given) else given[0] for given in calls]
        rows.append([shape[:-1].numel() for shape in shapes])
        tokens.append([shape[-2] for shape in shapes])
        macs += side.repeat * pair.channels * _outside(seen.model, side) * sum(rows[-1])
    if pair.kind != "mlp":
        # Logits and weighted sums take one multiplication for each query, key and query head.
        queries, keys = (rows[0], tokens[1]) if pair.kind == "qk" else (rows[1], tokens[0])
        met = sum(query * key for query, key in zip(queries, keys, strict=True))
        macs += max(side.repeat for side in pair.sides) * pair.channels * met
    return macs


def _outside(model: nn.Module, side: Side) -> int:
    """Return how many channels a layer has on the side that stays whole."""
    linear = linear_map(model, side.module)
    return linear.in_features if side.axis == 0 else linear.out_features
