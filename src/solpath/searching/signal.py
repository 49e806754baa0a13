"""No signal is not a signal: pairs that no batch reaches must not look worthless."""

import torch
from torch import Tensor

from solpath.errors import BatchError
from solpath.pair import unflatten
from solpath.searching.engine import Engine

_ROUNDING = 1e-12  # of a mean square, against the largest of all units


def keep_reached(engine: Engine, *values: Tensor) -> tuple[Tensor, ...]:
    """Let `engine` forget the pairs without a signal, and return the values of the rest.

    A tower that gets no input, an attention over a single token or a layer that no token is sent
    to changes nothing on these batches. That says nothing about what it is worth, so it stays
    whole. A pair has a signal if the first value of a unit is above rounding. Experts of one layer
    lose equally many units, so all of them stay whole if one of them has none.

    Args:
        engine: The engine that measured the values.
        values: float64 ``[units]`` each; first the mean squared derivatives of the dense model.

    Returns:
        The values of the units of the pairs that are left.

    Raises:
        BatchError: No pair is left.
    """
    touched = unflatten(engine.pairs, values[0] > _ROUNDING * values[0].max())
    heads = {name: units.any(1) for name, units in touched.items()}
    reached = [
        heads[p.name].all() if p.kind == "experts" else heads[p.name].any() for p in engine.pairs
    ]
    return keep_pairs(engine, torch.stack(reached), *values)


def keep_pairs(engine: Engine, reached: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
    """Let `engine` forget the pairs that are not reached, and return `values` of the rest.

    Args:
        engine: The engine.
        reached: bool ``[pairs]``.
        values: Of every unit before, ``[units]`` each.

    Raises:
        BatchError: No pair is left.
    """
    if not reached.any():
        raise BatchError(
            "masking any unit changes nothing that is compared on these batches, so they give no "
            "order; pass inputs that reach the layers, of more than one token, or your own loss."
        )
    units = reached[engine.pair]
    if not reached.all():
        engine.restrict([p for p, kept in zip(engine.pairs, reached.tolist(), strict=True) if kept])
    return tuple(value[units] for value in values)
