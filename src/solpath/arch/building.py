"""Build models without weights: what a configuration leaves out, and which numbers are no sizes."""

import contextlib
import threading
from collections.abc import Iterator

import torch
from torch import nn

_building = threading.RLock()  # transformers changes torch.nn.init for the process meanwhile


@contextlib.contextmanager
def without_weights() -> Iterator[None]:
    """Build models on the meta device, without drawing weights, in one thread at a time.

    What classes draw all the same leaves torch's random state as it was.
    """
    from transformers.initialization import no_init_weights

    with _building, torch.random.fork_rng([]), torch.device("meta"), no_init_weights():
        yield


CONSTRUCTOR_OPTIONS = {
    "add_pooling_layer": ("pooler",),
    "use_mask_token": ("embeddings", "mask_token"),
}
"""Flags that constructors of transformers take beside the configuration. Each leads to the names of
the part that a model has if the flag was set.
"""

NOT_A_SIZE = frozenset(
    {"rope_theta", "max_position_embeddings", "original_max_position_embeddings"}
)
"""Whole numbers of a configuration that may be large: nothing that is built has their size."""


def drop_data_(model: nn.Module) -> None:
    """Move the parameters of a model to the meta device that its classes build elsewhere.

    `torch.Tensor(size)` ignores the device that is set: wav2vec 2.0 draws a parameter in this way.

    Args:
        model: A model that was built on the meta device. Its buffers are left untouched.
    """
    for module in model.modules():
        for leaf, parameter in module._parameters.items():
            if parameter is not None and not parameter.is_meta:
                empty = torch.empty_like(parameter, device="meta")
                module._parameters[leaf] = nn.Parameter(empty, parameter.requires_grad)
