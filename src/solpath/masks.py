"""Masks on the inner dimensions of a model, put there by hooks and gone after the block."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from solpath.errors import BatchError
from solpath.pair import Pair
from solpath.plan import Plan


@contextlib.contextmanager
def mask_hooks(model: nn.Module, pairs: Sequence[Pair]) -> Iterator[dict[str, Tensor]]:
    """Hook every pair; yield a dict from pair name to mask that the forward passes obey.

    A mask is ``[units]``, or ``[batch, units]`` for one mask per sample; a pair without an entry
    is left alone. The mask multiplies the inner activation: the output of the query projection,
    or the input of the right-hand layer. Hooks are removed when the block ends.
    """
    masks: dict[str, Tensor] = {}
    handles = []
    try:
        for pair in pairs:
            side = pair.mask_side
            module = model.get_submodule(side.module)
            channels = pair.unit_of_channel(side).to(next(module.parameters()).device)
            gather = channels if side.repeat * pair.channels > 1 else None
            if side.axis == 0:
                handles.append(module.register_forward_hook(_on_output(masks, pair.name, gather)))
            else:
                handles.append(
                    module.register_forward_pre_hook(_on_input(masks, pair.name, gather))
                )
        yield masks
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def masked(model: nn.Module, plan: Plan) -> Iterator[nn.Module]:
    """Run `model` as if it had been cut to `plan`, without cutting it.

    Example:
        >>> with solpath.masked(model, path.plan(sparsity=0.5)):  # doctest: +SKIP
        ...     outputs = model(**batch)
    """
    device = next(model.parameters()).device
    with mask_hooks(model, plan.pairs) as masks:
        masks.update({name: mask.to(device) for name, mask in plan.masks().items()})
        yield model


def _apply(inner: Tensor, mask: Tensor | None, gather: Tensor | None, name: str) -> Tensor:
    """Multiply ``[batch, ..., channels]`` by a mask over units."""
    if mask is None:
        return inner
    mask = mask.to(inner.dtype)
    if gather is not None:
        mask = mask.index_select(-1, gather)
    if mask.dim() == 2:
        if inner.shape[0] != mask.shape[0]:
            raise BatchError(
                f"{name}: the inner activation has {inner.shape[0]} rows for "
                f"{mask.shape[0]} samples; its first dimension must be the batch."
            )
        mask = mask.view(mask.shape[0], *[1] * (inner.dim() - 2), -1)
    return inner * mask


def _on_output(masks: dict[str, Tensor], name: str, gather: Tensor | None) -> Any:
    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return _apply(output, masks.get(name), gather, name)

    return hook


def _on_input(masks: dict[str, Tensor], name: str, gather: Tensor | None) -> Any:
    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (_apply(args[0], masks.get(name), gather, name), *args[1:])

    return hook
