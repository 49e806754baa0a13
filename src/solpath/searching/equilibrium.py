"""The default search: binary masks under a growing pull, at their equilibrium (docs/method.md)."""

import torch
from torch import Tensor

from solpath.config import SearchConfig
from solpath.reading import Expected
from solpath.running.checkpoint import State
from solpath.searching.dynamics import Equilibrium, equilibrium_step, read_order
from solpath.searching.engine import Engine
from solpath.searching.redundancy import Inputs
from solpath.searching.signal import keep_reached

_LOOK_EVERY = 20  # steps after which the unexplained variance is computed anew


class EquilibriumSearch:
    """The `Method` of the default search.

    Args:
        config: Settings of the search.

    Attributes:
        name: Name of the method in its paths.
    """

    name = "spp"

    def __init__(self, config: SearchConfig) -> None:
        self._config = config
        self._inputs: Inputs | None = None
        self._looked, self._unexplained = -1, torch.zeros(0)

    def basis(self, engine: Engine) -> dict[str, Tensor]:
        """Return the axes to search along, by pair name; none for the channels as they are.

        Args:
            engine: Measures principal axes, if the settings ask for them.
        """
        if self._config.basis == "coordinate":
            return {}
        return engine.measure_basis(self._config.scale_batches)

    def start(self, engine: Engine) -> State:
        """Return the state before the first step, in which every mask is 1.

        Args:
            engine: Measures the one-shot scale.
        """
        scale, slope = keep_reached(engine, *engine.curvature(self._config.scale_batches))
        return {
            "scale": scale,
            "mask": torch.ones_like(scale),
            "marginal": scale / 2 - slope,
            "noise": torch.zeros_like(scale),
            "masks": torch.zeros(0, engine.units, dtype=torch.float16),
        }

    def expected(self, units: int, steps: int) -> Expected:
        """Return the dtype and shape of every entry of a state by name, to check a file against.

        Args:
            units: Number of units.
            steps: Number of steps that are done.
        """
        each = dict.fromkeys(("scale", "mask", "marginal", "noise"), (torch.float64, (units,)))
        return each | {"masks": (torch.float16, (steps, units))}

    def step(self, engine: Engine, state: State, k: int) -> tuple[State, float, float]:
        """Return the state after step `k`, its loss, and the share of the cost that it aimed at.

        Args:
            engine: Answers for the batch of the step.
            state: State before the step. It is not changed.
            k: Number of the step, from 0.
        """
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

    def looks(self, done: int) -> tuple[int, int]:
        """Return on how many batches moments are measured, and how often they are looked at.

        Args:
            done: Steps that are done.
        """
        steps = self._config.steps
        if not self._config.compensated or done == steps:
            return 0, 0
        last, first = (steps - 1) // _LOOK_EVERY, done // _LOOK_EVERY
        return self._config.scale_batches, last - first + 1

    def entry_times(self, engine: Engine, state: State) -> Tensor:
        """Return for every unit the share of the cost that is kept once it is in, ``[units]``.

        Args:
            engine: Knows the pairs and their costs.
            state: State after the last step.
        """
        return read_order(
            state["masks"],
            state["history"][1].tolist(),
            engine.cost,
            [(pair.heads, pair.width) for pair in engine.pairs],
            round(self._config.memory * self._config.steps),
        )

    def _look(self, engine: Engine, masks: Tensor) -> Tensor:
        """Return the unexplained variance at the masks of at most 20 steps ago.

        It depends only on `masks`, so a resumed search finds the same.

        Args:
            masks: Expected masks after every step so far, ``[steps, units]``.
        """
        if self._inputs is None:  # after a resume they are measured again
            self._inputs = engine.measure_inputs(self._config.scale_batches)
        step = len(masks) // _LOOK_EVERY * _LOOK_EVERY
        if step != self._looked:
            mask = masks[step - 1] if step else torch.ones(engine.units)
            self._unexplained = engine.unexplained_variance(self._inputs, mask)
            self._looked = step
        return self._unexplained
