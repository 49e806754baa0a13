"""Settings of a search or of tuning: frozen dataclasses of plain values, checked when built."""

from dataclasses import asdict, dataclass
from typing import Any

from solpath.errors import ConfigError

LARGEST_SEED = 2**63 - 1
"""The largest seed of random numbers."""


def check_number(field: str, value: float, low: float, high: float) -> None:
    """Raise `ConfigError` unless `value` is an int or a float from `low` to `high`, both included.

    Args:
        field: Name of the setting, for the message.
        value: The setting. A bool is not a number.
        low: Smallest value allowed.
        high: Largest value allowed.

    Raises:
        ConfigError: `value` is no number or out of range.
    """
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
    """Raise `ConfigError` unless `value` is an integer of at least `low`.

    Args:
        field: Name of the setting, for the message.
        value: The setting. A bool is not an integer.
        low: Smallest value allowed.

    Raises:
        ConfigError: `value` is no integer or below `low`.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ConfigError(f"{field} must be an integer of at least {low}, got {value!r}.")


def check_config(config: object, *kinds: type) -> None:
    """Raise `ConfigError` unless `config` holds settings of one of these kinds.

    Args:
        config: What a user gave.
        kinds: The classes of settings that are taken.

    Raises:
        ConfigError: It is of another class.
    """
    if not isinstance(config, kinds):
        names = " or ".join(kind.__name__ for kind in kinds)
        raise ConfigError(f"config must be a {names}, got a {type(config).__name__}.")


def check_seed(seed: int) -> None:
    """Raise `ConfigError` unless `seed` is an integer that torch takes as a seed.

    Args:
        seed: The setting. A bool is not an integer.
    """
    check_count("seed", seed, 0)
    if seed > LARGEST_SEED:
        raise ConfigError(f"seed must be at most {LARGEST_SEED}, got {seed}.")


@dataclass(frozen=True)
class SearchConfig:
    """Settings of the default search: binary masks under a growing pull (docs/method.md).

    One setting serves every model in docs/benchmarks.md; nothing has to be tuned. The one-shot
    scale, below, is the Gauss-Newton diagonal at the dense model.

    Attributes:
        steps: Forward-backward passes, one batch each, after the one-shot scale was measured.
            At least 2.
        seed: Seeds the mask draws, the noise of the one-shot scale, and a shuffling `DataLoader`.
            The same seed gives the same path.
        momentum: Weight of the past in the running mean of the marginals, in [0, 0.999].
        relaxation: Share of the way to its equilibrium that the mask moves in a step, in
            [0.001, 1].
        sharpness: Exponent of the marginals in the mask, in [0.1, 10]. 1 gives the plain
            equilibrium.
        shrinkage: How strongly noisy marginals are drawn to the one-shot scale, in [0, 1e6].
            0 leaves them as they are.
        final_size: Expected share of the prunable parameters at the last step, in [0.001, 0.9].
            Without `growing_pull` it is not used.
        memory: Share of `steps` for which the order still counts the masks of larger sizes, in
            [0, 1].
        scale_batches: Batches on which the one-shot scale is measured. At least 1.
        binary: Draw masks of 0 and 1 for every sample. False runs the model under the expected
            mask itself, for ablations.
        growing_pull: Let the pull grow from step to step. False aims at half of the prunable
            parameters in every step, for ablations.
        basis: ``"coordinate"`` searches along the channels as they are. ``"principal"`` first
            turns query-key and value-output dimensions to their principal axes. Where something
            stands between the two maps, such as a rotary embedding or a norm over the heads, the
            channels stay (see `solpath.model.basis.obstacle`).
        compensated: Count each marginal only by the unit's unexplained variance. For members that
            go through `solpath.compensate` afterwards.

    Raises:
        ConfigError: A setting has the wrong type or is out of its range. The message names it.

    Example:
        >>> config = solpath.SearchConfig(steps=4, basis="principal")
        >>> path = solpath.search(model, batches, config, progress=False)
        >>> path.history.shape
        torch.Size([2, 4])
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
        check_seed(self.seed)
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
        """Return the settings as plain values, for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class InclusionConfig:
    """Settings of the differential inclusion of the SPP paper (ICLR 2025, arXiv 2501.03289).

    The pull is constant and the masks are continuous. A split linearised Bregman iteration with a
    diagonal preconditioner solves it; docs/method.md, "The paper's inclusion", defines M, Γ and V.

    Attributes:
        steps: Iterations, one batch each. At least 2.
        seed: Seeds the noise of the one-shot scale and a shuffling `DataLoader`.
        nu: Inverse of the coupling between the mask M and its sparse copy Γ. None takes 0.2
            divided by the median of the positive entries of the one-shot scale.
        kappa: Inverse of the ridge on the sparse copy, in [0, 1e6].
        lam: Threshold that V crosses when a unit enters. None takes ``step_size * steps / 4``,
            which a mask that stays 1 crosses after a quarter of the steps.
        step_size: Share of the way to its stationary point that the mask moves in a step, in
            [0.0001, 1].
        scale_batches: Batches on which the one-shot scale is measured. At least 1.

    Raises:
        ConfigError: A setting has the wrong type or is out of its range. The message names it.

    Example:
        >>> config = solpath.InclusionConfig(steps=4)
        >>> solpath.search(model, batches, config, progress=False).method
        'inclusion'
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
        check_seed(self.seed)
        check_count("scale_batches", self.scale_batches, 1)
        check_number("kappa", self.kappa, 0, 1e6)
        check_number("step_size", self.step_size, 1e-4, 1)
        if self.nu is not None:
            check_number("nu", self.nu, 1e-12, 1e12)
        if self.lam is not None:
            check_number("lam", self.lam, 1e-6, 1e12)

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as plain values, for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class TuneConfig:
    """Settings of tuning, which trains a member to give the outputs of the dense model.

    The optimizer is AdamW; the learning rate warms up and then follows one schedule.

    Attributes:
        steps: Updates, one batch each. At least 1.
        seed: Seeds the initial adapters and a shuffling `DataLoader`.
        learning_rate: Peak of the learning rate. None takes 0.1 times the root of the held-out
            loss before the first step, divided by the median number of inputs of the trained
            matrices, but at most 1e-3; for adapters it takes ten times that. One update at that
            rate is tried first. If it adds more than twice the distance to the dense model, or
            more than a tenth of a loss of your own, half the rate is tried, and so on, ten times
            at most; in a run of fewer than 1000 steps less is allowed, in proportion. A try counts
            as a step, and is taken back if it is worse than the start. If a loss is NaN or
            infinite later on, tuning goes on from the best weights at half the rate.
        warmup: Share of `steps` in which the learning rate grows from 0 to its peak, in [0, 1].
        schedule: What follows the warmup: ``"cosine"`` or ``"linear"`` decay to 0, or
            ``"constant"``.
        weight_decay: Decay of weight matrices, in [0, 1000]. Biases and norms do not decay.
        max_grad_norm: Norm to which longer gradients are scaled down.
        evaluate_every: Steps between evaluations on the held-out batches. At least 1.
        patience: Evaluations without a new best after which tuning stops early; at the default
            rate those that are worse than the start do not count. None never stops early.
        lora_rank: Rank of low-rank adapters, which are trained in place of the weights and then
            merged. None trains all weights.
        lora_alpha: The product of the adapters is scaled by ``lora_alpha / lora_rank``.
        mixed_precision: ``"no"``, or ``"bf16"`` to run under autocast. The weights keep their
            dtype either way.

    Raises:
        ConfigError: A setting has the wrong type or is out of its range. The message names it.

    Example:
        >>> solpath.TuneConfig(schedule="step")
        Traceback (most recent call last):
            ...
        solpath.errors.ConfigError: schedule must be one of cosine, linear, constant; got 'step'.
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
        check_seed(self.seed)
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
        """Return the settings as plain values, for JSON."""
        return asdict(self)
