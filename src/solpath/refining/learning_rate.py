"""The learning rate of `tune`: the user's, or a default that the first updates try."""

import math
from collections.abc import Callable, Sequence
from itertools import takewhile

import torch
from transformers import get_scheduler

from solpath.config import TuneConfig
from solpath.errors import ConfigError

# The default peak is `_RATE` times the root of the held-out loss, divided by the width, and at most
# `_MAX_RATE`; for adapters it is `_ADAPTERS` times as high. It is halved, at most `_TRIES` times,
# while one update adds more than `_GROWTH` times the divergence to it, or `_LOSS_GROWTH` times a
# user's loss; in proportion less in a run of fewer steps than `_LONG`.
_RATE, _MAX_RATE = 0.1, 1e-3
_ADAPTERS = 10
_GROWTH, _LOSS_GROWTH = 2.0, 0.1
_LONG, _TRIES = 1000, 10


class LearningRate:
    """The learning rate of a run: a peak, and the share of it that each update gets.

    The rate that a user gives is taken as it is. At the default one, a check follows the first
    update, which is of full length. If it has made the divergence far worse, or a user's loss
    somewhat, an update of half the length is tried from the start, and so on. Then the schedule
    begins. All of it follows from the held-out values of the checks so far, so a run that resumes
    needs no other state.

    Args:
        config: The settings.
        width: Typical number of inputs of a trained matrix.
        of_loss: Whether the checks measure a loss of the user's, and not the divergence.
    """

    def __init__(self, config: TuneConfig, width: float, of_loss: bool) -> None:
        self._config, self._width, self._of_loss = config, width, of_loss
        self._schedule = _schedule(config)

    @property
    def is_default(self) -> bool:
        """Whether the user gave no rate."""
        return self._config.learning_rate is None

    def check_start(self, value: float) -> None:
        """Raise `ConfigError` if no default follows from the value of the first check."""
        if self.is_default and self._of_loss and value < 0:
            raise ConfigError(
                f"the loss is {value:.3g} at the start, and a default learning rate follows from "
                "the root of a positive one; pass learning_rate= in the TuneConfig."
            )

    def trying(self, values: Sequence[float]) -> bool:
        """Return whether an update that no check has followed yet is a try."""
        return len(values) - 1 < self._tries(values)

    def next(self, values: Sequence[float], done: int) -> float:
        """Return the rate of the next update.

        A try gets the peak. After the tries the schedule begins, and it ends with the last step.

        Args:
            values: Held-out values of the checks so far; the first is before any update.
            done: Number of updates done.
        """
        if self.trying(values):
            return self._peak(values)
        steps, tries = self._config.steps, self._tries(values)
        return self._peak(values) * self._schedule((done - tries) * steps / (steps - tries))

    def _peak(self, values: Sequence[float]) -> float:
        """Return the user's rate, or the default, halved for every try that failed and for every
        loss that was not finite later on."""
        if self._config.learning_rate is not None:
            return self._config.learning_rate
        failed = self._failed(values)
        halvings = failed + sum(map(math.isinf, values[1 + failed :]))
        rate = default_rate(values[0], self._width) * 0.5**halvings
        return rate if self._config.lora_rank is None else _ADAPTERS * rate

    def _tries(self, values: Sequence[float]) -> int:
        """Return the number of updates, done or to come, that only try the default rate."""
        return min(self._failed(values) + 1, _TRIES) if self.is_default else 0

    def _failed(self, values: Sequence[float]) -> int:
        """Return the number of tries of the default rate that failed: of checks after the first,
        up to one that is within bounds.

        What Adam's first updates add to a divergence is noise, which goes with the square of the
        rate. Later updates bring it down again, when the schedule lets the rate fall, and the more
        of them there are, the more of it. Of a user's loss it is not known how low it can get, so
        it may rise by a small part alone.
        """
        growth = _LOSS_GROWTH if self._of_loss else _GROWTH
        most = max(values[0], 0.0) * (1 + growth * min(1.0, self._config.steps / _LONG))
        return sum(1 for _ in takewhile(lambda value: value > most, values[1 : 1 + _TRIES]))


def default_rate(loss: float, width: float) -> float:
    """Return the default peak of the learning rate, for training all weights.

    An update of Adam is as long as the rate, whatever the gradient, and changes the output of a
    layer in proportion to the number of its inputs. So the rate goes with the distance to the dense
    model, the root of the divergence from it, and against the width.

    Args:
        loss: The held-out loss at the start.
        width: Typical number of inputs of a trained matrix.
    """
    start = max(loss, 0.0)  # a divergence of nothing may round to below 0
    return min(_RATE * math.sqrt(start) / width, _MAX_RATE)


def _schedule(config: TuneConfig) -> Callable[[float], float]:
    """Return what maps a step to the share of the peak that it gets.

    It depends on the number of the step alone, so that resuming needs no state.
    """
    name = "constant_with_warmup" if config.schedule == "constant" else config.schedule
    unit = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    warmup = round(config.warmup * config.steps)
    [factor] = get_scheduler(name, unit, warmup, config.steps).lr_lambdas
    return lambda step: factor(step + 0.5)  # mid-step: it may be 0 at either end
