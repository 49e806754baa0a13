"""Compare an exported model with the model that it was made from."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from solpath.errors import BatchError, ExportError
from solpath.exporting.formats import Outputs, Runner
from solpath.running.forward import Batch, output_mask, run
from solpath.running.provenance import version_of

_TOKENS = 16  # of a random text
_IDS = ("input_ids", "decoder_input_ids")


@dataclass(frozen=True)
class Parity:
    """How far an exported model is from the original on one batch.

    Attributes:
        inputs: What it ran on: ``"random"`` or ``"given"``.
        output: Name of the output.
        difference: Largest absolute difference, over the largest absolute value of the output.
        tolerance: What was allowed.
    """

    inputs: str
    output: str
    difference: float
    tolerance: float


def check_parity(
    model: nn.Module, runner: Runner, batches: Mapping[str, Batch], tolerance: float
) -> list[Parity]:
    """Run both models on every batch and compare all outputs that the exported one gives.

    Outputs of padding, which mean nothing, must be finite and are not compared.

    Args:
        model: The original, in eval mode. It is left untouched.
        runner: Runs the exported model.
        batches: What they run on, by name.
        tolerance: The largest difference allowed, as in `Parity`.

    Raises:
        ExportError: It cannot be run, or an output is missing, of another shape, not finite, or
            differs by more.

    Example:
        >>> runner = lambda batch: {"logits": model(**batch).logits}
        >>> [row.difference for row in check_parity(model, runner, {"given": batch}, 1e-5)]
        [0.0]
    """
    rows = []
    for name, batch in batches.items():
        with torch.no_grad():
            expected = outputs_of(run(model, batch, labels=False))
            try:
                found = runner(batch)
            except Exception as error:
                raise ExportError(f"the exported model fails on {name} inputs: {error}") from error
        if not found:
            raise ExportError(f"the exported model gives no outputs on {name} inputs.")
        for output, value in found.items():
            if output not in expected:
                known = ", ".join(expected)
                raise ExportError(f"the exported model gives {output!r}, the original {known}.")
            counted = output_mask(batch, expected[output])
            difference = _difference(expected[output], value, counted)
            rows.append(Parity(name, output, difference, tolerance))
            if not rows[-1].difference <= tolerance:
                raise ExportError(
                    f"{output} of the exported model differs by {rows[-1].difference:.1e} of its "
                    f"largest value on {name} inputs, {tolerance:.0e} is allowed; nothing is "
                    "written."
                )
    return rows


def runner_of(model: nn.Module) -> Runner:
    """Return what runs a model of transformers that was loaded from an exported folder.

    Args:
        model: The model, in eval mode.
    """

    def runner(batch: Batch) -> Outputs:
        with torch.no_grad():
            return outputs_of(run(model, batch, labels=False))

    return runner


def transformers_runtime() -> str:
    """Return the name of what `runner_of` runs in."""
    return f"transformers {version_of('transformers')} on a CPU"


def outputs_of(outputs: Any) -> dict[str, Tensor]:
    """Return the tensors of what a model returned, by name, without caches and None.

    Args:
        outputs: A ``ModelOutput`` or another mapping of names to values.
    """
    return {
        name: value.detach().float().cpu()
        for name, value in outputs.items()
        if isinstance(value, Tensor)
    }


def _difference(expected: Tensor, found: Tensor, counted: Tensor | None) -> float:
    if expected.shape != found.shape:
        shapes = f"{tuple(found.shape)}, not {tuple(expected.shape)}"
        raise ExportError(f"an output of the exported model has the shape {shapes}.")
    if not found.isfinite().all():
        return float("inf")
    if counted is not None:
        expected, found = expected[counted], found[counted]
    scale = expected.abs().max().clamp(min=1e-30)
    return float((found.float() - expected).abs().max() / scale)


def random_batch(model: nn.Module, seed: int = 0, samples: int = 2) -> Batch:
    """Return random inputs that a model of transformers takes, by its main input and its config.

    Args:
        model: The model.
        seed: Seeds the values.
        samples: Number of samples.

    Returns:
        A dict of tensors on the CPU.

    Raises:
        BatchError: Its kind of input is not known; a batch must be given.

    Example:
        >>> random_batch(model)["input_ids"].shape
        torch.Size([2, 16])
    """
    config: Any = getattr(model, "config", None)
    main: Any = getattr(model, "main_input_name", None)
    generator = torch.Generator().manual_seed(seed)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    vision: Any = getattr(config, "vision_config", config)
    shapes: dict[str, tuple[int, ...]] = {}
    if main == "pixel_values" or hasattr(config, "vision_config"):
        size = getattr(vision, "image_size", 0)
        height, width = (size, size) if isinstance(size, int) else size
        shapes["pixel_values"] = (samples, getattr(vision, "num_channels", 3), height, width)
    if main == "input_features":
        length = 2 * config.max_source_positions
        shapes["input_features"] = (samples, config.num_mel_bins, length)
    if main == "input_values":
        shapes["input_values"] = (samples, 16000)
    if main == "input_ids":
        shapes["input_ids"] = (samples, _TOKENS)
    if getattr(config, "is_encoder_decoder", False):
        shapes["decoder_input_ids"] = (samples, _TOKENS)
    if not shapes or any(0 in shape for shape in shapes.values()):
        raise BatchError(f"what {type(model).__name__} takes is not known; give batch=.")
    return {
        name: torch.randint(text.vocab_size, shape, generator=generator)
        if name in _IDS
        else torch.randn(shape, generator=generator)
        for name, shape in shapes.items()
    }
