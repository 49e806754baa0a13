"""The paper's search: its differential inclusion, with a constant pull and continuous masks."""

import torch
from torch import Tensor

from solpath.config import InclusionConfig
from solpath.running.checkpoint import State
from solpath.searching.dynamics import Inclusion, extrapolated_entry, inclusion_step
from solpath.searching.engine import Engine


class InclusionSearch:
    """What the paper's inclusion starts from, does in a step, and reads its order from.

    Attributes:
        name: what its paths call it.
    """

    name = "inclusion"

    def __init__(self, config: InclusionConfig) -> None:
        self._config = config

    def basis(self, engine: Engine) -> dict[str, Tensor]:
        """Empty: the channels as they are."""
        return {}

    def start(self, engine: Engine) -> State:
        """The state before the first step."""
        scale, _ = engine.curvature(self._config.scale_batches)
        zeros = torch.zeros_like(scale)
        return {
            "scale": scale,
            "mask": torch.ones_like(scale),
            "dual": zeros,
            "entry": torch.full_like(zeros, torch.inf),
        }

    def step(self, engine: Engine, state: State, k: int) -> tuple[State, float, float]:
        """The state after step `k`, its loss, and the share of the cost under the mask."""
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

    def entry_times(self, engine: Engine, state: State) -> Tensor:
        """For every unit, the time at which its dual variable crosses λ. float64 ``[units]``."""
        lam = inclusion_constants(self._config, state["scale"])[1]
        final = Inclusion(state["mask"], state["dual"], state["entry"])
        return extrapolated_entry(final, lam, self._config.steps)


def inclusion_constants(config: InclusionConfig, scale: Tensor) -> tuple[float, float]:
    """ν and λ of the inclusion, with the defaults that follow from the scale and the steps."""
    positive = scale[scale > 0]
    median = float(positive.median()) if len(positive) else 1.0
    nu = 0.2 / median if config.nu is None else config.nu
    lam = config.step_size * config.steps / 4 if config.lam is None else config.lam
    return nu, lam
