"""What a search of a model would need on machines of any size, from its configuration alone."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from solpath.data.feeding import takes
from solpath.errors import UnsupportedModelError
from solpath.model.masks import mask_hooks
from solpath.objective import Objective
from solpath.pair import Pair
from solpath.running.memory import SHARE, LiveStorages
from solpath.running.modes import differentiating, entered
from solpath.running.recompute import blocks_of, recomputing
from solpath.searching.estimate import size
from solpath.searching.probe import LARGE


class Forecast(NamedTuple):
    """Bytes that a search would need.

    Attributes:
        weights: Of the weights.
        passes: Alive in a pass of one and of two samples, beyond the weights.
        recomputed: The same, where activations are computed again block by block.
        kept: Of the masks that are kept from step to step.
        samples: Samples in a batch.
    """

    weights: int
    passes: tuple[int, int]
    recomputed: tuple[int, int]
    kept: int
    samples: int

    def on(self, free: int, *, disk: bool) -> tuple[int | None, str]:
        """Return the memory that a search takes in so many free bytes, and what it does for it.

        Args:
            free: The bytes that are free before the weights are loaded.
            disk: Whether weights may stay on disk, as they may for the CPU.

        Returns:
            The bytes, weights included, or None if they are too few; and what the search does by
            itself, or what to give it.
        """
        done = "as it is"
        held = self.weights
        if held > SHARE * free:
            if not disk:
                return None, f"the weights, {size(held)}, do not fit; try --device cpu"
            done, held = "weights stay on disk", 0
        left = SHARE * (free - held - self.kept)
        whole = _samples(self.passes, self.samples)
        if held and (whole <= left or held <= LARGE):
            return held + self.kept + whole, done
        done = "recompute" if held else f"{done}, recompute"
        for samples in range(self.samples, 0, -1):
            step = _samples(self.recomputed, samples)
            if step <= left:
                part = "" if samples == self.samples else f", --micro-batch {samples}"
                return held + self.kept + step, done + part
        return None, f"one sample needs {size(_samples(self.recomputed, 1))} beyond the weights"


def _samples(passes: tuple[int, int], samples: int) -> int:
    """Return the bytes of a pass of some samples, which grow in a straight line."""
    return passes[0] + (samples - 1) * (passes[1] - passes[0])


def forecast(
    model: nn.Module, pairs: Sequence[Pair], *, tokens: int, samples: int, steps: int = 200
) -> Forecast:
    """Return what a search would need, from passes that compute shapes and no values.

    Args:
        model: The dense model on the meta device. It is left as it was found.
        pairs: Its pairs.
        tokens: Tokens of a text.
        samples: Samples in a batch.
        steps: Steps of the search.

    Raises:
        UnsupportedModelError: The shapes of the model depend on values, as with experts, or it
            takes other inputs than text and images.
    """
    blocks = blocks_of(model, [pair.right.module for pair in pairs])
    try:
        passes = _pass(model, pairs, tokens, 1), _pass(model, pairs, tokens, 2)
        with recomputing(model, blocks):
            recomputed = _pass(model, pairs, tokens, 1), _pass(model, pairs, tokens, 2)
    except Exception as error:  # whatever a kernel without shapes, or a missing input, raises
        raise UnsupportedModelError(
            f"no forecast for {type(model).__name__}: its shapes depend on values, or it takes "
            "other inputs than texts and images; search says what it needs before it starts."
        ) from error
    units = sum(pair.units for pair in pairs)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    kept = units * (4 * steps + 8 * (8 * samples + 16))
    return Forecast(weights, passes, recomputed, kept, samples)


def _pass(model: nn.Module, pairs: Sequence[Pair], tokens: int, samples: int) -> int:
    """Return the most bytes alive in one forward and backward pass."""
    batch = _batch(model, tokens, samples)
    compared = Objective(model, lambda: batch)
    compared.learn(batch)  # once in a search, and not in every pass
    live = LiveStorages()
    with differentiating(model), mask_hooks(model, pairs) as masks, entered(live):
        for pair in pairs:
            if pair.norms:
                shape = pair.heads, pair.left[0].repeat + 1, pair.width
                masks.energy[pair.name] = torch.ones(shape, device="meta")
        target = compared.target(batch)
        leaves = {
            pair.name: torch.ones(samples, pair.units, device="meta", requires_grad=True)
            for pair in pairs
        }
        masks.units.update(leaves)
        errors = compared.divergence(target, compared.run(model, batch), batch)
        torch.autograd.grad(
            errors.sum(), list(leaves.values()), allow_unused=True, materialize_grads=True
        )
    return live.peak


def _batch(model: Any, tokens: int, samples: int) -> dict[str, torch.Tensor]:
    """Return a batch without values of what a model takes."""
    kinds = takes(model)
    batch = {}
    if "image" in kinds:
        config = getattr(model.config, "vision_config", model.config)
        edge = config.image_size
        height, width = (edge, edge) if isinstance(edge, int) else edge
        shape = samples, config.num_channels, height, width
        batch["pixel_values"] = torch.empty(shape, dtype=model.dtype, device="meta")
    if "text" in kinds:
        batch["input_ids"] = torch.empty(samples, tokens, dtype=torch.int64, device="meta")
        if model.can_generate():  # a whole mask, so that none is derived from values
            whole = torch.empty(samples, 1, tokens, tokens, dtype=torch.bool, device="meta")
            batch["attention_mask"] = whole
    return batch
