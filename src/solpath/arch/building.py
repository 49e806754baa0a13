"""What a configuration leaves out about a model, and which of its numbers are no sizes."""

import torch
from torch import nn

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

DEPTHS = frozenset({"depth", "depths"})
"""Settings that count layers, in addition to ``num_hidden_layers``."""


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
