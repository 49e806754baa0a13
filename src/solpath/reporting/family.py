"""A family of models as one typed value, and `family.json`, which holds it.

`make_family` and the demo write the file and the report reads it. What they may rely on is stated
here once.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from solpath.errors import FileError
from solpath.files import json_bytes, write_file
from solpath.holding import FAMILY_FILE, check_holds
from solpath.planning.path import SolutionPath
from solpath.reading import check_format, read_json
from solpath.reporting.plain import LARGEST, built, is_number, plain

FORMAT, FORMAT_VERSION = "solpath.family", 3
FILE = FAMILY_FILE
"""The name of the file, in the folder of the family."""


@dataclass(frozen=True)
class DenseModel:
    """The dense model of a family.

    Attributes:
        name: The name that the report shows.
        architecture: The name of its class.
        sha256: The SHA-256 of its weight file in hexadecimal; None if it is not one file.
        units: The number of units.
        prunable: The number of prunable parameters; None if it was not recorded.
    """

    name: str
    architecture: str = field(metadata={"key": "class"})
    sha256: str | None
    units: int
    prunable: int | None = None


@dataclass(frozen=True)
class SearchRun:
    """The search that a family comes from. What is not known of it is None.

    Attributes:
        method: The name of the method.
        seconds: The seconds that the search took.
        steps: The steps of the search.
        seed: The seed of the search.
        compensation_seconds: The seconds that compensating all members took; None if they are not
            compensated.
        text: A description of what was searched on.
    """

    method: str
    seconds: float | None
    steps: int | None
    seed: int | None
    compensation_seconds: float | None
    text: str


@dataclass(frozen=True)
class Metric:
    """One way to say how good a model is.

    Attributes:
        key: Its name in every point and member.
        title: The name that the report shows.
        lower: Whether lower values are better.
    """

    key: str
    title: str
    lower: bool


@dataclass(frozen=True)
class Judged:
    """What members are judged on.

    Attributes:
        text: A description, such as ``"held-out pairs of docstrings"``.
        samples: The number of samples.
    """

    text: str
    samples: int


@dataclass(frozen=True)
class Point:
    """The quality of one method at one size.

    Attributes:
        sparsity: The sparsity that was asked for.
        metrics: Name of every metric to its value.
    """

    sparsity: float
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class MethodRun:
    """One method that orders units, and its quality at every size.

    Attributes:
        name: The name of the method.
        seconds: The seconds that its order took, and its compensation if there was one; None if
            that is not known.
        points: The quality at every size.
    """

    name: str
    seconds: float | None
    points: tuple[Point, ...]


@dataclass(frozen=True)
class Member:
    """One model of the family: what it costs, how good it is, and how wide it is.

    Attributes:
        name: ``"dense"``, or the name of its size.
        folder: The folder of the saved model, relative to that of the family; None for the dense
            model.
        sparsity: The share of the prunable parameters that was removed.
        params, macs: See `solpath.measuring.measurement.Measurement`.
        bytes: The bytes of the weights on disk.
        params_share, macs_share: `params` and `macs` as a share of those of the dense model.
        cache: The bytes of the key-value cache per generated token; 0 where there is no cache.
        latency_ms: The median time of one forward pass, in milliseconds.
        latency_iqr_ms: The interquartile range of that time, in milliseconds.
        metrics: Name of every metric to its value.
        intervals: Name of a metric to the ends of its 95 % confidence interval, where it has one.
        widths: Pair name to the number of units that each head keeps.
    """

    name: str
    folder: str | None
    sparsity: float
    params: int
    params_share: float
    macs: int
    macs_share: float
    bytes: int
    cache: int
    latency_ms: float
    latency_iqr_ms: float
    metrics: Mapping[str, float]
    intervals: Mapping[str, Sequence[float]]
    widths: Mapping[str, int]


@dataclass(frozen=True)
class Timing:
    """What latencies were measured on.

    Attributes:
        samples: The number of samples in the batch.
        tokens: The number of tokens per sample; None for what is not text.
        repeats: The number of timed passes.
    """

    samples: int
    tokens: int | None
    repeats: int


@dataclass(frozen=True)
class Line:
    """What one model wrote after a prompt.

    Attributes:
        name: The name of the model.
        text: The text, without the prompt.
        tokens: The number of its tokens.
        agreed: How many tokens at its beginning are those of the dense model.
    """

    name: str
    text: str
    tokens: int
    agreed: int


@dataclass(frozen=True)
class Continuation:
    """What all models of a family wrote after one prompt.

    Attributes:
        prompt: The prompt.
        lines: One line per model, the dense model first.
    """

    prompt: str
    lines: tuple[Line, ...]


@dataclass(frozen=True)
class Stage:
    """What one stage of making a family took.

    Attributes:
        name: The name of the stage.
        seconds: The seconds that passed.
        cpu_seconds: The seconds that processors worked, over all threads.
        peak_memory: The most bytes of memory that the process had held by the end of the stage;
            None if the system does not tell.
    """

    name: str
    seconds: float
    cpu_seconds: float
    peak_memory: int | None


@dataclass(frozen=True)
class Promise:
    """The size that was chosen, and what may be relied on.

    Attributes:
        sparsity: The share of the prunable parameters that is removed.
        metric: The name of the loss.
        max_loss: What the true loss is at most, with that confidence.
        confidence: The probability that such a promise holds.
        samples: The number of held-out samples that it rests on.
        mean: The loss on them.
        bound: The upper confidence bound of the true loss.
        compensated: Whether the members that were tested are compensated; None if it is not known.
        groups: The number of groups that the samples are from; None if each is a draw of its own.
    """

    sparsity: float
    metric: str
    max_loss: float
    confidence: float
    samples: int
    mean: float
    bound: float
    compensated: bool | None = None
    groups: int | None = None


@dataclass(frozen=True)
class Family:
    """Everything that a report shows.

    Attributes:
        model: The dense model.
        search: The search that gave the order.
        metrics: The metrics of every point and member, the main one first.
        judged: What members are judged on.
        methods: The search and the methods that it is compared with.
        members: The dense model first, then the members by ascending sparsity.
        measured: What latencies were measured on.
        provenance: See `solpath.running.provenance`.
        continuations: What the models wrote after some prompts; None for models that write nothing.
        stages: What every stage took, in order; None if it was not recorded.
        promise: The size that was chosen; None if none was.
        target: The runtime that all members are cut for, see `SolutionPath.plan`; None if for none.
    """

    model: DenseModel
    search: SearchRun
    metrics: tuple[Metric, ...]
    judged: Judged
    methods: tuple[MethodRun, ...]
    members: tuple[Member, ...]
    measured: Timing
    provenance: Mapping[str, Any]
    continuations: tuple[Continuation, ...] | None = None
    stages: tuple[Stage, ...] | None = None
    promise: Promise | None = None
    target: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return what `family.json` holds."""
        return {"format": FORMAT, "version": FORMAT_VERSION, **plain(self)}

    def write(self, folder: Path) -> None:
        """Write `family.json` atomically. Raise `FileError` if it cannot be written."""
        write_file(folder / FILE, json_bytes(self.to_dict()))

    @classmethod
    def read(cls, folder: Path) -> "Family":
        """Read `family.json` and check every field.

        Raises:
            FileError: The file is missing or damaged, or a field is missing or wrong. The message
                names the file and the field.
        """
        check_holds(folder, FILE, "give the folder that family or demo wrote")
        file = folder / FILE
        value = read_json(file)
        check_format(file, value, FORMAT, FORMAT_VERSION)
        family = built(cls, file, "", value)
        if type(family.provenance.get("threads")) is not int:
            raise FileError(f"{file}: provenance.threads is not a number.")
        dense = family.members[0]
        for name in ("params", "macs", "bytes", "latency_ms"):  # the report divides by them
            if not getattr(dense, name) > 1 / LARGEST:
                raise FileError(f"{file}: members[0].{name} must be positive.")
        keys = [metric.key for metric in family.metrics]
        for i, metric in enumerate(family.metrics):
            if not metric.title:
                raise FileError(f"{file}: metrics[{i}].title is empty.")
        if family.promise is not None:
            _check_sparsity(file, "promise", family.promise.sparsity)
        for i, member in enumerate(family.members):
            _check_sparsity(file, f"members[{i}]", member.sparsity)
            _check_metrics(file, f"members[{i}]", member.metrics, keys)
            _check_intervals(file, f"members[{i}].intervals", member.intervals)
        for i, run in enumerate(family.methods):
            for j, point in enumerate(run.points):
                _check_sparsity(file, f"methods[{i}].points[{j}]", point.sparsity)
                _check_metrics(file, f"methods[{i}].points[{j}]", point.metrics, keys)
        return family

    def check_widths(self, folder: Path, path: SolutionPath) -> None:
        """Raise `FileError` unless every member has a possible width for every pair of the path."""
        for i, member in enumerate(self.members):
            for pair in path.pairs:
                width = member.widths.get(pair.name)
                if type(width) is not int or not 0 <= width <= pair.width:
                    raise FileError(
                        f"{folder / FILE}: members[{i}].widths[{pair.name!r}] is {width!r}, "
                        f"expected an integer in 0..{pair.width}."
                    )


def _check_sparsity(file: Path, where: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise FileError(f"{file}: {where}.sparsity is {value!r}, not a share.")


def _check_metrics(file: Path, where: str, found: Mapping[str, Any], keys: Sequence[str]) -> None:
    for key in keys:
        if not is_number(found.get(key)):
            raise FileError(f"{file}: {where}.metrics.{key} is {found.get(key)!r}, not a number.")


def _check_intervals(file: Path, where: str, found: Mapping[str, Any]) -> None:
    for name, ends in found.items():
        if not isinstance(ends, list) or [is_number(end) for end in ends] != [True] * 2:
            raise FileError(f"{file}: {where}.{name} is {ends!r}, expected two numbers.")
