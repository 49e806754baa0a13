"""Tell which process of a distributed run this one is, and sum over all of them."""

import atexit
import gc
import os
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def process() -> tuple[int, int]:
    """Return the rank of this process and the number of processes.

    Under ``accelerate launch`` or ``torchrun`` the process group is started if it was not yet.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return 0, 1
        from accelerate import PartialState

        # Without an accelerator PartialState would start the group and still count one process.
        with ending_group():
            PartialState(cpu=not torch.accelerator.is_available())
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


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


def sum_over_processes(values: Tensor, device: torch.device) -> Tensor:
    """Return the sum of `values` over all processes, on the CPU; for a single one, `values` itself.

    Args:
        values: A tensor on the CPU, of one shape in every process.
        device: The device through which this process communicates.
    """
    if process()[1] == 1:
        return values
    moved = values.to(device)
    torch.distributed.all_reduce(moved)
    return moved.cpu()
