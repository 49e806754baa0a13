"""Architectures: one table each, keyed by ``config.model_type``.

To add one, describe where its layers are in an `Architecture`, give it one function that lets its
attention run with unequal widths, and list it in `_MODULES`. docs/how-to.md walks through a toy.
"""

from solpath.arch.table import Architecture, Attention, Mlp, known_model_types, lookup, register

__all__ = ["Architecture", "Attention", "Mlp", "known_model_types", "lookup", "register"]
