"""Write a model for another runtime, and run it there before it is called done."""

import inspect
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from solpath.errors import ConfigError
from solpath.exporting import gguf, hub, onnx, openvino, stock
from solpath.exporting.card import model_card
from solpath.exporting.facts import check_evaluation, facts_of
from solpath.exporting.formats import Format
from solpath.exporting.origin import origin_of
from solpath.exporting.parity import Parity, check_parity, random_batch
from solpath.files import check_output, json_bytes, new_folder
from solpath.measuring.evaluation import Result
from solpath.model.plain import check_floats
from solpath.planning.plan import plan_of
from solpath.running.claims import claimed
from solpath.running.forward import Batch
from solpath.running.modes import contained, evaluating
from solpath.running.provenance import provenance

FORMATS: dict[str, Format] = {
    format.name: format
    for format in (stock.FORMAT, hub.FORMAT, onnx.FORMAT, openvino.FORMAT, gguf.FORMAT)
}
"""Name to format; see `export`."""

RECORD = "solpath_export.json"
"""File of an exported folder: where it came from, and how near it was."""


@dataclass(frozen=True)
class Exported:
    """What `export` has written.

    Attributes:
        folder: The folder.
        format: Name of the format.
        parity: How far the exported model was from the original, on every output and batch.
        bytes: Size of all files.
        command: A line that runs the result.
    """

    folder: Path
    format: str
    parity: tuple[Parity, ...]
    bytes: int
    command: str


@contained
def export(
    model: nn.Module,
    folder: str | os.PathLike[str],
    format: str,
    *,
    batch: Batch | None = None,
    evaluation: Result | None = None,
    overwrite: bool = False,
    **options: Any,
) -> Exported:
    """Write a model for another runtime. The folder appears whole or not at all.

    The exported model is run beside `model`, on random inputs and on `batch`, before the folder
    appears. A model card in it says what was cut, how it is loaded, how near it was, and what is
    known of the dense model: its name on the Hub and its licence.

    Args:
        model: A model from `extract`, or a dense one, in float32 on the CPU. It is left untouched.
        folder: A folder that is new or empty. With `overwrite` it may also be one that solpath
            wrote, all of which is replaced.
        format: The name of a format in `FORMATS`.
        batch: A real batch: keyword arguments of the model. None checks on random inputs alone.
        evaluation: What `evaluate` found of `model`, for the model card. That it is of a model of
            the same sizes is checked; more of its model a result does not say.
        overwrite: Whether to replace the folder. If the export fails, the folder is left untouched.
        options: What the format takes beside; see docs/runtimes.md.

    Returns:
        What was written, and how near it is.

    Raises:
        ConfigError: The format or an option is unknown, the runtime is not installed, or
            `evaluation` is of a model of other sizes.
        ExportError: The format cannot hold the model, or the exported model gives other outputs.
        FileError: The folder is not empty, was not written by solpath or cannot be written.
        UnsupportedModelError: The model is quantised, and the format does not hold that.
        BatchError: There is no `batch`, and what the model takes is not known.
        ModelInUseError: The model is masked or searched, or another thread works on it.

    Example:
        >>> exported = solpath.export(small, "half-stock", "stock", pad=True)
        >>> sorted(file.name for file in exported.folder.iterdir())
        ['README.md', 'config.json', 'model.safetensors', 'solpath_export.json']
        >>> max(row.difference for row in exported.parity) < 1e-5
        True
    """
    known = options_of(format)
    if unknown := [name for name in options if name not in known]:
        takes = f"takes {', '.join(known)}" if known else "has no options"
        raise ConfigError(f"the format {format!r} {takes}, not {unknown[0]!r}.")
    tokenizer = options.get("tokenizer")
    if tokenizer is not None and not callable(getattr(tokenizer, "save_pretrained", None)):
        raise ConfigError(f"tokenizer has no save_pretrained: {tokenizer!r}.")
    chosen = FORMATS[format]
    check_evaluation(model, evaluation)
    check_output(folder, overwrite=overwrite, marks=(RECORD,))
    if not chosen.quantised:
        able = ", ".join(name for name, other in FORMATS.items() if other.quantised)
        check_floats(model, f"export to {chosen.name} before quantising, or to {able}")
    chosen.check(model)
    batches = {"random": random_batch(model)} if batch is None else {}
    if batch is not None:
        batches = {"random": _random_like(model, batch), "given": batch}
    with (
        claimed(model, doing="exported"),
        evaluating(model),
        new_folder(folder, overwrite=overwrite, marks=(RECORD,)) as temporary,
    ):
        counted = chosen.write(model, temporary, batches["random"], **options)
        runs = chosen.batches(model, batches)
        tolerance = chosen.tolerances.get(options.get("quantization", ""), chosen.tolerance)
        parity = check_parity(model, chosen.open(temporary), runs, tolerance)
        for name, (runner, allowed) in chosen.variants(temporary).items():
            rows = check_parity(model, runner, runs, allowed)
            parity += [replace(row, inputs=f"{row.inputs}, {name}") for row in rows]
        line = chosen.command
        line = line if isinstance(line, str) else line(model, temporary)
        command = line.format(folder=os.fspath(folder))
        origin = origin_of(model)
        facts = facts_of(model, chosen, temporary, origin, parity, counted, evaluation)
        (temporary / "README.md").write_text(model_card(facts), encoding="utf-8")
        record = _record(model, chosen, parity, options, command)
        record["origin"] = asdict(origin)
        record["evaluation"] = None if evaluation is None else evaluation.to_dict()
        (temporary / RECORD).write_bytes(json_bytes(record))
        size = sum(file.stat().st_size for file in temporary.rglob("*") if file.is_file())
    return Exported(Path(folder), format, tuple(parity), size, command)


def options_of(format: str) -> tuple[str, ...]:
    """Return the names of the options that a format takes.

    Args:
        format: Its name.

    Raises:
        ConfigError: There is no such format.

    Example:
        >>> options_of("gguf")
        ('quantization', 'tokenizer')
    """
    if format not in FORMATS:
        raise ConfigError(f"format must be one of {', '.join(FORMATS)}, got {format!r}.")
    return tuple(inspect.signature(FORMATS[format].write).parameters)[3:]


def _random_like(model: nn.Module, batch: Batch) -> Batch:
    """Return random inputs of the names, shapes and dtypes of a batch.

    Masks stay as they are, and so do tokens that stand for parts of an image or a sound.
    """
    config: Any = getattr(model, "config", None)
    generator = torch.Generator().manual_seed(0)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config

    places = torch.tensor(_stand_ins(config), dtype=torch.int64)

    def drawn(name: str, value: torch.Tensor) -> torch.Tensor:
        if name in ("input_ids", "decoder_input_ids"):
            ids = torch.randint(text.vocab_size, value.shape, generator=generator)
            return torch.where(torch.isin(ids, places) | torch.isin(value, places), value, ids)
        if value.is_floating_point():
            return torch.randn(value.shape, generator=generator).to(value.dtype)
        return value

    return {name: drawn(name, value) for name, value in batch.items() if name != "labels"}


def _stand_ins(config: Any) -> list[int]:
    """Return the tokens that stand for parts of an image, a video or a sound in a text."""
    return [
        value
        for name, value in vars(config).items()
        if name.endswith(("_token_id", "_token_index"))
        and name.startswith(("image", "video", "vision", "audio", "boi", "eoi"))
        and isinstance(value, int)
    ]


def _record(
    model: nn.Module,
    format: Format,
    parity: list[Parity],
    options: Mapping[str, Any],
    command: str,
) -> dict[str, Any]:
    plan = plan_of(model)
    return {
        "format": format.name,
        "class": type(model).__name__,
        "runtime": format.runtime(),
        "options": {name: _plain(value) for name, value in options.items()},
        "command": command,
        "parity": [asdict(row) for row in parity],
        "plan": None if plan is None else {"asked": plan.asked, **plan.achieved.to_dict()},
        "provenance": provenance(),
    }


def _plain(value: Any) -> Any:
    """Return an option as JSON can say it: of an object, only its class."""
    simple = value is None or isinstance(value, bool | int | float | str | list | dict)
    return value if simple else type(value).__name__
