"""Say where the prunable layers of each architecture are.

One table per ``config.model_type``, or per class of timm, enters here: where its attentions and
MLPs are, and the `forward` that runs an attention with unequal widths. To add one, describe its
layers in `Stack`s and call `register`, or list its module in `_MODULES`;
docs/adding-an-architecture.md walks through a toy.
"""

from solpath.arch.table import (
    TIMM_WRAPPER,
    UNSUITED,
    Attention,
    Experts,
    Mlp,
    Stack,
    is_foreign,
    known_model_types,
    lookup,
    register,
    type_of,
)

__all__ = [
    "TIMM_WRAPPER",
    "UNSUITED",
    "Attention",
    "Experts",
    "Mlp",
    "Stack",
    "is_foreign",
    "known_model_types",
    "lookup",
    "register",
    "type_of",
]
