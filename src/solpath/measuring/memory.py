"""Count bytes: of a model on disk and in memory, and of a forward pass at its peak."""

import json
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from solpath.model.counting import saved_tensors
from solpath.reading import DTYPES
from solpath.running.modes import entered


def bytes_on_disk(model: nn.Module) -> int:
    """Return the bytes of a safetensors file with the model's weights; nothing is written.

    Names that share one tensor are counted once.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in sorted(saved_tensors(model).items()):
        start, end = end, end + tensor.nbytes
        header[name] = {
            "dtype": DTYPES.get(tensor.dtype, str(tensor.dtype)),
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = len(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode())
    return 8 + -(-text // 8) * 8 + end


def peak_memory(
    function: Callable[[], Any], *, device: torch.device | str = "cpu"
) -> tuple[int, str]:
    """Return the most bytes that `function` has alive beyond those before it, and the source.

    On CUDA the figure is the allocator's own peak. Elsewhere the storages of all tensors that
    operators return are followed until they are freed; what an operator allocates and frees inside
    is not seen.

    Args:
        function: The work to measure. It is called once.
        device: Where the work is done.

    Returns:
        The bytes, and how they were counted.
    """
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before, "torch.cuda.max_memory_allocated"
    live = LiveStorages()
    with entered(live):
        function()
    return live.peak, "live tensor storages (TorchDispatchMode)"


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
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


def resident_bytes(model: nn.Module) -> int:
    """Return the bytes of all parameters and buffers of a model, each storage once."""
    tensors = (*model.parameters(), *model.buffers())
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())
