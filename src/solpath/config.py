"""Settings of a search or a tuning: frozen, plain values, checked where they are built."""

from dataclasses import asdict, dataclass
from typing import Any

from solpath.errors import ConfigError


def check_number(field: str, value: float, low: float, high: float) -> None:
    """Raise `ConfigError` unless `value` is a number from `low` to `high`."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not low <= value <= high:
        raise ConfigError(f"{field} must be a number between {low:g} and {high:g}, got {value!r}.")


def _check_choice(field: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"{field} must be one of {', '.join(choices)}; got {value!r}.")


def _check_flag(field: str, value: bool) -> None:
    if not isinstance(value, bool):
        raise ConfigError(f"{field} must be True or False, got {value!r}.")


def check_count(field: str, value: int, low: int) -> None:
    """Raise `ConfigError` unless `value` is an integer of at least `low`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ConfigError(f"{field} must be an integer of at least {low}, got {value!r}.")


@dataclass(frozen=True)
class SearchConfig:
    """The default search: binary masks, growing pull, masks at their equilibrium (docs/method.md).

    One setting serves every model measured in docs/benchmarks.md; nothing has to be tuned.

    Attributes:
        steps: forward-backward passes after the scale has been measured.
        seed: of the mask draws, the noise of the one-shot scale, and a shuffling `DataLoader`. Same
            seed, same path.
        momentum: of the running mean of the marginals, in [0, 0.999].
        relaxation: share of the way to its equilibrium that the mask moves in a step, in
            [0.001, 1].
        sharpness: exponent of the marginals in the mask; 1 is the plain equilibrium.
        shrinkage: pull of noisy marginals towards the one-shot scale; 0 switches it off.
        final_size: expected share of the cost kept at the last step, in [0.001, 0.9].
        memory: steps, as a share of `steps`, that a mask is remembered for when the order is read.
        scale_batches: batches the one-shot scale is measured on.
        binary: draw masks from {0, 1}; False uses the continuous mask itself (ablation).
        growing_pull: let the pull grow with the steps; False holds it constant (ablation).
        basis: ``coordinate`` searches the channels as they are; ``principal`` first turns query-key
            and value-output dimensions to their principal axes, where nothing stands in the way:
            rotary embeddings and norms over the heads do (see `solpath.model.basis.obstacle`).
        compensated: let a unit count only as far as the others cannot make up for it, for members
            that go through `compensate`.
    """

    steps: int = 200
    seed: int = 0
    momentum: float = 0.9
    relaxation: float = 0.5
    sharpness: float = 1.5
    shrinkage: float = 3.0
    final_size: float = 0.05
    memory: float = 0.1
    scale_batches: int = 16
    binary: bool = True
    growing_pull: bool = True
    basis: str = "coordinate"
    compensated: bool = False

    def __post_init__(self) -> None:
        _check_choice("basis", self.basis, ("coordinate", "principal"))
        check_count("steps", self.steps, 2)
        check_count("seed", self.seed, 0)
        check_count("scale_batches", self.scale_batches, 1)
        check_number("momentum", self.momentum, 0, 0.999)
        check_number("relaxation", self.relaxation, 1e-3, 1)
        check_number("sharpness", self.sharpness, 0.1, 10)
        check_number("shrinkage", self.shrinkage, 0, 1e6)
        check_number("final_size", self.final_size, 1e-3, 0.9)
        check_number("memory", self.memory, 0, 1)
        for field in ("binary", "growing_pull", "compensated"):
            _check_flag(field, getattr(self, field))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class InclusionConfig:
    """The paper's differential inclusion: constant pull, continuous masks, entry times.

    Split linearised Bregman iteration with a diagonal preconditioner (docs/method.md).

    Attributes:
        steps: iterations.
        seed: of the noise of the one-shot scale and of a shuffling `DataLoader`.
        nu: strength of the coupling is 1/nu; None takes 0.2 / median of the one-shot scale.
        kappa: inverse of the ridge on the sparse copy, at least 0.
        lam: threshold that V crosses when a unit enters; None takes
            ``step_size * steps / 4``, which a mask that stays 1 crosses in a quarter of the steps.
        step_size: of the mask, as a share of the way to its stationary point, in [0.0001, 1].
        scale_batches: batches the one-shot scale is measured on.
    """

    steps: int = 200
    seed: int = 0
    nu: float | None = None
    kappa: float = 1.0
    lam: float | None = None
    step_size: float = 0.1
    scale_batches: int = 16

    def __post_init__(self) -> None:
        check_count("steps", self.steps, 2)
        check_count("seed", self.seed, 0)
        check_count("scale_batches", self.scale_batches, 1)
        check_number("kappa", self.kappa, 0, 1e6)
        check_number("step_size", self.step_size, 1e-4, 1)
        if self.nu is not None:
            check_number("nu", self.nu, 1e-12, 1e12)
        if self.lam is not None:
            check_number("lam", self.lam, 1e-6, 1e12)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class TuneConfig:
    """Training of a smaller model against the dense one: AdamW, warmup, one schedule.

    Attributes:
        steps: updates, one batch each.
        seed: of the adapters' start and of a shuffling `DataLoader`.
        learning_rate: peak; None takes 0.1 times the root of the held-out loss before the first
            step, divided by the model's width, at most 1e-3; and ten times that for adapters.
        warmup: share of `steps` in which the learning rate grows from 0 to its peak.
        schedule: after that: ``cosine`` or ``linear`` to 0, or ``constant``.
        weight_decay: of the matrices, not of biases and norms.
        max_grad_norm: longer gradients are scaled down to this norm.
        evaluate_every: steps between looks at the held-out batches.
        patience: looks without a new best after which tuning stops early; None never does.
        lora_rank: train low-rank adapters of this rank and merge them; None trains all weights.
        lora_alpha: the adapters' product is scaled by ``lora_alpha / lora_rank``.
        mixed_precision: ``no``, or ``bf16`` for autocast; the weights stay in their dtype.
    """

    steps: int = 500
    seed: int = 0
    learning_rate: float | None = None
    warmup: float = 0.05
    schedule: str = "cosine"
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    evaluate_every: int = 50
    patience: int | None = None
    lora_rank: int | None = None
    lora_alpha: float = 16.0
    mixed_precision: str = "no"

    def __post_init__(self) -> None:
        check_count("steps", self.steps, 1)
        check_count("seed", self.seed, 0)
        check_count("evaluate_every", self.evaluate_every, 1)
        for field in ("patience", "lora_rank"):
            if getattr(self, field) is not None:
                check_count(field, getattr(self, field), 1)
        if self.learning_rate is not None:
            check_number("learning_rate", self.learning_rate, 1e-12, 1e3)
        check_number("warmup", self.warmup, 0, 1)
        check_number("weight_decay", self.weight_decay, 0, 1e3)
        check_number("max_grad_norm", self.max_grad_norm, 1e-12, 1e12)
        check_number("lora_alpha", self.lora_alpha, 1e-6, 1e6)
        _check_choice("schedule", self.schedule, ("cosine", "linear", "constant"))
        _check_choice("mixed_precision", self.mixed_precision, ("no", "bf16"))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)
