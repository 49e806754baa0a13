"""Count bytes that tensors take: of a model, of a piece of work at its peak, and what is free."""

import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

from solpath.running.modes import entered

SHARE = 0.8  # of the free memory that a piece of work may take
_CONTROL_GROUPS = Path("/sys/fs/cgroup")
_OWN_GROUPS = Path("/proc/self/cgroup")


def peak_memory(
    function: Callable[[], Any], *, device: torch.device | str = "cpu", passing: bool = False
) -> tuple[int, str]:
    """Return the most bytes that `function` has alive beyond those before it, and the source.

    On CUDA the figure is the allocator's own peak. Elsewhere the storages of all tensors that
    operators return are followed until they are freed; what an operator allocates and frees inside
    is not seen.

    Args:
        function: The work to measure. It is called once.
        device: Where the work is done.
        passing: Leave out what is still alive afterwards, such as off-loaded weights, whose files
            stay mapped.

    Returns:
        The bytes, and how they were counted.
    """
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        torch.cuda.synchronize(device)
        left = torch.cuda.memory_allocated(device) - before if passing else 0
        peak = torch.cuda.max_memory_allocated(device) - before - left
        return peak, "torch.cuda.max_memory_allocated"
    live = LiveStorages()
    with entered(live):
        function()
    left = live.alive if passing else 0
    return live.peak - left, "live tensor storages (TorchDispatchMode)"


class LiveStorages(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follow every storage that an operator returns until it is freed.

    Storages that were there before the block do not count.

    Attributes:
        alive: Bytes that are alive now.
        peak: Most bytes alive at once since the start, or since `peak` was last set.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.alive = 0
        self.peak = 0
        self._known: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run one operator and note the storages that it makes."""
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
    leaves = (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))
    return (part for leaf in leaves for part in parts_of(leaf).values())


def parts_of(tensor: Tensor) -> dict[str, Tensor]:
    """Return the tensors that hold the data of a tensor, by what their names add to its own.

    Args:
        tensor: Any tensor. One that torchao has quantised consists of numbers of few bits, scales
            and zero points, which have names such as ``".scale"``; any other is its only part.

    Example:
        >>> list(parts_of(torch.ones(2)))
        ['']
    """
    packed: Any = tensor
    if not is_traceable_wrapper_subclass(packed):
        return {"": tensor}
    names, _ = packed.__tensor_flatten__()
    inner = {name: parts_of(getattr(packed, name)) for name in names}
    return {f".{name}{rest}": part for name, parts in inner.items() for rest, part in parts.items()}


def resident_bytes(model: nn.Module) -> int:
    """Return the bytes of the parameters and buffers of a model in memory, each storage once."""
    tensors = [t for t in _tensors([*model.parameters(), *model.buffers()]) if not t.is_meta]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def fits(size: int, device: torch.device) -> bool:
    """Return whether so many bytes can be taken on a device: four fifths of what is free, at most.

    Args:
        size: The bytes.
        device: The device.
    """
    return size <= SHARE * free_memory(device)


def free_memory(device: torch.device) -> int:
    """Return the bytes that this process can still allocate on a device.

    On a GPU that is what the driver and torch's own cache have left. On the CPU it is what the
    system can give without swapping, less if the process runs under a limit: that of its control
    group, of its address space, or of its data (``ulimit -v`` and ``-d``).

    Args:
        device: The device.
    """
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    limits = [psutil.virtual_memory().available]
    if hasattr(psutil, "RLIMIT_AS"):
        own = psutil.Process()
        used = own.memory_info()
        for kind, taken in ((psutil.RLIMIT_AS, used.vms), (psutil.RLIMIT_DATA, used.data)):
            soft, _ = own.rlimit(kind)
            if soft != psutil.RLIM_INFINITY:
                limits.append(soft - taken)
    limits += _left_in_control_groups()
    return max(0, int(min(limits)))


def _left_in_control_groups() -> Iterator[int]:
    """Yield what is left of the memory of every control group, version 1 or 2, that limits us."""
    try:
        lines = _OWN_GROUPS.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            root, names = _CONTROL_GROUPS, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            root = _CONTROL_GROUPS / "memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        group = root / path.lstrip("/")
        for folder in (group, *group.parents):
            if root in (folder, *folder.parents):
                yield from _left_in(folder, *names)


def _left_in(folder: Path, limit: str, current: str, reclaimed: str) -> Iterator[int]:
    """Yield what is left in one control group, if it has a limit that can be read."""
    try:
        most = (folder / limit).read_text().strip()
        if most != "max":
            lines = (folder / "memory.stat").read_text().splitlines()
            statistics = dict(line.split() for line in lines)
            used = int((folder / current).read_text())
            yield int(most) - used + int(statistics.get(reclaimed, 0))
    except (OSError, ValueError):
        return
