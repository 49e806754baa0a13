"""What a model costs: parameters, MACs, bytes on disk, peak memory, latency; and where from."""

import contextlib
import gc
import importlib.metadata
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from solpath.data.source import batch_size, check_device
from solpath.errors import ConfigError
from solpath.objective import forward

WARM_UP = 3
_PACKAGES = ("solpath", "torch", "transformers", "numpy")


@dataclass(frozen=True)
class Measurement:
    """The cost of one model on one batch.

    Attributes:
        params: parameters; a tied one counts once.
        macs: multiply-accumulates for one sample (half the floating-point operations).
        bytes_on_disk: size of the weights as one safetensors file, tied tensors once.
        peak_memory: bytes alive at the peak of one forward pass, weights included.
        peak_memory_source: how the peak was taken.
        latency_ms: median time of one forward pass of the whole batch.
        latency_iqr_ms: its interquartile range.
        samples: samples in the batch.
        repeats: timed passes.
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
        """Plain values, for JSON."""
        return asdict(self)


def measure(
    models: Mapping[str, nn.Module], batch: Any, *, repeats: int = 20
) -> dict[str, Measurement]:
    """Measure several models side by side on one batch.

    Latency is taken in one run: after a warm-up every round times each model once, and each round
    starts with another model, so that a machine that slows down slows all of them alike.

    Args:
        models: name to model. They are left as found (training flags, gradients, hooks).
        batch: one batch, on the models' device.
        repeats: timed passes of each model.

    Raises:
        ConfigError: no model, or `repeats` below 1.
        BatchError: the batch has no samples, or lies on another device than a model.
    """
    if not models:
        raise ConfigError("models is empty; give at least one, for example {'dense': model}.")
    check_repeats(repeats)
    samples = batch_size(batch)
    for model in models.values():
        check_device(batch, _device(model))
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        for model in models.values():
            stack.enter_context(evaluating(model))
        times = latencies({n: _pass(m, batch) for n, m in models.items()}, repeats=repeats)
        result = {}
        for name, model in models.items():
            peak, source = peak_memory(_pass(model, batch), device=_device(model))
            result[name] = Measurement(
                params=sum(p.numel() for p in model.parameters()),
                macs=count_macs(model, batch) // samples,
                bytes_on_disk=bytes_on_disk(model),
                peak_memory=peak + _resident_bytes(model),
                peak_memory_source=source,
                latency_ms=1e3 * statistics.median(times[name]),
                latency_iqr_ms=1e3 * interquartile_range(times[name]),
                samples=samples,
                repeats=repeats,
            )
    return result


def check_repeats(repeats: int) -> None:
    """Raise `ConfigError` unless `repeats` is an integer of at least 1."""
    if isinstance(repeats, bool) or not isinstance(repeats, int) or repeats < 1:
        raise ConfigError(f"repeats must be an integer of at least 1, got {repeats!r}.")


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[nn.Module]:
    """Put `model` in eval mode; every module's training flag is restored afterwards."""
    flags = {module: module.training for module in model.modules()}
    try:
        yield model.eval()
    finally:
        for module, training in flags.items():
            module.training = training


def latencies(
    functions: Mapping[str, Callable[[], Any]], *, repeats: int, warm_up: int = WARM_UP
) -> dict[str, list[float]]:
    """Seconds of `repeats` calls of each function, interleaved, each round from another start."""
    names = list(functions)
    times: dict[str, list[float]] = {name: [] for name in names}
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for round_ in range(warm_up + repeats):
            first = round_ % len(names)
            for name in names[first:] + names[:first]:
                _synchronize()
                start = time.perf_counter()
                functions[name]()
                _synchronize()
                if round_ >= warm_up:
                    times[name].append(time.perf_counter() - start)
    finally:
        if collecting:
            gc.enable()
    return times


def interquartile_range(values: list[float]) -> float:
    """Distance between the quartiles; 0 for fewer than two values."""
    if len(values) < 2:
        return 0.0
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return high - low


def count_macs(model: nn.Module, batch: Any) -> int:
    """Multiply-accumulates of one forward pass of the whole batch: matrix products, convolutions.

    Attention is run in its plain form while counting, so that its products are seen.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    counter = FlopCounterMode(display=False)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        forward(model, batch)
    return int(counter.get_total_flops()) // 2


def bytes_on_disk(model: nn.Module) -> int:
    """Size of one safetensors file with the model's weights; nothing is written.

    Names that share one tensor are counted once.
    """
    distinct: dict[object, tuple[str, Tensor]] = {}
    for name, tensor in model.state_dict().items():
        where = (tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.shape)
        distinct.setdefault(where if tensor.numel() else name, (name, tensor))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in sorted(distinct.values(), key=lambda item: item[0]):
        start, end = end, end + tensor.numel() * tensor.element_size()
        dtype = str(tensor.dtype).removeprefix("torch.")
        header[name] = {
            "dtype": _SAFETENSORS_NAMES.get(dtype, dtype),
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = len(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode())
    return 8 + -(-text // 8) * 8 + end


_SAFETENSORS_NAMES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}


def peak_memory(
    function: Callable[[], Any], *, device: torch.device | str = "cpu"
) -> tuple[int, str]:
    """Bytes that `function` allocates on top of what was alive, at its peak, and the source.

    On CUDA the allocator's own peak. Elsewhere the storages of all tensors that operators return
    are followed until they are freed; what an operator allocates and frees inside is not seen.
    """
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before, "torch.cuda.max_memory_allocated"
    with LiveStorages() as live:
        function()
    return live.peak, "live tensor storages (TorchDispatchMode)"


class LiveStorages(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follow every storage first seen as an operator's output, until it is freed.

    Attributes:
        alive: bytes alive now.
        peak: most bytes alive at once since the start, or since `peak` was last set.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.alive = 0
        self.peak = 0
        self._known: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run one operator and note the storages it makes."""
        kwargs = kwargs or {}
        for tensor in _tensors((args, kwargs)):
            self._follow(tensor, 0)
        output = func(*args, **kwargs)
        for tensor in _tensors(output):
            self._follow(tensor, tensor.untyped_storage().nbytes())
        return output

    def _follow(self, tensor: Tensor, size: int) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return

        def freed(_: Any) -> None:
            del self._known[key]
            self.alive -= size

        self._known[key] = weakref.ref(storage, freed)
        self.alive += size
        self.peak = max(self.peak, self.alive)


def _tensors(tree: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


def provenance(device: torch.device | str = "cpu") -> dict[str, Any]:
    """Where a figure comes from: command, commit, versions, machine, threads, load, time (UTC)."""
    return {
        "command": _command(),
        "commit": _commit(),
        "versions": {
            "python": platform.python_version(),
            **{name: _version(name) for name in _PACKAGES},
        },
        "device": _device_name(torch.device(device)),
        "platform": f"{platform.system()} {platform.machine()}",
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _command() -> str:
    """The command line, with paths below the working directory made relative."""
    prefix = str(Path.cwd()) + os.sep
    program = Path(sys.argv[0] or "python")
    name = str(program).removeprefix(prefix)
    if Path(name).is_absolute():
        name = program.name
    start = ["python"] if name.endswith(".py") else []
    return shlex.join([*start, name, *(a.removeprefix(prefix) for a in sys.argv[1:])])


def _commit() -> str | None:
    """Commit of the checkout that this package is part of, or None for an installed copy."""
    here = Path(__file__).resolve()
    git = ["git", "-C", str(here.parent)]
    try:
        for command in (
            [*git, "ls-files", "--error-unmatch", here.name],
            [*git, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
        ):
            done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
            if done.returncode:
                return None
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _resident_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, each storage once."""
    tensors = (*model.parameters(), *model.buffers())
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def _device(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def _pass(model: nn.Module, batch: Any) -> Callable[[], Tensor]:
    return lambda: forward(model, batch)


def _synchronize() -> None:
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()
