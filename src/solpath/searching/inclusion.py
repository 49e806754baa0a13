"""The search of the SPP paper (arXiv 2501.03289): its differential inclusion, to the letter."""

import torch
from torch import Tensor

from solpath.config import InclusionConfig
from solpath.reading import Expected
from solpath.running.checkpoint import State
from solpath.searching.dynamics import Inclusion, extrapolated_entry, inclusion_step
from solpath.searching.engine import Engine
from solpath.searching.signal import keep_reached


class InclusionSearch:
    """The `Method` of the paper's inclusion: a constant pull and continuous masks.

    Args:
        config: Settings of the search.

    Attributes:
        name: Name of the method in its paths.
    """

    name = "inclusion"

    def __init__(self, config: InclusionConfig) -> None:
        self._config = config

    def basis(self, engine: Engine) -> dict[str, Tensor]:
        """Return an empty dict: the inclusion searches along the channels as they are.

        Args:
            engine: Not used.
        """
        return {}

    def start(self, engine: Engine) -> State:
        """Return the state before the first step: every mask is 1, every dual variable is 0.

        Args:
            engine: Measures the one-shot scale.
        """
        scale, _ = keep_reached(engine, *engine.curvature(self._config.scale_batches))
        zeros = torch.zeros_like(scale)
        return {
            "scale": scale,
            "mask": torch.ones_like(scale),
            "dual": zeros,
            "entry": torch.full_like(zeros, torch.inf),
        }

    def expected(self, units: int, steps: int) -> Expected:
        """Return the dtype and shape of every entry of a state by name, to check a file against.

        Args:
            units: Number of units.
            steps: Not used.
        """
        return dict.fromkeys(("scale", "mask", "dual", "entry"), (torch.float64, (units,)))

    def step(self, engine: Engine, state: State, k: int) -> tuple[State, float, float]:
        """Return the state after step `k`, its loss, and the share of the cost under the new mask.

        Args:
            engine: Answers for the batch of the step.
            state: State before the step. It is not changed.
            k: Number of the step, from 0.
        """
        loss, _, gradient = engine.gradients(k, state["mask"], binary=False)
        nu, lam = inclusion_constants(self._config, state["scale"])
        after = inclusion_step(
            Inclusion(state["mask"], state["dual"], state["entry"]),
            engine.mean(gradient, engine.batch_size(k))[0],
            scale=state["scale"],
            nu=nu,
            kappa=self._config.kappa,
            lam=lam,
            step_size=self._config.step_size,
            time=k,
        )
        keep = float((after.mask * engine.cost).sum() / engine.cost.sum())
        return state | after._asdict(), loss, keep

    def looks(self, done: int) -> tuple[int, int]:
        """Return zeros: the inclusion looks at no moments.

        Args:
            done: Not used.
        """
        return 0, 0

    def entry_times(self, engine: Engine, state: State) -> Tensor:
        """Return for every unit the step at which its dual variable crosses λ, float64 ``[units]``.

        Args:
            engine: Not used.
            state: State after the last step.
        """
        lam = inclusion_constants(self._config, state["scale"])[1]
        final = Inclusion(state["mask"], state["dual"], state["entry"])
        return extrapolated_entry(final, lam, self._config.steps)


def inclusion_constants(config: InclusionConfig, scale: Tensor) -> tuple[float, float]:
    """Return ν and λ, with the defaults that follow from the scale and the number of steps.

    Args:
        config: Settings of the search; see `InclusionConfig` for the defaults.
        scale: One-shot scale, ``[units]``.
    """
    positive = scale[scale > 0]
    median = float(positive.median()) if len(positive) else 1.0
    nu = 0.2 / median if config.nu is None else config.nu
    lam = config.step_size * config.steps / 4 if config.lam is None else config.lam
    return nu, lam
