"""What a format of another runtime is: what it can hold, how it is written, and how it is run."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor, nn

from solpath.running.forward import Batch

Outputs = Mapping[str, Tensor]
"""Names of a model's outputs to their values, in float32 on the CPU."""

Runner = Callable[[Batch], Outputs]
"""Runs a written folder on a batch, as its runtime would."""


Write = Callable[..., None]
"""Writes the files of a model into an empty folder: ``write(model, folder, batch, **options)``.

The model is in eval mode, on the CPU, and is left untouched. The batch is there to trace the model
with, if the format needs that. The options are those of the format.
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
        check: Raises `ExportError` if the format cannot hold the model exactly. The message names
            what is in the way and what can be done. It is called before anything is written.
        write: Writes the files.
        open: Opens a written folder in its runtime, or in the nearest reader there is.
        runtime: What `open` runs, for people: ``"onnxruntime 1.23 on a CPU"``.
        tolerance: Largest difference of an output allowed, over the largest size of that output.
        command: A line of Python or of a shell that runs the result. ``{folder}`` is the folder.
        batches: Makes what the exported model is run on out of the random and the given batch: the
            same with more inputs, and others beside.
        variants: Opens other files of the folder that hold the model too, such as one in int8. A
            name to what runs it, and to a tolerance of its own.
        whole_heads: Whether it holds attentions that have lost whole heads.
        quantised: Whether it holds weights that torchao has quantised, as numbers of few bits.
        tolerances: Tolerances that the option ``quantization`` asks for, by its value.
    """

    name: str
    check: Callable[[nn.Module], None]
    write: Write
    open: Callable[[Path], Runner]
    runtime: Callable[[], str]
    tolerance: float
    command: str
    batches: Callable[[nn.Module, Mapping[str, Batch]], Mapping[str, Batch]] = _as_they_are
    variants: Callable[[Path], Mapping[str, tuple[Runner, float]]] = _no_variants
    whole_heads: bool = False
    quantised: bool = False
    tolerances: Mapping[str, float] = field(default_factory=dict)
