"""The default search: binary masks under a growing pull, at their equilibrium (docs/method.md)."""

import torch
from torch import Tensor

from solpath.config import SearchConfig
from solpath.running.checkpoint import State
from solpath.searching.dynamics import Equilibrium, equilibrium_step, read_order
from solpath.searching.engine import Engine
from solpath.searching.redundancy import Inputs

_LOOK_EVERY = 20  # steps between looks at what the kept units can predict


class EquilibriumSearch:
    """What the default search starts from, does in a step, and reads its order from.

    Attributes:
        name: what its paths call it.
    """

    name = "spp"

    def __init__(self, config: SearchConfig) -> None:
        self._config = config
        self._inputs: Inputs | None = None
        self._looked, self._unexplained = -1, torch.zeros(0)

    def basis(self, engine: Engine) -> dict[str, Tensor]:
        """The axes to search along; empty for the channels as they are."""
        if self._config.basis == "coordinate":
            return {}
        return engine.measure_basis(self._config.scale_batches)

    def start(self, engine: Engine) -> State:
        """The state before the first step."""
        scale, slope = engine.curvature(self._config.scale_batches)
        return {
            "scale": scale,
            "mask": torch.ones_like(scale),
            "marginal": scale / 2 - slope,
            "noise": torch.zeros_like(scale),
            "masks": torch.zeros(0, engine.units, dtype=torch.float16),
        }

    def step(self, engine: Engine, state: State, k: int) -> tuple[State, float, float]:
        """The state after step `k`, its loss, and the share of the cost that it aims at."""
        config = self._config
        loss, rows, gradient = engine.gradients(k, state["mask"], binary=config.binary)
        marginals = state["scale"] * (rows - 0.5) - gradient
        mean, variance = engine.mean(marginals, engine.batch_size(k))
        keep = 1 - (1 - config.final_size) * (k + 1) / config.steps if config.growing_pull else 0.5
        after = equilibrium_step(
            Equilibrium(state["marginal"], state["noise"] if k else variance, state["mask"]),
            mean,
            variance,
            scale=state["scale"],
            cost=engine.cost,
            pair=engine.pair,
            keep=keep,
            momentum=config.momentum,
            relaxation=config.relaxation,
            sharpness=config.sharpness,
            shrinkage=config.shrinkage,
            unexplained=self._look(engine, state["masks"]) if config.compensated else None,
        )
        masks = torch.cat([state["masks"], after.mask.half().unsqueeze(0)])
        return state | after._asdict() | {"masks": masks}, loss, keep

    def entry_times(self, engine: Engine, state: State) -> Tensor:
        """For every unit, the share of the cost that is kept once it has entered. ``[units]``."""
        return read_order(
            state["masks"].float(),
            state["history"][1].tolist(),
            engine.cost,
            [(pair.heads, pair.width) for pair in engine.pairs],
            round(self._config.memory * self._config.steps),
        )

    def _look(self, engine: Engine, masks: Tensor) -> Tensor:
        """The unexplained variance at the masks of a few steps ago; a function of these alone.

        Args:
            masks: after every step so far, ``[steps, units]``.
        """
        if self._inputs is None:  # after a resume they are measured again
            self._inputs = engine.measure_inputs(self._config.scale_batches)
        step = len(masks) // _LOOK_EVERY * _LOOK_EVERY
        if step != self._looked:
            mask = masks[step - 1] if step else torch.ones(engine.units)
            self._unexplained = engine.unexplained_variance(self._inputs, mask)
            self._looked = step
        return self._unexplained
