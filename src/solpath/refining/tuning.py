"""Tune a smaller model: train it to give the outputs of the dense one, without labels."""

import contextlib
import copy
import hashlib
import math
import os
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import get_scheduler

from solpath.config import TuneConfig, check_count
from solpath.data.source import BatchSource, mix
from solpath.errors import (
    BatchError,
    FileError,
    NonFiniteLossError,
    UnsupportedModelError,
)
from solpath.measuring.measurement import evaluating
from solpath.model.discovery import EXTRACTED
from solpath.refining.adapters import add_adapters_, merge_adapters_
from solpath.refining.distillation import Lessons
from solpath.refining.distributed import accelerating, part, whole
from solpath.running.checkpoint import State, kept, read_checkpoint, write_checkpoint
from solpath.running.progress import Report, progress_bar

Model = TypeVar("Model", bound=nn.Module)

_RATE, _MAX_RATE = 0.1, 1e-3  # times the root of the held-out loss, over the width; and at most
_ADAPTERS = 10  # times the rate of all weights
_MOMENTS = ("step", "exp_avg", "exp_avg_sq")
_FIGURES = (
    "loss {task.fields[loss]:.4f}  held out {task.fields[now]:.4f}  best {task.fields[best]:.4f}"
)


def tune(
    small: Model,
    dense: nn.Module,
    batches: Iterable[Any],
    config: TuneConfig | None = None,
    *,
    heldout: Iterable[Any] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int = 100,
    progress: bool = True,
) -> Model:
    """Train a copy of `small` to give the outputs of `dense`, on unlabelled batches.

    The loss is that of the search: KL of the logits, or the squared error of the last hidden
    states. Parameters of `small` that do not require gradients stay as they are. The weights with
    the least held-out loss are returned, and the start counts: on the held-out batches the result
    is never worse than `small`. Dropout is off. Both models are left as they were found.

    On one machine with one number of threads the result is bit-identical from run to run and does
    not depend on `checkpoint_every`, on `progress`, or on being interrupted and resumed. Several
    processes (``accelerate launch``, ``torchrun``) must see the same batches; each takes its share
    of the samples of each, which gives the same updates up to sums of floats.

    Args:
        small: from `extract` or `load`; any module with outputs of the shape of `dense`'s will do.
            Tuning runs where it is.
        dense: the model to imitate, on the same device.
        batches: iterable of what both models take, repeated when shorter than the steps.
        config: see `TuneConfig`.
        heldout: batches that decide which weights are best. Default: the last tenth of
            `batches`, which must then be a sequence of at least 10.
        checkpoint: folder for the state. If it holds the state of the same tuning, that goes on.
        checkpoint_every: steps between checkpoints; each is four times the trained weights.
        progress: show a progress bar with loss, held-out loss and time left.

    Returns:
        A model like `small` with other weights: same class, plan, flags, names and shapes.

    Raises:
        BatchError: empty batches, on another device, or outputs of different shapes.
        ConfigError: `lora_rank` without peft, a bad `checkpoint_every`, or a way of ``accelerate``
            that does not fit.
        FileError: a damaged checkpoint, or one that cannot be written.
        UnsupportedModelError: no parameter to train, or half-precision ones.
        NonFiniteLossError: the loss became NaN or infinite; the last checkpoint is kept.
        FingerprintError: the checkpoint belongs to other models or other settings.

    Example:
        >>> small = solpath.extract(dense, path.plan(sparsity=0.6))  # doctest: +SKIP
        >>> tuned = solpath.tune(small, dense, batches)  # doctest: +SKIP
        >>> solpath.save(tuned, "tuned/")  # doctest: +SKIP
    """
    check_count("checkpoint_every", checkpoint_every, 1)
    config = config or TuneConfig()
    device = _check_model(small, config)
    file = None if checkpoint is None else Path(checkpoint) / "tune.safetensors"
    header: dict[str, Any] = {"kind": "TuneConfig", "version": 2, "config": config.to_dict()}
    header["fingerprint"] = {}
    if file is not None:
        header["fingerprint"] = {"small": _digest(small), "dense": _digest(dense)}
    state = None if file is None else read_checkpoint(file, header)

    with (
        accelerating(device, config.mixed_precision) as accelerator,
        _seeded(device, config),
        evaluating(dense),
    ):
        train, held = _split(batches, heldout, config.seed)
        bf16 = config.mixed_precision == "bf16"
        lessons = Lessons(dense, train, device, accelerator, bf16=bf16)
        exam = Lessons(dense, held, device, accelerator, bf16=False)
        work = _copy(small).eval()
        if config.lora_rank is not None:
            add_adapters_(work, config.lora_rank, config.lora_alpha)
        training = _Training(work, config, lessons, exam, accelerator, _width(small))
        if state is not None and file is not None:
            training.restore_(state, file)
        show = progress and accelerator.is_main_process
        figures = {"loss": math.nan, "now": math.nan, "best": math.nan}
        with progress_bar(
            "tune", _FIGURES, config.steps, training.steps, show=show, **figures
        ) as report:
            _run(training, file, header, checkpoint_every, report)
        return _result(small, config, training, exam)


class _Training:
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
        lessons: Lessons,
        exam: Lessons,
        accelerator: Accelerator,
        width: float,
    ) -> None:
        self._config, self._lessons, self._exam, self._width = config, lessons, exam, width
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
        self.best = {name: whole(p) for name, p in self._trained.items()}
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
        value = self._exam.divergence(self._model)
        if not self.checks and not math.isfinite(value):
            raise NonFiniteLossError(f"the held-out loss is {value} at step 0.")
        if self.checks and value < min(value for _, value in self.checks):
            self.best = {name: whole(p) for name, p in self._trained.items()}
        self.checks.append((done, value if math.isfinite(value) else math.inf))

    def step_(self) -> None:
        """One update on the next batch.

        Raises:
            NonFiniteLossError: the loss is NaN or infinite; the weights are those before the step.
        """
        config, done = self._config, self.steps
        self._optimizer.zero_grad()
        lesson = self._lessons[done]
        loss = self._lessons.errors(self._model, lesson).mean()
        [value] = self._lessons.sum(float(loss.detach()) * lesson.samples / lesson.total)
        if not math.isfinite(value):
            raise NonFiniteLossError(f"the loss is {value} at step {done}.")
        # Gradients are averaged over processes, whose shares of the batch may differ by one.
        weight = lesson.samples * self.accelerator.num_processes / lesson.total
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
            state[f"weights/{name}"] = whole(parameter)
            state[f"best/{name}"] = self.best[name]
            for key, value in self._optimizer.state.get(parameter, {}).items():
                state[f"{key}/{name}"] = whole(value)
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
                    parameter.copy_(part(state[f"weights/{name}"], parameter))
                if f"step/{name}" in state:
                    moments = {key: state[f"{key}/{name}"] for key in _MOMENTS}
                    self._optimizer.state[parameter] = {
                        key: part(value, parameter) for key, value in moments.items()
                    }
        except (KeyError, ValueError, RuntimeError) as error:
            raise FileError(f"{file} does not fit the model: {error}.") from error


def _run(
    training: _Training, file: Path | None, header: Mapping[str, Any], every: int, report: Report
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
        raise NonFiniteLossError(f"{str(error).rstrip('.')}{kept(file, saved)}.") from error
    except KeyboardInterrupt:
        if training.settled and training.accelerator.num_processes == 1:
            save()
        raise


def _result(small: Model, config: TuneConfig, training: _Training, exam: Lessons) -> Model:
    """A copy of `small` with the best weights."""
    result = _copy(small)
    values: Mapping[str, Tensor] = training.best
    if config.lora_rank is not None:
        tuner = add_adapters_(_copy(small), config.lora_rank, config.lora_alpha)
        values = merge_adapters_(tuner, training.best)
    with torch.no_grad():
        for name, parameter in result.named_parameters():
            if name in values:
                parameter.copy_(values[name])
    if config.lora_rank is not None:  # a merge rounds, so look again
        with evaluating(result):
            merged = exam.divergence(result)
        if not merged < training.checks[0][1]:
            return _copy(small)
    return result


def _schedule(config: TuneConfig) -> Callable[[int], float]:
    """Share of the peak learning rate of a step: by its number, so that resuming needs no state."""
    name = "constant_with_warmup" if config.schedule == "constant" else config.schedule
    warmup = round(config.warmup * config.steps)
    unit = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    [factor] = get_scheduler(name, unit, warmup, config.steps).lr_lambdas
    return lambda step: factor(step + 0.5)  # of its middle: at both ends it may be 0


def _width(model: nn.Module) -> float:
    """Median number of inputs of the matrices that are trained."""
    inputs = [p.shape[-1] for p in model.parameters() if p.requires_grad and p.dim() == 2]
    return statistics.median(inputs) if inputs else 1.0


def _split(
    batches: Iterable[Any], heldout: Iterable[Any] | None, seed: int
) -> tuple[BatchSource, BatchSource]:
    """Batches to train on and batches to judge by."""
    train = BatchSource(batches, seed)
    if heldout is not None:
        held = BatchSource(heldout, seed)
        if held.length is None:  # a loader, read once
            torch.manual_seed(mix(seed, "heldout"))
            held = BatchSource(list(heldout), seed)
        return train, held
    if not isinstance(batches, Sequence) or len(batches) < 10:
        found = f"{train.length} batches" if train.length else f"a {type(batches).__name__}"
        raise BatchError(
            f"cannot hold out a tenth of {found}; pass heldout=, or a sequence of at least 10."
        )
    count = len(batches) // 10
    last = list(batches[-count:])  # read once, as they are looked at again and again
    return BatchSource(batches[:-count], seed), BatchSource(last, seed)


@contextlib.contextmanager
def _seeded(device: torch.device, config: TuneConfig) -> Iterator[None]:
    """Seed torch, with gradients on; its random state comes back afterwards."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.enable_grad():
        torch.manual_seed(mix(config.seed, "tune"))
        yield


def _check_model(model: nn.Module, config: TuneConfig) -> torch.device:
    """Where the model is. Raises `UnsupportedModelError` if it cannot be trained."""
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    if not trained:
        raise UnsupportedModelError(
            f"no parameter of this {type(model).__name__} requires gradients; call "
            "requires_grad_() on what is to be trained."
        )
    for name, parameter in trained:
        if config.lora_rank is None and parameter.dtype in (torch.float16, torch.bfloat16):
            raise UnsupportedModelError(
                f"{name} is {parameter.dtype}, in which small updates are lost to rounding; use "
                "model.float() with mixed_precision='bf16', or lora_rank."
            )
    return trained[0][1].device


def _copy(model: Model) -> Model:
    """A deep copy with the same plan."""
    plan = getattr(model, EXTRACTED, None)
    return copy.deepcopy(model, {id(plan): plan})


def _digest(model: nn.Module) -> str:
    """SHA-256 of all weights and buffers, first 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]
