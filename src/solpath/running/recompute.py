"""Run a model block by block, and compute the activations of a block again when they are needed."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from solpath.running.modes import undoing
from solpath.running.placement import is_placed


def blocks_of(model: nn.Module, modules: Sequence[str]) -> list[str]:
    """Return the dotted paths of the blocks that hold some modules, in the order of these.

    A block is what transformers checkpoints in training; in other models it is the outermost item
    of a list of modules.

    Args:
        model: The model.
        modules: Dotted paths of the modules. Those outside any block are left out.

    Example:
        >>> blocks_of(model, [pair.right.module for pair in solpath.find_pairs(model)])
        ['bert.encoder.layer.0', 'bert.encoder.layer.1']
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    found: dict[str, None] = {}
    for path in modules:
        parts = path.split(".")
        above = [".".join(parts[:i]) for i in range(1, len(parts))]
        own = [p for p in above if isinstance(model.get_submodule(p), GradientCheckpointingLayer)]
        lists = (nn.ModuleList, nn.Sequential)
        items = [p for p in above if isinstance(_parent(model, p), lists)]
        for block in (own or items)[:1]:
            found[block] = None
    return list(found)


@contextmanager
def recomputing(model: nn.Module, blocks: Sequence[str]) -> Iterator[None]:
    """Let a backward pass compute the activations of one block after another again.

    Between the passes only what goes into the blocks is kept. Gradients are the same to the last
    bit, for one more forward pass of the blocks.

    Args:
        model: The model, which draws no random numbers. Its blocks get their own ``forward`` back
            when the block ends.
        blocks: Dotted paths of the blocks, from `blocks_of`.

    Example:
        >>> with recomputing(model, ["bert.encoder.layer.0"]):
        ...     output = model(**batch).logits
    """
    placed = is_placed(model)  # stopped early, accelerate would not empty the last weights again
    found: list[tuple[nn.Module, Any]] = []

    def restore() -> None:
        for block, own in found:
            if own is None:
                block.__dict__.pop("forward", None)
            else:
                block.__dict__["forward"] = own

    with undoing(restore):
        for path in blocks:
            block = model.get_submodule(path)
            found.append((block, block.__dict__.get("forward")))
            block.__dict__["forward"] = _checkpointed(block.forward, whole=placed)
        yield


def _checkpointed(forward: Callable[..., Any], *, whole: bool) -> Callable[..., Any]:
    def checkpointed(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        with set_checkpoint_early_stop(not whole):
            return checkpoint(
                forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs
            )

    return checkpointed


def _parent(model: nn.Module, path: str) -> nn.Module:
    return model.get_submodule(path.rpartition(".")[0])
