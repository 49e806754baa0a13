"""A family of models as one typed value, and `family.json`, which holds it.

The demo writes the file and the report reads it. What both may rely on is stated here once.
"""

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from solpath.errors import FileError
from solpath.files import json_bytes, write_file
from solpath.planning.path import SolutionPath
from solpath.reading import check_format, read_json

FORMAT, FORMAT_VERSION = "solpath.family", 2
FILE = "family.json"
"""The name of the file, in the folder of the family."""

Part = TypeVar("Part")


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
    """The search that a family comes from.

    Attributes:
        method: The name of the method.
        seconds: The seconds that the search took.
        steps: The steps of the search.
        seed: The seed of the search.
        compensation_seconds: The seconds that compensating all members took.
        text: A description of the text that was searched on.
    """

    method: str
    seconds: float
    steps: int
    seed: int
    compensation_seconds: float
    text: str


@dataclass(frozen=True)
class Task:
    """What members are scored on.

    Attributes:
        name: The name of the score.
        pairs: The number of held-out text pairs.
    """

    name: str
    pairs: int


@dataclass(frozen=True)
class Point:
    """The quality of one method at one size.

    Attributes:
        sparsity: The sparsity that was asked for.
        cosine: The mean cosine over the held-out texts to the embeddings of the dense model.
        retrieval: The accuracy of the task.
    """

    sparsity: float
    cosine: float
    retrieval: float


@dataclass(frozen=True)
class MethodRun:
    """One method that orders units, and its quality at every size.

    Attributes:
        name: The name of the method.
        seconds: The seconds that its order took, and its compensation if there was one.
        points: The quality at every size.
    """

    name: str
    seconds: float
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
        latency_ms: The median time of one forward pass, in milliseconds.
        latency_iqr_ms: The interquartile range of that time, in milliseconds.
        cosine: The mean cosine over the held-out texts to the embeddings of the dense model.
        retrieval: The accuracy of the task.
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
    latency_ms: float
    latency_iqr_ms: float
    cosine: float
    retrieval: float
    widths: Mapping[str, int]


@dataclass(frozen=True)
class Timing:
    """What latencies were measured on.

    Attributes:
        samples: The number of samples in the batch.
        tokens: The number of tokens per sample.
        repeats: The number of timed passes.
    """

    samples: int
    tokens: int
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
class Family:
    """Everything that a report shows.

    Attributes:
        model: The dense model.
        search: The search that gave the order.
        task: What members are scored on.
        methods: The search and the methods that it is compared with.
        members: The dense model first, then the members by ascending sparsity.
        measured: What latencies were measured on.
        provenance: See `solpath.running.provenance`.
        continuations: What the models wrote after some prompts; None for models that write nothing.
        stages: What every stage took, in order; None if it was not recorded.
    """

    model: DenseModel
    search: SearchRun
    task: Task
    methods: tuple[MethodRun, ...]
    members: tuple[Member, ...]
    measured: Timing
    provenance: Mapping[str, Any]
    continuations: tuple[Continuation, ...] | None = None
    stages: tuple[Stage, ...] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return what `family.json` holds."""
        return {"format": FORMAT, "version": FORMAT_VERSION, **_plain(self)}

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
        file = folder / FILE
        value = read_json(file)
        check_format(file, value, FORMAT, FORMAT_VERSION)
        family = _built(cls, file, "", value)
        if type(family.provenance.get("threads")) is not int:
            raise FileError(f"{file}: provenance.threads is not a number.")
        dense = family.members[0]
        for name in ("bytes", "latency_ms"):  # the report divides by them
            if not getattr(dense, name) > 0:
                raise FileError(f"{file}: members[0].{name} must be positive.")
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


def _plain(value: Any) -> Any:
    """Return a dataclass, and everything in it, as plain values."""
    if is_dataclass(value):
        return {_key(part): _plain(getattr(value, part.name)) for part in fields(value)}
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return dict(value) if isinstance(value, Mapping) else value


def _key(part: Any) -> str:
    key: str = part.metadata.get("key", part.name)
    return key


def _built(kind: type[Part], file: Path, where: str, value: Any) -> Part:
    """Build the dataclass `kind` from plain values, checked against the types of its fields."""
    if not isinstance(value, dict):
        raise FileError(f"{file}: {where} is missing or not an object.")
    hints, parts = get_type_hints(kind), {}
    for part in fields(kind):  # type: ignore[arg-type]
        key = _key(part)
        if key in value or part.default is MISSING:
            place = f"{where}.{key}" if where else key
            parts[part.name] = _checked(hints[part.name], file, place, value.get(key))
    return kind(**parts)


def _checked(hint: Any, file: Path, where: str, value: Any) -> Any:
    """Return `value` as the type `hint`. Raise `FileError` if it is something else."""
    options: Sequence[Any] = get_args(hint) if isinstance(hint, UnionType) else (hint,)
    if value is None and NoneType in options:
        return None
    [kind] = [option for option in options if option is not NoneType]
    if is_dataclass(kind):
        return _built(kind, file, where, value)  # type: ignore[arg-type]
    if get_origin(kind) is tuple:
        if not isinstance(value, list) or not value:
            raise FileError(f"{file}: {where} is missing, empty or not a list.")
        item = get_args(kind)[0]
        return tuple(_checked(item, file, f"{where}[{i}]", v) for i, v in enumerate(value))
    if kind is str:
        if not isinstance(value, str):
            raise FileError(f"{file}: {where} is missing or not text.")
    elif kind in (int, float):
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise FileError(f"{file}: {where} is {value!r}, expected a number.")
    elif not isinstance(value, dict):
        raise FileError(f"{file}: {where} is missing or not an object.")
    return value
