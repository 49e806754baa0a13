"""Mask the units of a model by hooks that are removed when a block ends."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from solpath.errors import BatchError, FingerprintError, UnsupportedModelError
from solpath.model.basis import rotated
from solpath.model.discovery import find_pairs
from solpath.model.fingerprint import check_pairs
from solpath.model.linear import layer_at
from solpath.nn.experts import OnNeurons
from solpath.pair import Norm, Pair
from solpath.planning.plan import Plan, check_plan, norm_gain, plan_of
from solpath.running.claims import claimed
from solpath.running.forward import Batch, activation_mask, device_of
from solpath.running.hooks import Hook, hooked
from solpath.wrapping import unwrapped


@dataclass
class Masks:
    """The masks that hooked pairs obey; change them between forward passes.

    Attributes:
        units: Pair name to a mask ``[units]``, or ``[batch, units]`` for one mask per sample. A
            pair without an entry is not masked.
        energy: Pair name to sums of squares of queries and keys, see `SolutionPath.energy`. They
            give the gain of a pair with norms under any mask.
        gains: Pair name to a fixed gain, see `Plan.gains`. It takes precedence over `energy`.
    """

    units: dict[str, Tensor] = field(default_factory=dict)
    energy: dict[str, Tensor] = field(default_factory=dict)
    gains: dict[str, Tensor] = field(default_factory=dict)


@contextlib.contextmanager
def mask_hooks(model: nn.Module, pairs: Sequence[Pair]) -> Iterator[Masks]:
    """Hook every pair, so that forward passes inside the block obey masks.

    A mask multiplies the inner activation: the output of the query projection (or of the norms over
    the heads), or the input of the right-hand layer. What a token gives in an expert is multiplied
    by the mask of its sample.

    Args:
        model: The dense model. Its hooks are removed when the block ends.
        pairs: The pairs to mask.

    Yields:
        The masks, without an entry at first.
    """
    masks = Masks()

    def masking() -> Iterator[Hook]:
        for pair in pairs:
            side = pair.mask_side
            module = layer_at(model, side.module)
            if pair.norms:
                for norm, query in zip(pair.norms, (True, False), strict=True):
                    function = _on_norm(masks, pair, norm, query)
                    yield Hook(model.get_submodule(norm.module), "after", function)
            elif isinstance(module, nn.MultiheadAttention):
                yield Hook(module, "query", _on_query(masks, pair))
            elif pair.kind == "experts":
                yield Hook(module, "neurons", _on_neurons(masks, pair))
            elif side.axis == 0:
                yield Hook(module, "after", _on_output(masks, pair))
            else:
                yield Hook(module, "before", _on_input(masks, pair))

    with hooked(masking()):
        yield masks


@contextlib.contextmanager
def masked(model: nn.Module, plan: Plan) -> Iterator[nn.Module]:
    """Run `model` inside the block as if it had been cut to `plan`, without cutting it.

    Args:
        model: The dense model that the plan was made for. Only its class is checked, not its
            weights. It gets its own parameters back, and loses the hooks, when the block ends.
            Until then it can be run and evaluated, but not searched, masked, cut or measured.
        plan: From `SolutionPath.plan`.

    Yields:
        `model` itself.

    Raises:
        FingerprintError: The plan is for a model of another class or with other pairs, or it was
            read from a saved model and lacks the basis of a pair that it cuts.
        UnsupportedModelError: The model was extracted.
        ConfigError: `plan` is no plan.
        ModelInUseError: The model is masked or searched already, or another thread works on it.

    Example:
        >>> with solpath.masked(model, path.plan(sparsity=0.5)):
        ...     outputs = model(**batch)
        >>> torch.allclose(outputs.logits, small(**batch).logits, atol=1e-5)
        True
    """
    check_plan(plan)
    given, model = model, unwrapped(model, hooks=True)
    if plan_of(model) is not None:
        raise UnsupportedModelError(
            f"this {type(model).__name__} was already extracted; mask the dense model."
        )
    if type(model).__name__ != plan.fingerprint.architecture:
        raise FingerprintError(
            f"the plan is for another model: the class is {type(model).__name__}, "
            f"not {plan.fingerprint.architecture}."
        )
    with claimed(model, doing="masked", admits="runs"):
        check_pairs(plan.pairs, find_pairs(model))
        device = device_of(model)
        with rotated(model, plan.pairs, plan.rotations()), mask_hooks(model, plan.pairs) as masks:
            masks.units.update({name: mask.to(device) for name, mask in plan.masks().items()})
            masks.gains.update({name: gain.to(device) for name, gain in plan.gains.items()})
            yield given


def _on_output(masks: Masks, pair: Pair) -> Any:
    on_query = _on_query(masks, pair)

    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return on_query(output)

    return hook


def _on_query(masks: Masks, pair: Pair) -> Callable[[Tensor], Tensor]:
    expand = _expansion(pair)

    def hook(query: Tensor) -> Tensor:
        mask = masks.units.get(pair.name)
        return query if mask is None else query * _rows(expand(mask, query), query, pair)

    return hook


def _on_input(masks: Masks, pair: Pair) -> Any:
    expand = _expansion(pair)

    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        mask = masks.units.get(pair.name)
        if mask is None:
            return args
        return (args[0] * _rows(expand(mask, args[0]), args[0], pair), *args[1:])

    return hook


def _on_neurons(masks: Masks, pair: Pair) -> OnNeurons:
    def hook(neurons: Tensor, expert: int, token: Tensor, tokens: int) -> Tensor:
        mask = masks.units.get(pair.name)
        if mask is None:
            return neurons
        mask = mask.to(neurons).view(*mask.shape[:-1], pair.heads, pair.width)[..., expert, :]
        if mask.dim() == 2:  # tokens of one sample lie next to each other
            mask = mask[token // _rows_per_sample(tokens, len(mask), pair)]
        return neurons * mask

    return hook


def _on_norm(masks: Masks, pair: Pair, norm: Norm, query: bool) -> Any:
    """Return a hook that lets a norm over the heads see the kept channels alone.

    The gain multiplies the query and makes up for the channels that both norms no longer see
    (docs/method.md, "Norms over the heads").
    """

    def by_head(value: Tensor, channels: int) -> Tensor:
        """Lay ``[..., heads, n]`` out like the input of the norm, its ``n`` repeated."""
        value = value.repeat((*[1] * (value.dim() - 1), channels))
        return value.unsqueeze(-3 if norm.heads_dim == -2 else -2)

    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        mask = masks.units.get(pair.name)
        if mask is None:
            return output
        wide = torch.promote_types(output.dtype, torch.float32)  # sums of squares overflow float16
        mask = mask.to(output.device, wide).view(*mask.shape[:-1], pair.heads, pair.width)
        gain = masks.gains.get(pair.name)
        if gain is None:
            gain = norm_gain(mask, masks.energy[pair.name].to(mask.device))
        mask = mask.to(output.dtype)
        if query:
            mask = mask.repeat_interleave(pair.left[0].repeat, -2)
        kept = by_head(mask, pair.channels)
        if mask.requires_grad:
            # Masks of 0 and 1 give what the other branch gives. The energy is linear in the mask,
            # so that the gradient of a unit at 0 does not vanish.
            square = args[0].square()
            small = 1e-6 * square.mean(-1, keepdim=True)
            ratio = (square.mean(-1, keepdim=True) + small).sqrt()
            ratio = ratio / ((square * kept).mean(-1, keepdim=True) + small).sqrt()
            output = output * ratio * kept if query else output * ratio
        else:
            output = module.forward(args[0] * kept)
        if not query:
            return output
        return output * by_head(gain.to(output).flatten(-2).unsqueeze(-1), 1)

    return hook


@contextlib.contextmanager
def energy_hooks(
    model: nn.Module, pairs: Sequence[Pair], batch: Batch
) -> Iterator[Mapping[str, Tensor]]:
    """Add up the squares that the norms of `pairs` see while `model` runs inside the block.

    Args:
        model: The dense model. Its hooks are removed when the block ends.
        pairs: Pairs with norms over the heads.
        batch: The batch that `model` will run on. Its padding does not count.

    Yields:
        Pair name to float64 ``[heads, query heads per head + 1, width]`` on the CPU: the sums of
        squares of the queries, then of the key.
    """
    totals = {p.name: torch.zeros(p.heads, p.left[0].repeat + 1, p.width).double() for p in pairs}

    def watched() -> Iterator[Hook]:
        for pair in pairs:
            repeat = pair.left[0].repeat
            for norm, slot in zip(pair.norms, (slice(repeat), slice(repeat, None)), strict=True):
                function = _on_energy(totals[pair.name][:, slot], pair, norm, batch)
                yield Hook(model.get_submodule(norm.module), "before", function)

    with hooked(watched()):
        yield totals


@contextlib.contextmanager
def run_hooks(
    model: nn.Module, pairs: Sequence[Pair], batch: Batch
) -> Iterator[Mapping[str, Tensor]]:
    """Count how often the masked layer of every head runs in the block.

    An expert runs once for every token that it gets, padding included.

    Args:
        model: The model.
        pairs: The pairs to count.
        batch: The batch that the model runs on.

    Yields:
        Pair name to float64 ``[heads]``.
    """
    counts = {pair.name: torch.zeros(pair.heads, dtype=torch.float64) for pair in pairs}

    def counting() -> Iterator[Hook]:
        for pair in pairs:
            path = pair.norms[0].module if pair.norms else pair.mask_side.module
            yield Hook(layer_at(model, path), "before", _on_run(counts[pair.name], pair))

    with hooked(counting()):
        yield counts


def _on_run(total: Tensor, pair: Pair) -> Any:
    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if pair.kind == "experts":
            total.add_(args[1].flatten().bincount(minlength=pair.heads).cpu())
        else:
            total.add_(1)

    return hook


def _on_energy(total: Tensor, pair: Pair, norm: Norm, batch: Batch) -> Any:
    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        # [batch, tokens, heads, head_dim], whatever the model's order is
        square = args[0].double().square().movedim(norm.heads_dim, 2)
        keep = activation_mask(batch, square, norm.module)
        square = square if keep is None else square * keep[:, :, None, None]
        by_unit = square.sum((0, 1)).view(-1, pair.channels, pair.width).sum(1)
        total.add_(by_unit.view(total.shape).cpu())

    return hook


def _expansion(pair: Pair) -> Callable[[Tensor, Tensor], Tensor]:
    """Return what turns a mask of units into one of all channels of the layer that is masked.

    A mask ``[..., units]`` becomes ``[..., channels]``; channels of other pairs get 1.
    """
    side = pair.mask_side
    position = pair.channels_of(side)
    unit = torch.full((int(position.max()) + 1,), pair.units)  # of other pairs' channels
    unit[position] = pair.unit_of_channel(side)
    whole, gaps = torch.equal(unit, torch.arange(pair.units)), len(position) < len(unit)
    unit_on = cache(unit.to)

    def expand(mask: Tensor, inner: Tensor) -> Tensor:
        mask = mask.to(inner)
        if not whole:
            mask = nn.functional.pad(mask, (0, 1), value=1.0) if gaps else mask
            index = unit_on(mask.device)
            # On CUDA the gradient of `index_select` is added up in any order, that of `[]` in one.
            mask = mask[..., index] if mask.is_cuda else mask.index_select(-1, index)
        after = inner.shape[-1] - mask.shape[-1]
        return nn.functional.pad(mask, (0, after), value=1.0) if after else mask

    return expand


def _rows(mask: Tensor, inner: Tensor, pair: Pair) -> Tensor:
    """Line a mask per sample up with the rows of an activation ``[batch, ..., channels]``.

    Windows of one sample lie next to each other in ``[batch * windows, ..., channels]``. Raise
    `BatchError` if the rows do not divide evenly among the samples.
    """
    if mask.dim() == 1:
        return mask
    rows = inner.shape[0]
    each = _rows_per_sample(rows, len(mask), pair)
    if each > 1:
        mask = mask.repeat_interleave(each, 0)
    return mask.view(rows, *[1] * (inner.dim() - 2), -1)


def _rows_per_sample(rows: int, samples: int, pair: Pair) -> int:
    if rows % samples:
        raise BatchError(
            f"{pair.name}: the inner activation has {rows} rows for {samples} samples; "
            "its first dimension must be the batch."
        )
    return rows // samples
