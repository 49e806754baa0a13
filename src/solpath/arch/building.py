"""What a configuration does not say about a model, or says without giving a size of it."""

CONSTRUCTOR_OPTIONS = {
    "add_pooling_layer": ("pooler",),
    "use_mask_token": ("embeddings", "mask_token"),
}
"""Flags that constructors of transformers take beside the configuration, and the path of the part
that a model has if the flag was set."""

NOT_A_SIZE = frozenset(
    {"rope_theta", "max_position_embeddings", "original_max_position_embeddings"}
)
"""Whole numbers of a configuration that are no size of anything that is built, and may be large."""

DEPTHS = frozenset({"depth", "depths"})
"""Settings that count layers, beside ``num_hidden_layers``."""
