"""Tell which process of a distributed run this one is, and sum or join over all of them."""

import atexit
import gc
import os
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from solpath.errors import ConfigError


def process(device: torch.device | None = None) -> tuple[int, int]:
    """Return the rank of this process and the number of processes.

    Under ``accelerate launch`` or ``torchrun`` the process group is started if it was not yet.

    Args:
        device: The device of the model that this process works on. None checks no device.

    Raises:
        ConfigError: The device is the GPU of another process.
    """
    if not _started():
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return 0, 1
        from accelerate import PartialState

        # On CPUs PartialState would start the group and still count one process.
        with ending_group():
            PartialState(cpu=_gpus() < _beside())
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    if device is not None and world > 1:
        _check_device(device, rank, world)
    return rank, world


def _started() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _gpus() -> int:
    """Return how many devices can each have a process of its own."""
    kind = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return 0 if kind is None or kind.type == "mps" else torch.accelerator.device_count()


def _beside() -> int:
    """Return the number of processes on this machine, as their launcher gave it."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _check_device(device: torch.device, rank: int, world: int) -> None:
    """Raise `ConfigError` if a device is the GPU of another process of this machine."""
    if device.type in ("cpu", "meta"):
        return
    own = _own_device(device.type)
    if device != own and torch.get_device_module(device.type).device_count() >= _beside() > 1:
        raise ConfigError(
            f"process {rank} of {world} has its model on {device}, and its own device is {own}; "
            f"write accelerate.PartialState() before model.to({device.type!r}), or move model and "
            "batches to accelerate.PartialState().device."
        )


def _own_device(kind: str) -> torch.device:
    """Return the device of a kind that this process was given, by itself or by its launcher.

    Args:
        kind: For example ``"cuda"``.
    """
    devices = torch.get_device_module(kind)
    index = devices.current_device()
    if index == 0:  # which is also where nobody has chosen one
        index = int(os.environ.get("LOCAL_RANK", "0")) % devices.device_count()
    return torch.device(kind, index)


def communication_device() -> torch.device:
    """Return the device through which this process sends tensors to the others.

    It follows from the backend of the process group, which must have been started: gloo takes
    tensors on the CPU, and NCCL those on the own GPU of every process, wherever models are.
    """
    backends = torch.distributed.get_backend_config(torch.distributed.group.WORLD)
    kinds = [part.partition(":")[0] for part in str(backends).split(",")]
    return torch.device("cpu") if "cpu" in kinds else _own_device(kinds[0])


@contextmanager
def ending_group() -> Iterator[None]:
    """End a process group that is started in the block at exit, before the interpreter ends.

    Threads of gloo let go of the tensors of a collective some time after it has returned, and they
    need the interpreter for it: one that waits for the GIL while Python shuts down takes the
    process with it (SIGABRT or SIGSEGV). A group that nothing refers to waits for its threads. A
    group that was there before the block is left alone.
    """
    found = torch.distributed.is_initialized()
    yield
    if found or not torch.distributed.is_initialized():
        return
    started = weakref.ref(torch.distributed.group.WORLD)

    def end() -> None:
        if torch.distributed.is_initialized() and torch.distributed.group.WORLD is started():
            gc.collect()  # wrapped models refer to the group, and often to themselves
            torch.distributed.destroy_process_group()

    atexit.register(end)


def sum_over_processes(values: Tensor) -> Tensor:
    """Return the sum of `values` over all processes, on the CPU; for a single one, `values` itself.

    Args:
        values: A tensor on the CPU, of one shape in every process.
    """
    if process()[1] == 1:
        return values
    moved = values.to(communication_device())
    torch.distributed.all_reduce(moved)
    return moved.cpu()


def join_over_processes(values: Tensor) -> Tensor:
    """Return the values of all processes, end to end by rank; for a single one, `values` itself.

    Args:
        values: A tensor on the CPU, of one dimension; its length may differ between processes.
    """
    rank, world = process()
    if world == 1:
        return values
    counts = torch.zeros(world, dtype=torch.int64)
    counts[rank] = len(values)
    counts = sum_over_processes(counts)
    rows = values.new_zeros(world, int(counts.max()))
    rows[rank, : len(values)] = values
    if rows.numel():
        rows = sum_over_processes(rows)
    return torch.cat([row[:count] for row, count in zip(rows, counts.tolist(), strict=True)])
