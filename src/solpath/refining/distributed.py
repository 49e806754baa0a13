"""Train in one process or in several, with accelerate and with tensors that may be sharded."""

import contextlib
import copy
import os
from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    GradientAccumulationPlugin,
)
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from solpath.errors import ConfigError
from solpath.planning.plan import plan_of
from solpath.running.modes import undoing
from solpath.running.placement import is_placed
from solpath.running.processes import ending_group, process

Model = TypeVar("Model", bound=nn.Module)

_REFUSED = (DistributedType.DEEPSPEED, DistributedType.FSDP, DistributedType.MEGATRON_LM)


@contextlib.contextmanager
def accelerating(device: torch.device, mixed_precision: str) -> Iterator[Accelerator]:
    """Yield an accelerator that leaves models where they are.

    The global state of accelerate is left as it was found when the block ends; only which one of
    several processes this is stays known. Every step in the block is an update, however the user
    accumulates gradients in a loop of their own.

    Args:
        device: The device of the model that is trained.
        mixed_precision: ``"no"`` or ``"bf16"``, from the config.

    Raises:
        ConfigError: accelerate does not start, or it was set up with another precision, another
            number of processes or another kind of device, or with another kind of parallelism than
            data parallelism or FSDP 2.
    """
    states = (AcceleratorState, GradientState, PartialState)
    found = [dict(state._shared_state) for state in states]

    def reset() -> None:
        for state, before in zip(states, found, strict=True):
            if state is not PartialState or not torch.distributed.is_initialized():
                state._shared_state.clear()
                state._shared_state.update(before)

    handler = DistributedDataParallelKwargs(find_unused_parameters=True)
    every_step = GradientAccumulationPlugin(num_steps=1)
    cpu = device.type == "cpu" and int(os.environ.get("WORLD_SIZE", "1")) > 1 and not _shards()
    with undoing(reset):
        GradientState._reset_state()
        try:
            with ending_group():
                accelerator = Accelerator(
                    cpu=cpu,
                    device_placement=False,
                    gradient_accumulation_plugin=every_step,
                    kwargs_handlers=[handler],
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
    if processes > 1 and accelerator.device.type != device.type and not is_sharding(accelerator):
        raise ConfigError(
            f"the model is on {device}, this process runs on {accelerator.device}; move the model "
            "there, or launch with --cpu."
        )
    process(device)  # which refuses the GPU of another process


def _shards() -> bool:
    """Return whether the launcher asked for FSDP on GPUs, which takes models on the CPU."""
    asked = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    return asked and torch.accelerator.is_available()


def is_sharding(accelerator: Accelerator) -> bool:
    """Return whether an accelerator divides the weights of models over processes, by FSDP 2."""
    return bool(getattr(accelerator, "is_fsdp2", False))


def aliased(model: Model) -> Model:
    """Return a copy of a model whose parameters and buffers share the memory of the model's own.

    Sharding such a copy leaves `model` as it is, and needs the memory of the shards alone.
    """
    plan = plan_of(model)
    memo: dict[int, Any] = {id(plan): plan}
    for tensor in chain(model.parameters(), model.buffers()):
        alias = tensor.detach()
        trained = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(alias, tensor.requires_grad) if trained else alias
    return copy.deepcopy(model, memo)


def unalias_(model: nn.Module) -> None:
    """Give every parameter from `aliased` that was not sharded a memory of its own."""
    for parameter in model.parameters():
        if not isinstance(parameter, DTensor):
            parameter.data = parameter.data.clone()


def sharded_like(model: Model, other: nn.Module) -> Model:
    """Return a copy of a model that is sharded over processes as another one is.

    Args:
        model: The model, which is left untouched; its memory stays its own.
        other: A model with modules of the same names.

    Returns:
        The copy; `model` itself, if `other` is not sharded, or if accelerate off-loads `model`.
    """
    meshes = [p.device_mesh for p in other.parameters() if isinstance(p, DTensor)]
    if not meshes or is_placed(model):
        return model
    result = aliased(model)
    blocks = [name for name, part in other.named_modules() if isinstance(part, FSDPModule)]
    known = dict(result.named_modules())
    for name in reversed(blocks):  # the innermost first
        if name and name in known and not _shares(result, known[name]):
            fully_shard(known[name], mesh=meshes[0], reshard_after_forward=True)
    fully_shard(result, mesh=meshes[0], reshard_after_forward=True)
    return result


def _shares(model: nn.Module, part: nn.Module) -> bool:
    """Return whether a parameter of a part of a model also belongs to a module outside of it."""
    inside = {id(module) for module in part.modules()}
    own = {id(parameter) for parameter in part.parameters()}
    outside = (module for module in model.modules() if id(module) not in inside)
    return any(id(p) in own for module in outside for p in module._parameters.values())


def gather(tensor: Tensor) -> Tensor:
    """Return a copy of a tensor on the CPU, whole if the tensor is sharded."""
    tensor = tensor.detach()
    if isinstance(tensor, DTensor):
        tensor = tensor.full_tensor()
    return tensor.to("cpu", copy=True)


def own_part(tensor: Tensor) -> Tensor:
    """Return a copy on the CPU of what this process holds of a tensor: its shard, or all of it."""
    tensor = tensor.detach()
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).to("cpu", copy=True)


def set_parts_(
    model: nn.Module, tensors: Mapping[str, Tensor], parts: Mapping[str, Tensor]
) -> None:
    """Set what this process holds of parameters of a model.

    Args:
        model: The model, whole or sharded.
        tensors: The parameters by name, which are changed in place.
        parts: Name to what `own_part` gave of that parameter.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # the last pass may have left a whole copy for the next one
    with torch.no_grad():
        for name, tensor in tensors.items():
            (tensor.to_local() if isinstance(tensor, DTensor) else tensor).copy_(parts[name])


def gather_parts(part: Tensor, like: Tensor) -> Tensor:
    """Return on the CPU the whole of a tensor of which every process has its own part.

    Args:
        part: What `own_part` gave this process.
        like: A tensor of the shape of the whole, sharded as it was.
    """
    if isinstance(like, DTensor):
        whole = DTensor.from_local(
            part.to(like.device),
            like.device_mesh,
            like.placements,
            shape=like.shape,
            stride=like.stride(),
        )
        return gather(whole)
    return part


def shard_like(value: Tensor, like: Tensor) -> Tensor:
    """Return `value` on the device of `like`, and sharded in the same way."""
    value = value.to(like.device)
    if isinstance(like, DTensor) and value.dim():
        return distribute_tensor(value, like.device_mesh, like.placements)
    return value
