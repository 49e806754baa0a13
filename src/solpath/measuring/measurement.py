"""Measure what a model costs: parameters, MACs, bytes, memory, latency, and generating text."""

import statistics
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from solpath.config import check_count
from solpath.data.preparation import preparing
from solpath.data.source import batch_size
from solpath.errors import ConfigError
from solpath.measuring.generation import Generation, check_generates, generations
from solpath.measuring.memory import bytes_on_disk
from solpath.measuring.timing import interquartile_range, latencies
from solpath.model.counting import count_macs
from solpath.model.plain import check_countable
from solpath.running.claims import claimed
from solpath.running.forward import device_of, run
from solpath.running.memory import peak_memory, resident_bytes
from solpath.running.modes import contained, inferring
from solpath.running.placement import check_whole
from solpath.wrapping import check_takes_batches, unwrapped


@dataclass(frozen=True)
class Measurement:
    """The cost of one model on one batch.

    Attributes:
        params: Number of parameters, a tied one once.
        macs: Multiply-accumulates for one sample, half its floating-point operations.
        bytes_on_disk: Size of the weights as one safetensors file, tied tensors once.
        peak_memory: Bytes alive at the peak of one forward pass, weights included.
        peak_memory_source: How the peak was taken.
        latency_ms: Median milliseconds of one forward pass of the whole batch.
        latency_iqr_ms: Interquartile range of these milliseconds.
        samples: Number of samples in the batch.
        repeats: Number of timed passes.
        generation: What generating text costs; None if it was not measured.
    """

    params: int
    macs: int
    bytes_on_disk: int
    peak_memory: int
    peak_memory_source: str
    latency_ms: float
    latency_iqr_ms: float
    samples: int
    repeats: int
    generation: Generation | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        return asdict(self)


@contained
def measure(
    models: Mapping[str, nn.Module],
    batch: Any,
    *,
    repeats: int = 20,
    generate: int | None = None,
) -> dict[str, Measurement]:
    """Measure several models side by side on one batch.

    After a warm-up, every round times each model once, and each round starts with another model. So
    a machine that slows down slows all models alike.

    With `generate`, decoders also generate that many tokens after the batch, greedily and past any
    end of text, so that all models do the same work: in turns, each with its key-value cache and
    without. Time to the first token, tokens per second and the bytes of the cache come of it.

    Args:
        models: Name to model. The models are left as they were found.
        batch: One batch, on the models' device.
        repeats: Timed passes of each model, and timed generations of it in each way.
        generate: New tokens of every sample, at least 2. None generates nothing.

    Returns:
        Name to measurement.

    Raises:
        ConfigError: There is no model, or it has no name, `repeats` is below 1 or `generate` below
            2, or prompts and new tokens are more than a model has positions.
        BatchError: The batch has no samples, or is on another device than a model; or there is
            nothing in it to generate after.
        UnsupportedModelError: A model cannot generate text, or does so without a key-value cache.
            Or accelerate off-loads a model or spreads it over devices; moving its weights would be
            measured. Or weights are packed in a way that hides how many there are.
        ModelInUseError: A model is masked or searched, or another thread works on it.

    Example:
        >>> found = solpath.measure({"dense": model, "small": small}, batch, repeats=1)
        >>> found["dense"].params, found["dense"].macs, found["dense"].samples
        (37922, 296000, 8)
        >>> found["small"].macs < found["dense"].macs
        True
    """
    if not isinstance(models, Mapping | nn.ModuleDict):
        raise ConfigError(
            f"models must be a dict of name to model, got a {type(models).__name__}; give "
            "{'dense': model}, for example."
        )
    if not models:
        raise ConfigError("models is empty; give at least one, for example {'dense': model}.")
    check_count("repeats", repeats, 1)
    for model in models.values():
        check_takes_batches(model)
        check_whole(model, "measured")
        check_countable(model)
    if generate is not None:
        check_count("generate", generate, 2)
        for name, model in models.items():
            check_generates(unwrapped(model), batch, generate, name=name)
    first, *_ = models.values()
    with preparing(first, *map(device_of, models.values())) as prepare:
        batch = prepare(0, batch)
    samples = batch_size(batch)
    with (
        claimed(*models.values(), doing="measured", admits="anything"),
        inferring(*models.values()),
    ):
        times = latencies({n: _pass(m, batch) for n, m in models.items()}, repeats=repeats)
        texts: dict[str, Generation] = {}
        if generate is not None:
            writers = {name: unwrapped(model) for name, model in models.items()}
            texts = generations(writers, batch, generate, repeats=repeats)
        result = {}
        for name, model in models.items():
            peak, source = peak_memory(_pass(model, batch), device=device_of(model))
            result[name] = Measurement(
                params=sum(p.numel() for p in model.parameters()),
                macs=count_macs(model, batch) // samples,
                bytes_on_disk=bytes_on_disk(model),
                peak_memory=peak + resident_bytes(model),
                peak_memory_source=source,
                latency_ms=1e3 * statistics.median(times[name]),
                latency_iqr_ms=1e3 * interquartile_range(times[name]),
                samples=samples,
                repeats=repeats,
                generation=texts.get(name),
            )
    return result


def _pass(model: nn.Module, batch: Any) -> Callable[[], Any]:
    return lambda: run(model, batch, labels=False)
