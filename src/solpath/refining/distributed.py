"""Train in one process or in several, with accelerate and with tensors that may be sharded."""

import contextlib
import os
from collections.abc import Iterator

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, is_initialized
from accelerate.utils import DistributedDataParallelKwargs, DistributedType
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from solpath.errors import ConfigError
from solpath.running.modes import undoing
from solpath.running.processes import ending_group

_REFUSED = (DistributedType.DEEPSPEED, DistributedType.FSDP, DistributedType.MEGATRON_LM)


@contextlib.contextmanager
def accelerating(device: torch.device, mixed_precision: str) -> Iterator[Accelerator]:
    """Yield an accelerator that leaves models where they are.

    The global state of accelerate is left as it was found when the block ends.

    Args:
        device: The device of the model that is trained.
        mixed_precision: ``"no"`` or ``"bf16"``, from the config.

    Raises:
        ConfigError: accelerate does not start, or it was set up with another precision, another
            number of processes or another kind of device, or with another kind of parallelism than
            data parallelism or FSDP 2.
    """
    found = is_initialized()

    def reset() -> None:
        if not found:
            AcceleratorState._reset_state()

    handler = DistributedDataParallelKwargs(find_unused_parameters=True)
    cpu = device.type == "cpu" and int(os.environ.get("WORLD_SIZE", "1")) > 1
    with undoing(reset):
        try:
            with ending_group():
                accelerator = Accelerator(
                    cpu=cpu, device_placement=False, kwargs_handlers=[handler]
                )
        except ValueError as error:
            raise ConfigError(f"accelerate does not start: {error}") from error
        _check(accelerator, device, mixed_precision)
        yield accelerator


def _check(accelerator: Accelerator, device: torch.device, mixed_precision: str) -> None:
    """Raise `ConfigError` if accelerate was set up for something other than this tuning."""
    processes = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    if accelerator.mixed_precision not in ("no", mixed_precision):
        raise ConfigError(
            f"accelerate runs with mixed_precision={accelerator.mixed_precision!r}, the config "
            f"says {mixed_precision!r}; make them equal."
        )
    if accelerator.distributed_type in _REFUSED and not accelerator.is_fsdp2:
        raise ConfigError(
            f"accelerate runs with {accelerator.distributed_type.value}; tune runs in one process, "
            "with data parallelism, or with FSDP and fsdp_version 2."
        )
    if accelerator.num_processes != processes:
        raise ConfigError(
            f"accelerate counts {accelerator.num_processes} processes, torch.distributed "
            f"{processes}; on CPUs create accelerate.PartialState(cpu=True) first."
        )
    if processes > 1 and accelerator.device.type != device.type:
        raise ConfigError(
            f"the model is on {device}, this process runs on {accelerator.device}; move the model "
            "there, or launch with --cpu."
        )


def gather(tensor: Tensor) -> Tensor:
    """Return a copy of a tensor on the CPU, whole if the tensor is sharded."""
    tensor = tensor.detach()
    if isinstance(tensor, DTensor):
        tensor = tensor.full_tensor()
    return tensor.to("cpu", copy=True)


def shard_like(value: Tensor, like: Tensor) -> Tensor:
    """Return `value` on the device of `like`, and sharded in the same way."""
    value = value.to(like.device)
    if isinstance(like, DTensor) and value.dim():
        return distribute_tensor(value, like.device_mesh, like.placements)
    return value
