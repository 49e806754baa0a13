"""Build models without weights: what a configuration leaves out, and which numbers are no sizes."""

import contextlib
import threading
from collections.abc import Iterator

import torch

_building = threading.Lock()  # transformers puts its own functions into torch.nn.init meanwhile


@contextlib.contextmanager
def without_weights() -> Iterator[None]:
    """Build models on the meta device, without drawing weights, in one thread at a time."""
    from transformers.initialization import no_init_weights

    with _building, torch.device("meta"), no_init_weights():
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
