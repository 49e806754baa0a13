"""Measure what a model costs: parameters, MACs, bytes on disk, peak memory, latency."""

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from solpath.config import check_count
from solpath.data.preparation import preparing
from solpath.data.source import batch_size
from solpath.errors import ConfigError
from solpath.measuring.memory import bytes_on_disk, peak_memory, resident_bytes
from solpath.model.counting import count_macs
from solpath.pretrained import check_takes_batches
from solpath.running.claims import claimed
from solpath.running.forward import device_of, run
from solpath.running.modes import contained, inferring, undoing
from solpath.running.placement import check_whole

WARM_UP = 3
"""Rounds before the timed ones."""


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

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        return asdict(self)


@contained
def measure(
    models: Mapping[str, nn.Module], batch: Any, *, repeats: int = 20
) -> dict[str, Measurement]:
    """Measure several models side by side on one batch.

    After a warm-up, every round times each model once, and each round starts with another model. So
    a machine that slows down slows all models alike.

    Args:
        models: Name to model. The models are left as they were found.
        batch: One batch, on the models' device.
        repeats: Timed passes of each model.

    Returns:
        Name to measurement.

    Raises:
        ConfigError: There is no model, or `repeats` is below 1.
        UnsupportedModelError: accelerate off-loads a model or spreads it over devices; moving its
            weights would be measured.
        BatchError: The batch has no samples, or is on another device than a model.
        ModelInUseError: A model is masked or searched, or another thread works on it.

    Example:
        >>> found = solpath.measure({"dense": model, "small": small}, batch, repeats=1)
        >>> found["dense"].params, found["dense"].macs, found["dense"].samples
        (37922, 296000, 8)
        >>> found["small"].macs < found["dense"].macs
        True
    """
    if not models:
        raise ConfigError("models is empty; give at least one, for example {'dense': model}.")
    check_count("repeats", repeats, 1)
    for model in models.values():
        check_takes_batches(model)
        check_whole(model, "measured")
    first, *_ = models.values()
    with preparing(first, *map(device_of, models.values())) as prepare:
        batch = prepare(0, batch)
    samples = batch_size(batch)
    with (
        claimed(*models.values(), doing="measured", admits="anything"),
        inferring(*models.values()),
    ):
        times = latencies({n: _pass(m, batch) for n, m in models.items()}, repeats=repeats)
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
            )
    return result


def latencies(
    functions: Mapping[str, Callable[[], Any]], *, repeats: int, warm_up: int = WARM_UP
) -> dict[str, list[float]]:
    """Time functions in turns, each round from another start.

    The garbage collector is off meanwhile.

    Args:
        functions: Name to function, called without arguments.
        repeats: Timed calls of each function.
        warm_up: Calls of each function before these, which are not timed.

    Returns:
        Name to the seconds of every timed call, in order.
    """
    names, gpus = list(functions), _gpus_in_use()
    times: dict[str, list[float]] = {name: [] for name in names}
    restore = gc.enable if gc.isenabled() else gc.disable
    with undoing(restore):
        gc.collect()
        gc.disable()
        for round_ in range(warm_up + repeats):
            first = round_ % len(names)
            for name in names[first:] + names[:first]:
                _synchronize(gpus)
                start = time.perf_counter()
                functions[name]()
                _synchronize(gpus)
                if round_ >= warm_up:
                    times[name].append(time.perf_counter() - start)
    return times


def interquartile_range(values: list[float]) -> float:
    """Return the distance between the quartiles; 0 for fewer than two values."""
    if len(values) < 2:
        return 0.0
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return high - low


def _pass(model: nn.Module, batch: Any) -> Callable[[], Any]:
    return lambda: run(model, batch, labels=False)


def _gpus_in_use() -> list[int]:
    """Return the GPUs that hold tensors; models may be on another one than the current GPU."""
    return [gpu for gpu in range(torch.cuda.device_count()) if torch.cuda.memory_allocated(gpu)]


def _synchronize(gpus: list[int]) -> None:
    for gpu in gpus:
        torch.cuda.synchronize(gpu)
