"""The training loop of `tune`: updates, checks on held-out batches, and states to resume from."""

import math
from collections.abc import Callable, Iterator, Mapping
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import get_scheduler

from solpath.config import TuneConfig
from solpath.errors import ConfigError, FileError, NonFiniteLossError
from solpath.refining.distillation import Distillation
from solpath.refining.distributed import gather, gather_parts, own_part, set_parts_, shard_like
from solpath.running.checkpoint import State, check_state, resume_hint, write_checkpoint
from solpath.running.progress import Report

# The default peak of the learning rate is `_RATE` times the root of the held-out loss, divided by
# the width, and at most `_MAX_RATE`; for adapters it is `_ADAPTERS` times as high. It is halved, at
# most `_TRIES` times, while one update adds more than `_GROWTH` times the divergence to it, or
# `_LOSS_GROWTH` times a user's loss; in proportion less in a run of fewer steps than `_LONG`.
_RATE, _MAX_RATE = 0.1, 1e-3
_ADAPTERS = 10
_GROWTH, _LOSS_GROWTH = 2.0, 0.1
_LONG, _TRIES = 1000, 10
_MOMENTS = ("step", "exp_avg", "exp_avg_sq")


class Training:
    """A model in training: its weights, its optimizer, and what the held-out batches said.

    Args:
        model: The model, which is changed, from `prepared`. Parameters that require no gradients
            stay as they are.
        optimizer: The optimizer, from `prepared`.
        config: The settings.
        taught: The distillation batches to train on.
        heldout: The distillation batches that decide which weights are best.
        accelerator: Wraps the model and the optimizer, and runs the backward passes.
        width: Typical number of inputs of a trained matrix, for the default learning rate.

    Attributes:
        losses: The loss of every step.
        checks: Step and held-out divergence of every check; the first is before any update.
        best: The trained parameters at the best check, on the CPU: what this process holds of them.
        work: How much there was to compute in the last batch, over all processes, with its unit.
        settled: False while an update, or a return to the start, is under way.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        config: TuneConfig,
        taught: Distillation,
        heldout: Distillation,
        accelerator: Accelerator,
        width: float,
    ) -> None:
        self._config, self._taught, self._heldout = config, taught, heldout
        self._width = width
        self.accelerator = accelerator
        self._model, self._optimizer = model, optimizer
        named = accelerator.unwrap_model(self._model).named_parameters()
        self._trained = {name: p for name, p in named if p.requires_grad}
        self._schedule = _schedule(config)
        self.losses: list[float] = []
        self.checks: list[tuple[int, float]] = []
        self.best = {name: own_part(p) for name, p in self._trained.items()}
        self.work = 0, "samples"
        self.settled = True

    @property
    def steps(self) -> int:
        """Number of updates done."""
        return len(self.losses)

    @property
    def finished(self) -> bool:
        """Whether all steps are done or patience has run out.

        At the default rate, checks that are worse than the start do not count: tries of the rate,
        and what its peak makes worse before it falls.
        """
        values = [value for _, value in self.checks]
        if self._config.learning_rate is None:
            values = [value for value in values if value <= values[0]]
        stale = len(values) - 1 - values.index(min(values))
        patience = self._config.patience
        return self.steps == self._config.steps or (patience is not None and stale >= patience)

    @property
    def _peak(self) -> float:
        """Peak of the learning rate.

        The default is halved as often as updates showed that it is too high.
        """
        if self._config.learning_rate is not None:
            return self._config.learning_rate
        rate = default_rate(self.checks[0][1], self._width) * 0.5**self._halvings
        return rate if self._config.lora_rank is None else _ADAPTERS * rate

    @property
    def _halvings(self) -> int:
        """How often the default rate was halved: once for every try that failed, and for every
        loss that was not finite later on."""
        later = (value for _, value in self.checks[1 + self._failed :])
        return self._failed + sum(map(math.isinf, later))

    @property
    def _failed(self) -> int:
        """Number of tries of the default rate that failed: of checks after the first, up to one
        that is within bounds.

        What Adam's first updates add to a divergence is noise, which goes with the square of the
        rate. Later updates bring it down again, when the schedule lets the rate fall, and the more
        of them there are, the more of it. Of a user's loss it is not known how low it can get, so
        it may rise by a small part alone.
        """
        start = max(self.checks[0][1], 0.0)
        growth = _GROWTH if self._heldout.loss is None else _LOSS_GROWTH
        most = start * (1 + growth * min(1.0, self._config.steps / _LONG))
        tried = (value for _, value in self.checks[1 : 1 + _TRIES])
        return sum(1 for _ in takewhile(lambda value: value > most, tried))

    @property
    def _tries(self) -> int:
        """Number of updates, done or to come, that only try the default rate."""
        return 0 if self._config.learning_rate is not None else min(self._failed + 1, _TRIES)

    @property
    def _trying(self) -> bool:
        """Whether an update that no check has followed yet is a try."""
        return len(self.checks) - 1 < self._tries

    @property
    def _share(self) -> float:
        """Share of the peak for the next update: all of it for a try, after which the schedule
        begins, and ends with the last step."""
        steps, tries = self._config.steps, self._tries
        if self._trying:
            return 1.0
        return self._schedule((self.steps - tries) * steps / (steps - tries))

    @property
    def _due(self) -> bool:
        """Whether it is time for a check."""
        config, done = self._config, self.steps
        last = self.checks[-1][0] if self.checks else -1
        if done in (last, 0, config.steps):
            return done != last
        return self._trying or done % config.evaluate_every == 0

    def check_(self) -> None:
        """Measure the held-out divergence if it is time to, and remember the best weights.

        At the default learning rate there is one after the first update, which is of full length.
        If it has made the divergence far worse, or a user's loss somewhat, an update of half the
        length is tried from the start, and so on. Then the warmup begins, at the best weights.
        A divergence that is not finite later on sends the model back to them, at half the rate.

        Raises:
            ConfigError: A user's loss is negative before the first update, and no learning rate
                is given.
            NonFiniteLossError: The divergence is NaN or infinite before the first update.
        """
        if not self._due:
            return
        value = self._heldout.divergence(self._model)
        if not self.checks and not math.isfinite(value):
            where = self._heldout.first_not_finite(self._model)
            raise NonFiniteLossError(f"the loss of {where} is {value} at step 0.")
        unscaled = self._config.learning_rate is None and self._heldout.loss is not None
        if not self.checks and value < 0 and unscaled:
            raise ConfigError(
                f"the loss is {value:.3g} at the start, and a default learning rate follows from "
                "the root of a positive one; pass learning_rate= in the TuneConfig."
            )
        if self.checks and value < min(value for _, value in self.checks):
            self.best = {name: own_part(p) for name, p in self._trained.items()}
        self._note_(value)

    def _note_(self, value: float) -> None:
        """Remember what a check said, and go back to the best weights from a try of the rate."""
        tried = bool(self.checks) and self._trying
        failed = self._config.learning_rate is None and not math.isfinite(value)
        self.settled = False
        self.checks.append((self.steps, value if math.isfinite(value) else math.inf))
        if tried or failed:
            set_parts_(self._model, self._trained, self.best)
            self._optimizer.state.clear()
        self.settled = True

    def step_(self) -> None:
        """Do one update on the next batch.

        If the default learning rate has made the loss NaN or infinite, that counts as a check,
        after which the best weights go on at half the rate.

        Raises:
            NonFiniteLossError: The loss is NaN or infinite. The weights are left untouched.
        """
        config, done = self._config, self.steps
        self._optimizer.zero_grad()
        batch = self._taught[done]
        self.work = batch.work
        errors = self._taught.errors(self._model, batch)
        loss = errors.mean()
        [value] = self._taught.sum(float(loss.detach()) * batch.samples / batch.total)
        if not math.isfinite(value):
            if config.learning_rate is None and done > self.checks[-1][0]:
                self._note_(value)
                return self.step_()
            where = self._taught.where_not_finite(batch, errors)
            raise NonFiniteLossError(f"the loss of {where} is {value} at step {done}.")
        # Gradients are averaged over processes, whose numbers of samples may differ by one.
        weight = batch.samples * self.accelerator.num_processes / batch.total
        self.accelerator.backward(loss * weight)
        self.accelerator.clip_grad_norm_(list(self._trained.values()), config.max_grad_norm)
        self.settled = False
        for group in self._optimizer.param_groups:
            group["lr"] = self._peak * self._share
        self._optimizer.step()
        self.losses.append(value)
        self.settled = True

    def state(self) -> State:
        """Return everything that a resumed run needs, as tensors on the CPU.

        Every process must call this; the first gets them, and the others get nothing.
        """
        state = {"losses": torch.tensor(self.losses, dtype=torch.float64)}
        state["checks"] = torch.tensor(self.checks, dtype=torch.float64).view(-1, 2)
        for key, value in self._gathered():
            if self.accelerator.is_main_process:
                state[key] = value
        return state if self.accelerator.is_main_process else {}

    def _gathered(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the parts of a state that may be sharded, one by one."""
        for name, parameter in self._trained.items():
            yield f"weights/{name}", gather(parameter)
            yield f"best/{name}", gather_parts(self.best[name], parameter)
            for key, value in self._optimizer.state.get(parameter, {}).items():
                yield f"{key}/{name}", gather(value)

    def finish_(self) -> Iterator[tuple[str, Tensor]]:
        """Free the optimizer, and return the best weights by name, each whole and on the CPU.

        They are gathered one by one, so every process must take all of them.
        """
        self._optimizer.zero_grad()
        self._optimizer.state.clear()
        trained = self._trained.items()
        return ((name, gather_parts(self.best.pop(name), like)) for name, like in trained)

    def restore_(self, state: State, file: Path) -> None:
        """Go back to a state.

        Args:
            state: A state from `state`.
            file: Where the state was read from, for the message of the error.

        Raises:
            FileError: The state cannot be one of this training; the message says why.
        """
        self._check_(state, file)
        self.losses = state["losses"].tolist()
        self.checks = [(int(step), value) for step, value in state["checks"].tolist()]
        for name, parameter in self._trained.items():
            self.best[name] = own_part(shard_like(state[f"best/{name}"], parameter))
            with torch.no_grad():
                parameter.copy_(shard_like(state[f"weights/{name}"], parameter))
            if f"step/{name}" in state:
                moments = {key: state[f"{key}/{name}"] for key in _MOMENTS}
                self._optimizer.state[parameter] = {
                    key: shard_like(value, parameter) for key, value in moments.items()
                }

    def _check_(self, state: State, file: Path) -> None:
        """Raise `FileError` unless a state can be one of this training."""
        done, checked = (state.get(name, torch.empty(0)) for name in ("losses", "checks"))
        expected = {
            "losses": (torch.float64, (done.numel(),)),
            "checks": (torch.float64, (checked.numel() // 2, 2)),
        }
        for name, parameter in self._trained.items():
            like = parameter.dtype, tuple(parameter.shape)
            expected |= {f"weights/{name}": like, f"best/{name}": like}
            if f"step/{name}" in state:  # not for a parameter that no gradient reached
                expected |= {f"{key}/{name}": like for key in _MOMENTS}
                expected[f"step/{name}"] = (torch.float32, ())
        check_state(file, state, expected)
        steps, count = checked[:, 0].tolist(), len(done)
        ascending = sorted({float(int(step)) for step in steps if 0 <= step <= count})
        if count > self._config.steps or not done.isfinite().all() or steps != ascending:
            raise FileError(f"{file}: losses and checks are not of {self._config.steps} steps.")
        if (steps or count) and steps[:1] != [0.0]:
            raise FileError(f"{file}: there is no check before the first step.")


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


def prepared(
    model: nn.Module, config: TuneConfig, accelerator: Accelerator
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Return a model and its optimizer, ready to train in one process or in several.

    Args:
        model: The model, which is changed. Its parameters that require gradients are trained.
        config: The settings.
        accelerator: Wraps both of them, and may divide them over processes.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in trained if p.dim() > 1]
    others = [p for p in trained if p.dim() <= 1]
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    found: tuple[nn.Module, torch.optim.Optimizer] = accelerator.prepare(
        model, torch.optim.AdamW(groups, fused=True)
    )
    return found


def train_(
    training: Training, file: Path | None, header: Mapping[str, Any], every: int, report: Report
) -> None:
    """Train to the end, and save the state on the way.

    A run in a single process also saves on Ctrl-C, unless an update is under way.

    Args:
        training: The training, which is changed.
        file: The checkpoint to write; None writes none.
        header: Says in the checkpoint which run it belongs to.
        every: Steps between checkpoints.
        report: Moves the progress bar by one step.

    Raises:
        NonFiniteLossError: The loss is NaN or infinite; the message says which checkpoint is kept.
        FileError: A checkpoint cannot be written.
        KeyboardInterrupt: The user pressed Ctrl-C.
    """

    def save() -> int:
        if file is not None:
            state = training.state()
            if training.accelerator.is_main_process:
                write_checkpoint(file, header, state)
            training.accelerator.wait_for_everyone()
        return training.steps

    saved = training.steps  # 0: no checkpoint yet
    try:
        training.check_()
        while not training.finished:
            training.step_()
            training.check_()
            values = [value for _, value in training.checks]
            figures = {"loss": training.losses[-1], "now": values[-1], "best": min(values)}
            report(**figures, work=training.work)
            if training.steps % every == 0 or training.finished:
                saved = save()
    except NonFiniteLossError as error:
        raise NonFiniteLossError(f"{str(error).rstrip('.')}{resume_hint(file, saved)}.") from error
    except KeyboardInterrupt:
        if training.settled and training.accelerator.num_processes == 1:
            save()
        raise


def _schedule(config: TuneConfig) -> Callable[[float], float]:
    """Return what maps a step to the share of the peak learning rate that it gets.

    It depends on the number of the step alone, so that resuming needs no state.
    """
    name = "constant_with_warmup" if config.schedule == "constant" else config.schedule
    unit = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    [factor] = get_scheduler(name, unit, _warmup(config), config.steps).lr_lambdas
    return lambda step: factor(step + 0.5)  # mid-step: it may be 0 at either end


def _warmup(config: TuneConfig) -> int:
    """Return the number of steps in which the learning rate grows."""
    return round(config.warmup * config.steps)
