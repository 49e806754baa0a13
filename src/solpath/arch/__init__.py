"""Architectures: one table each, keyed by ``config.model_type``, or by the class for timm.

To add one, describe where its layers are in `Stack`s, give its attention a `forward` that runs with
unequal widths, and list the module in `_MODULES`: docs/guides/adding-an-architecture.md.
"""

from solpath.arch.table import (
    TIMM_WRAPPER,
    UNSUITED,
    Attention,
    Mlp,
    Stack,
    known_model_types,
    lookup,
    register,
    type_of,
)

__all__ = [
    "TIMM_WRAPPER",
    "UNSUITED",
    "Attention",
    "Mlp",
    "Stack",
    "known_model_types",
    "lookup",
    "register",
    "type_of",
]
