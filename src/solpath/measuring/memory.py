"""Count the bytes of a model on disk."""

import json
from typing import Any

from torch import nn

from solpath.model.counting import saved_tensors
from solpath.reading import DTYPES


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
