"""Call functions in turns, and time them, so that a slower machine slows all of them alike."""

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch

from solpath.running.modes import undoing

WARM_UP = 3
"""Rounds before the timed ones."""
Found = TypeVar("Found")


def in_turns(
    functions: Mapping[str, Callable[[], Found]], *, repeats: int, warm_up: int = WARM_UP
) -> dict[str, list[Found]]:
    """Call functions in turns, each round from another start.

    The garbage collector is off meanwhile.

    Args:
        functions: Name to function, called without arguments.
        repeats: Calls of each function that count.
        warm_up: Calls of each function before these.

    Returns:
        Name to what the function returned at every call that counts, in order.
    """
    names = list(functions)
    found: dict[str, list[Found]] = {name: [] for name in names}
    restore = gc.enable if gc.isenabled() else gc.disable
    with undoing(restore):
        gc.collect()
        gc.disable()
        for round_ in range(warm_up + repeats):
            first = round_ % len(names)
            for name in names[first:] + names[:first]:
                value = functions[name]()
                if round_ >= warm_up:
                    found[name].append(value)
    return found


def latencies(
    functions: Mapping[str, Callable[[], Any]], *, repeats: int, warm_up: int = WARM_UP
) -> dict[str, list[float]]:
    """Time functions in turns, see `in_turns`.

    Args:
        functions: Name to function, called without arguments.
        repeats: Timed calls of each function.
        warm_up: Calls of each function before these, which are not timed.

    Returns:
        Name to the seconds of every timed call, in order.
    """
    gpus = gpus_in_use()

    def timed(function: Callable[[], Any]) -> Callable[[], float]:
        def call() -> float:
            start = moment(gpus)
            function()
            return moment(gpus) - start

        return call

    timers = {name: timed(function) for name, function in functions.items()}
    return in_turns(timers, repeats=repeats, warm_up=warm_up)


def interquartile_range(values: list[float]) -> float:
    """Return the distance between the quartiles; 0 for fewer than two values."""
    if len(values) < 2:
        return 0.0
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return high - low


def gpus_in_use() -> list[int]:
    """Return the GPUs that hold tensors; models may be on another one than the current GPU."""
    return [gpu for gpu in range(torch.cuda.device_count()) if torch.cuda.memory_allocated(gpu)]


def moment(gpus: list[int]) -> float:
    """Return the time in seconds at which some GPUs have done all they were given.

    Args:
        gpus: See `gpus_in_use`.
    """
    for gpu in gpus:
        torch.cuda.synchronize(gpu)
    return time.perf_counter()
