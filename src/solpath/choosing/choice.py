"""What a choice is: the member that was chosen, every size that was tested, and the promise."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import nn

from solpath.config import check_number
from solpath.errors import ConfigError
from solpath.planning.plan import Plan


@dataclass(frozen=True)
class SizeTest:
    """One size that was tested.

    Attributes:
        sparsity: The sparsity that was asked for.
        params: Parameters of the member.
        mean: Mean loss of the samples.
        bound: Upper confidence bound of the expected loss.
        passed: Whether the bound is at most the largest loss that was allowed.
    """

    sparsity: float
    params: int
    mean: float
    bound: float
    passed: bool


@dataclass(frozen=True, eq=False)
class Choice:
    """The smallest member whose loss is bounded, and what the bound stands on.

    Attributes:
        plan: The plan of the chosen member; None if not even the largest one passed.
        model: The chosen member, compensated if that was asked for; if none passed, the dense model
            itself.
        max_loss: The largest expected loss that was allowed.
        confidence: Probability, at least, with which a choice keeps the promise.
        metric: ``"accuracy"`` or ``"divergence"``.
        samples: Number of samples that judged.
        groups: Number of groups that they are from; None if each is a draw of its own.
        tests: The sizes that were tested, from the largest member down to the first that failed.
        assumptions: What the promise stands on, in sentences.
        compensated: Whether the members that were tested are compensated.
        provenance: Where the figures come from, see `solpath.running.provenance.provenance`.
    """

    plan: Plan | None
    model: nn.Module
    max_loss: float
    confidence: float
    metric: str
    samples: int
    tests: tuple[SizeTest, ...]
    assumptions: tuple[str, ...]
    provenance: Mapping[str, Any] = field(default_factory=dict)
    compensated: bool = False
    groups: int | None = None

    @property
    def sparsity(self) -> float:
        """The sparsity of the chosen size; 0 for the dense model."""
        return max((test.sparsity for test in self.tests if test.passed), default=0.0)

    def samples_needed(self, max_loss: float, *, sparsity: float | None = None) -> int:
        """Return about how many samples, or groups, it takes to promise another largest loss.

        If the mean loss and the spread stay as they are, the distance of the bound from the mean
        falls with the root of the number of samples. Near the limit chance decides: with these many
        samples about every second choice passes. They must be new samples, for a new choice.

        Args:
            max_loss: The largest expected loss to promise.
            sparsity: The size, as it was tested. None takes the chosen one, or the first that was
                tested if none passed.

        Raises:
            ConfigError: `max_loss` is no number, this size was not tested, or no number of samples
                will do, because the mean loss that was seen is not below `max_loss`.
        """
        check_number("max_loss", max_loss, -math.inf, math.inf)
        known = {test.sparsity: test for test in self.tests}
        asked = (self.sparsity or min(known)) if sparsity is None else sparsity
        if asked not in known:
            raise ConfigError(
                f"sparsity {asked!r} was not tested; these were: {', '.join(map(str, known))}."
            )
        test = known[asked]
        if test.mean >= max_loss:
            raise ConfigError(
                f"max_loss: the mean loss at sparsity {asked:g} was {test.mean:.4g}, so no number "
                f"of samples is likely to show that it is at most {max_loss:g}."
            )
        draws = self.samples if self.groups is None else self.groups
        return max(1, math.ceil(draws * ((test.bound - test.mean) / (max_loss - test.mean)) ** 2))

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON: the plan as its summary, and no model."""
        return {
            "sparsity": self.sparsity,
            "plan": None if self.plan is None else self.plan.to_dict(),
            "max_loss": self.max_loss,
            "confidence": self.confidence,
            "metric": self.metric,
            "samples": self.samples,
            "groups": self.groups,
            "tests": [asdict(test) for test in self.tests],
            "assumptions": list(self.assumptions),
            "provenance": dict(self.provenance),
            "compensated": self.compensated,
        }

    def __repr__(self) -> str:
        """The promise in a sentence, and a row for every size that was tested."""
        groups = "" if self.groups is None else f" of {self.groups:,} groups"
        size = "the dense model: no size passed" if self.plan is None else f"{self.sparsity:g}"
        lines = [
            f"Choice(sparsity {size}; expected loss of {self.metric} at most {self.max_loss:g} "
            f"with {self.confidence} confidence, by {self.samples:,} samples{groups})",
            f"{'sparsity':>8}  {'parameters':>14}  {'mean loss':>9}  {'bound':>8}",
        ]
        lines += [
            f"{test.sparsity:>8g}  {test.params:>14,}  {test.mean:>9.5f}  {test.bound:>8.5f}  "
            f"{'passed' if test.passed else 'failed'}"
            for test in self.tests
        ]
        last = self.tests[-1]
        if not last.passed and last.mean < self.max_loss:
            more = self.samples_needed(self.max_loss, sparsity=last.sparsity)
            unit = "samples" if self.groups is None else "groups"
            lines.append(f"about {more:,} {unit} would do for {last.sparsity:g} at this mean loss")
        return "\n".join(lines)
