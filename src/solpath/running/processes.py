"""Tell which process of a distributed run this one is, and sum over all of them."""

import os

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
        PartialState(cpu=not torch.accelerator.is_available())
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


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
