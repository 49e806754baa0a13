"""What a configuration leaves out about a model, and which of its numbers are no sizes."""

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
