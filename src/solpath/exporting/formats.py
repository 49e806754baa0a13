"""What a format of another runtime is: what it can hold, how it is written, and how it is run."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor, nn

from solpath.running.forward import Batch

Outputs = Mapping[str, Tensor]
"""Names of a model's outputs to their values, in float32 on the CPU."""

Runner = Callable[[Batch], Outputs]
"""Runs a written folder on a batch, as its runtime would."""


@dataclass(frozen=True)
class Counted:
    """Sizes of what was written, where they are not those of the plan.

    Attributes:
        sizes: What was counted, to the number in the dense model and in what was written.
        padded: What was counted, to how much of it is zeros that fill layers up.
    """

    sizes: Mapping[str, tuple[int, int]]
    padded: Mapping[str, int]


@dataclass(frozen=True)
class Load:
    """How a runtime loads a folder.

    Attributes:
        runtime: Its name, for people.
        code: Lines of Python in which ``folder`` is the folder, or of a shell that runs in it.
        language: The language of `code`.
    """

    runtime: str
    code: str
    language: str = "python"


Write = Callable[..., Counted | None]
"""Writes the files of a model into an empty folder: ``write(model, folder, batch, **options)``.

The model is in eval mode, on the CPU, and is left untouched. The batch is there to trace the model
with, if the format needs that. The options are those of the format. The sizes of what was written
are returned where they are not those of the plan.
"""


def _as_they_are(model: nn.Module, batches: Mapping[str, Batch]) -> Mapping[str, Batch]:
    return batches


def _no_variants(folder: Path) -> Mapping[str, tuple[Runner, float]]:
    return {}


@dataclass(frozen=True)
class Format:
    """A format in which a model can be written.

    Attributes:
        name: Its name, for `export`.
        title: What its folders are for, for people: ``"onnxruntime, as ONNX"``.
        library: The name of the library that loads them, as the Hub knows it.
        check: Raises `ExportError` if the format cannot hold the model exactly. The message names
            what is in the way and what can be done. It is called before anything is written.
        write: Writes the files.
        open: Opens a written folder in its runtime, or in the nearest reader there is.
        runtime: What `open` runs, for people: ``"onnxruntime 1.23 on a CPU"``.
        tolerance: Largest difference of an output allowed, over the largest size of that output.
        command: A line of Python or of a shell that runs the result, or what makes it of the model
            and what was written. ``{folder}`` is the folder.
        loads: Says how a written folder is loaded in every runtime that takes it and was tried.
        batches: Makes what the exported model is run on out of the random and the given batch: the
            same with more inputs, and others beside.
        variants: Opens other files of the folder that hold the model too, such as one in int8. A
            name to what runs it, and to a tolerance of its own.
        quantised: Whether it holds weights that torchao has quantised, as numbers of few bits.
        tolerances: Tolerances that the option ``quantization`` asks for, by its value.
    """

    name: str
    title: str
    library: str
    check: Callable[[nn.Module], None]
    write: Write
    open: Callable[[Path], Runner]
    runtime: Callable[[], str]
    tolerance: float
    command: str | Callable[[nn.Module, Path], str]
    loads: Callable[[nn.Module, Path], Sequence[Load]]
    batches: Callable[[nn.Module, Mapping[str, Batch]], Mapping[str, Batch]] = _as_they_are
    variants: Callable[[Path], Mapping[str, tuple[Runner, float]]] = _no_variants
    quantised: bool = False
    tolerances: Mapping[str, float] = field(default_factory=dict)
