"""The training loop of `tune`: updates, looks at the held-out batches, and states to go on from."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from transformers import get_scheduler

from solpath.config import TuneConfig
from solpath.errors import FileError, NonFiniteLossError
from solpath.refining.distillation import Distillation
from solpath.refining.distributed import gather, shard_like
from solpath.running.checkpoint import State, resume_hint, write_checkpoint
from solpath.running.progress import Report

_RATE, _MAX_RATE = 0.1, 1e-3  # times the root of the held-out loss, over the width; and at most
_ADAPTERS = 10  # times the rate of all weights
_MOMENTS = ("step", "exp_avg", "exp_avg_sq")


class Training:
    """A model in training: weights, moments, and what the held-out batches said.

    Attributes:
        losses: of every step.
        checks: (step, held-out divergence); the first is the start.
        best: trained parameters at the best check, on the CPU.
        settled: False while an update is under way.
    """

    def __init__(
        self,
        model: nn.Module,
        config: TuneConfig,
        taught: Distillation,
        heldout: Distillation,
        accelerator: Accelerator,
        width: float,
    ) -> None:
        self._config, self._taught, self._heldout = config, taught, heldout
        self._width = width
        self.accelerator = accelerator
        trained = [p for p in model.parameters() if p.requires_grad]
        decayed = [p for p in trained if p.dim() > 1]
        others = [p for p in trained if p.dim() <= 1]
        groups = [
            {"params": decayed, "weight_decay": config.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        groups = [group for group in groups if group["params"]]
        self._model, self._optimizer = accelerator.prepare(
            model, torch.optim.AdamW(groups, fused=True)
        )
        named = accelerator.unwrap_model(self._model).named_parameters()
        self._trained = {name: p for name, p in named if p.requires_grad}
        self._schedule = _schedule(config)
        self.losses: list[float] = []
        self.checks: list[tuple[int, float]] = []
        self.best = {name: gather(p) for name, p in self._trained.items()}
        self.settled = True

    @property
    def steps(self) -> int:
        """Updates done."""
        return len(self.losses)

    @property
    def finished(self) -> bool:
        """Whether all steps are done, or patience is at its end."""
        values = [value for _, value in self.checks]
        stale = len(values) - 1 - values.index(min(values))
        patience = self._config.patience
        return self.steps == self._config.steps or (patience is not None and stale >= patience)

    @property
    def _peak(self) -> float:
        """Of the learning rate.

        An update of Adam is as long as its rate, whatever the gradient, and changes what a layer
        gives by as much as it has inputs. So the default goes with the distance to the dense
        model, which is the root of the loss at the start, and against the width.
        """
        if self._config.learning_rate is not None:
            return self._config.learning_rate
        rate = min(_RATE * math.sqrt(self.checks[0][1]) / self._width, _MAX_RATE)
        return rate if self._config.lora_rank is None else _ADAPTERS * rate

    def check_(self) -> None:
        """Look at the held-out batches, if it is time to, and remember the best weights."""
        done, last = self.steps, self.steps == self._config.steps
        if (done % self._config.evaluate_every and not last) or done in dict(self.checks):
            return
        value = self._heldout.divergence(self._model)
        if not self.checks and not math.isfinite(value):
            raise NonFiniteLossError(f"the held-out loss is {value} at step 0.")
        if self.checks and value < min(value for _, value in self.checks):
            self.best = {name: gather(p) for name, p in self._trained.items()}
        self.checks.append((done, value if math.isfinite(value) else math.inf))

    def step_(self) -> None:
        """One update on the next batch.

        Raises:
            NonFiniteLossError: the loss is NaN or infinite; the weights are those before the step.
        """
        config, done = self._config, self.steps
        self._optimizer.zero_grad()
        batch = self._taught[done]
        loss = self._taught.errors(self._model, batch).mean()
        [value] = self._taught.sum(float(loss.detach()) * batch.samples / batch.total)
        if not math.isfinite(value):
            raise NonFiniteLossError(f"the loss is {value} at step {done}.")
        # Gradients are averaged over processes, whose shares of the batch may differ by one.
        weight = batch.samples * self.accelerator.num_processes / batch.total
        self.accelerator.backward(loss * weight)
        self.accelerator.clip_grad_norm_(list(self._trained.values()), config.max_grad_norm)
        self.settled = False
        for group in self._optimizer.param_groups:
            group["lr"] = self._peak * self._schedule(done)
        self._optimizer.step()
        self.losses.append(value)
        self.settled = True

    def state(self) -> State:
        """Everything a resumed run needs, as tensors on the CPU."""
        state = {"losses": torch.tensor(self.losses, dtype=torch.float64)}
        state["checks"] = torch.tensor(self.checks, dtype=torch.float64).view(-1, 2)
        for name, parameter in self._trained.items():
            state[f"weights/{name}"] = gather(parameter)
            state[f"best/{name}"] = self.best[name]
            for key, value in self._optimizer.state.get(parameter, {}).items():
                state[f"{key}/{name}"] = gather(value)
        return state

    def restore_(self, state: State, file: Path) -> None:
        """Go back to a state; `file` is for the message.

        Raises:
            FileError: a tensor is missing or has another shape.
        """
        try:
            self.losses = state["losses"].tolist()
            self.checks = [(int(step), value) for step, value in state["checks"].tolist()]
            self.best = {name: state[f"best/{name}"] for name in self._trained}
            for name, parameter in self._trained.items():
                with torch.no_grad():
                    parameter.copy_(shard_like(state[f"weights/{name}"], parameter))
                if f"step/{name}" in state:
                    moments = {key: state[f"{key}/{name}"] for key in _MOMENTS}
                    self._optimizer.state[parameter] = {
                        key: shard_like(value, parameter) for key, value in moments.items()
                    }
        except (KeyError, ValueError, RuntimeError) as error:
            raise FileError(f"{file} does not fit the model: {error}.") from error


def train_(
    training: Training, file: Path | None, header: Mapping[str, Any], every: int, report: Report
) -> None:
    """Train to the end, saving on the way and on Ctrl-C."""

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
            report(loss=training.losses[-1], now=values[-1], best=min(values))
            if training.steps % every == 0 or training.finished:
                saved = save()
    except NonFiniteLossError as error:
        raise NonFiniteLossError(f"{str(error).rstrip('.')}{resume_hint(file, saved)}.") from error
    except KeyboardInterrupt:
        if training.settled and training.accelerator.num_processes == 1:
            save()
        raise


def _schedule(config: TuneConfig) -> Callable[[int], float]:
    """Share of the peak learning rate of a step: by its number, so that resuming needs no state."""
    name = "constant_with_warmup" if config.schedule == "constant" else config.schedule
    warmup = round(config.warmup * config.steps)
    unit = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    [factor] = get_scheduler(name, unit, warmup, config.steps).lr_lambdas
    return lambda step: factor(step + 0.5)  # of its middle: at both ends it may be 0
