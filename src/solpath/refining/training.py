"""The training loop of `tune`: updates, checks on held-out batches, and states to resume from."""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from solpath.config import TuneConfig
from solpath.errors import FileError, NonFiniteLossError
from solpath.refining.distillation import Distillation
from solpath.refining.distributed import gather, gather_parts, own_part, set_parts_, shard_like
from solpath.refining.learning_rate import LearningRate
from solpath.running.checkpoint import State, check_state, resume_hint, write_checkpoint
from solpath.running.progress import Report

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
        self._rate = LearningRate(config, width, of_loss=heldout.loss is not None)
        self.accelerator = accelerator
        self._model, self._optimizer = model, optimizer
        named = accelerator.unwrap_model(self._model).named_parameters()
        self._trained = {name: p for name, p in named if p.requires_grad}
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
        values = self._values
        if self._rate.is_default:
            values = [value for value in values if value <= values[0]]
        stale = len(values) - 1 - values.index(min(values))
        patience = self._config.patience
        return self.steps == self._config.steps or (patience is not None and stale >= patience)

    @property
    def _values(self) -> list[float]:
        """The held-out divergences of the checks."""
        return [value for _, value in self.checks]

    @property
    def _at_best(self) -> bool:
        """Whether the weights are the best ones, which an update or a worse look makes untrue."""
        values = self._values
        if self.steps > self.checks[-1][0]:
            return False
        returned = math.isinf(values[-1]) or (len(values) > 1 and self._rate.trying(values[:-1]))
        return returned or values.index(min(values)) == len(values) - 1

    @property
    def _due(self) -> bool:
        """Whether it is time for a check."""
        config, done = self._config, self.steps
        last = self.checks[-1][0] if self.checks else -1
        if done in (last, 0, config.steps):
            return done != last
        return self._rate.trying(self._values) or done % config.evaluate_every == 0

    def check_(self) -> None:
        """Measure the held-out divergence if it is time to, and remember the best weights.

        Every try of a default learning rate is followed by one, which sends the model back to the
        best weights. So does a divergence that is not finite later on, at half the rate.

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
        if not self.checks:
            self._rate.check_start(value)
        elif value < min(self._values):
            self.best = {name: own_part(p) for name, p in self._trained.items()}
        self._note_(value)

    def _note_(self, value: float) -> None:
        """Remember what a check said; after a try of the rate, or where the default rate has made
        it infinite, go back to the best weights."""
        tried = bool(self.checks) and self._rate.trying(self._values)
        failed = self._rate.is_default and not math.isfinite(value)
        self.settled = False
        earlier = [check for check in self.checks if check[0] < self.steps]
        self.checks = [*earlier, (self.steps, value if math.isfinite(value) else math.inf)]
        if tried or failed:
            set_parts_(self._model, self._trained, self.best)
            self._optimizer.state.clear()
        self.settled = True

    def step_(self) -> None:
        """Do one update on the next batch.

        If the default learning rate has made the loss NaN or infinite, that counts as a check, in
        the place of one that was just made, after which the best weights go on at half the rate.

        Raises:
            NonFiniteLossError: The loss is NaN or infinite. The weights are left untouched.
        """
        done = self.steps
        self._optimizer.zero_grad()
        batch = self._taught[done]
        self.work = batch.work
        errors = self._taught.errors(self._model, batch)
        loss = errors.mean()
        [value] = self._taught.sum(float(loss.detach()) * batch.samples / batch.total)
        if not math.isfinite(value):
            if self._rate.is_default and not self._at_best:
                self._note_(value)
                return self.step_()
            where = self._taught.where_not_finite(batch, errors)
            raise NonFiniteLossError(f"the loss of {where} is {value} at step {done}.")
        # Gradients are averaged over processes, whose numbers of samples may differ by one.
        weight = batch.samples * self.accelerator.num_processes / batch.total
        self.accelerator.backward(loss * weight)
        self.accelerator.clip_grad_norm_(list(self._trained.values()), self._config.max_grad_norm)
        self.settled = False
        for group in self._optimizer.param_groups:
            group["lr"] = self._rate.next(self._values, done)
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
