"""SliceGPT: the residual stream is cut to its first principal directions.

Ashkboos et al., "SliceGPT: Compress Large Language Models by Deleting Rows and Columns", ICLR 2024,
arXiv 2401.15024. Before each norm the stream is turned to the principal axes of the normed signal
(of the calibration tokens, in the model that is cut up to there), and the last directions are
deleted. Signals are normed as the paper has them, where its repository takes them before the norm.
What is judged here has the dense sizes: at each such place the stream is multiplied by
Q Qᵀ, which is what the sliced model computes.

A model of this size counts as sliced: the matrices of all pairs have ``k`` of ``D`` inputs or
outputs, and every layer adds the two ``k`` x ``k`` matrices that turn the skip connection from one
basis to the next. ``k`` is such that both together are the budget. Embeddings and head, which other
methods do not cut, would be narrower as well; this counts neither for it nor against it.

Where a norm follows the layer, too (Gemma 2 and 3), slicing is not exact: that norm needs the whole
output. Here it gets it, in SliceGPT's favour. For decoders whose blocks norm by RMSNorm.
"""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rivals.moments import Calibration, block_of

TOKENS = 8192
NORMS = ("pre_feedforward_layernorm", "post_attention_layernorm")  # before the MLP


@torch.no_grad()
def prune(model: nn.Module, calibration: Calibration, keep: float) -> nn.Module:
    """The widest stream that the budget allows."""
    pruned = copy.deepcopy(model)
    places = _places(pruned, calibration)
    dense = sum(pair.cost * pair.units for pair in calibration.pairs)
    width = pruned.get_submodule(places[0]).weight.numel()
    rank = stream_rank(width, dense, len(places) - 1, keep)
    pruned.kept_share = 1.0 if rank == width else _size(rank, width, dense, len(places) - 1) / dense
    if rank == width:
        return pruned
    axes: dict[str, Tensor] = {}
    handles = [
        pruned.get_submodule(place).register_forward_pre_hook(_finding(axes, place, rank))
        for place in places
    ]
    pruned.get_decoder()(**_together(calibration), use_cache=False)
    for handle in handles:
        handle.remove()
    for place in places:
        pruned.get_submodule(place).register_forward_pre_hook(_projecting(axes[place]))
    return pruned


def stream_rank(width: int, dense: int, turns: int, keep: float) -> int:
    """The width of the stream whose size is nearest to the budget; all of it at 1."""
    if keep >= 1:
        return width
    sizes = [abs(_size(rank, width, dense, turns) - keep * dense) for rank in range(width)]
    return sizes.index(min(sizes))


def _size(rank: int, width: int, dense: int, turns: int) -> float:
    """Parameters: sliced matrices, and those between two bases."""
    return dense * rank / width + turns * rank**2


def _places(model: nn.Module, calibration: Calibration) -> list[str]:
    """The norms that read the stream, in the order they run."""
    places = []
    for block in dict.fromkeys(block_of(pair) for pair in calibration.pairs):
        children = dict(model.get_submodule(block).named_children())
        middle = next((name for name in NORMS if name in children), None)
        if "input_layernorm" not in children or middle is None:
            raise ValueError(f"{block}: SliceGPT is here for decoders with RMSNorm before layers.")
        places += [f"{block}.input_layernorm", f"{block}.{middle}"]
    return [*places, f"{places[0].rpartition('layers.')[0]}norm"]


def _together(calibration: Calibration) -> Mapping[str, Tensor]:
    """Calibration tokens as one batch; texts without padding."""
    tokens = torch.cat([batch["input_ids"] for batch in calibration.batches])
    return {"input_ids": tokens[: max(1, TOKENS // tokens.shape[1])]}


def _finding(axes: dict[str, Tensor], place: str, rank: int) -> Any:
    """Measure the principal axes of the normed stream, keep the first, and project."""

    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        rows = args[0].flatten(0, -2).double()
        rows = rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-30)
        vectors = torch.linalg.eigh(rows.mT @ rows).eigenvectors
        axes[place] = vectors[:, -rank:].to(args[0].dtype)
        _project_(args[0], axes[place])

    return hook


def _projecting(axes: Tensor) -> Any:
    return lambda module, args: _project_(args[0], axes)


def _project_(stream: Tensor, axes: Tensor) -> None:
    """In place: the skip connection carries the same tensor."""
    stream.copy_(stream @ axes @ axes.mT)
