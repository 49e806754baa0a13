"""Rotary tables of fewer couples, as a stock configuration can state them.

A stock class computes the frequencies of its couples from the width of a head. Its rope type
``longrope`` divides them by factors, which it takes from the configuration. With

    factor_i = base^(-2i / d') / frequency_{j_i}

couple i of a head of d' channels turns as couple j_i of the dense head did, whatever rule that was
computed by.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from solpath.errors import ExportError
from solpath.model.discovery import Site

_CONSTANT = ("default", "linear", "llama3", "yarn")  # rope types with one table at every length


@dataclass(frozen=True)
class Table:
    """A rotary table of a dense model.

    Attributes:
        name: The type of the layers that use it; empty if all layers use it.
        kind: Its rope type.
        frequencies: Frequency of every couple, float32 ``[couples]``.
        scaling: The factor of its sines and cosines.
    """

    name: str
    kind: str
    frequencies: Tensor
    scaling: float


def read_tables(model: nn.Module, sites: Iterable[Site]) -> dict[str, Table]:
    """Return the rotary table of every pair of rotary couples, by the name of the pair.

    Args:
        model: The model, with data. It is only looked at.
        sites: Its attentions.

    Returns:
        The tables. A pair has none if the model has not one rotary embedding for all its blocks.
    """
    found = [m for name, m in model.named_modules() if name.endswith("rotary_emb")]
    if len(found) != 1:
        return {}
    [rotary] = found
    result = {}
    for site in sites:
        if site.qk is None or site.qk.channels != 2 or site.plain is not None:
            continue
        if (table := _table(rotary, model.get_submodule(site.path))) is not None:
            result[site.qk.name] = table
    return result


def _table(rotary: Any, attention: Any) -> Table | None:
    buffers, kinds, name = rotary._buffers, rotary.rope_type, ""
    if isinstance(kinds, Mapping):
        name = rotary.config.layer_types[attention.layer_idx]
        if name not in kinds:
            return None
        kinds, prefix = kinds[name], f"{name}_"
    else:
        prefix = ""
    frequencies = buffers[f"{prefix}inv_freq"]
    return Table(name, kinds, frequencies, getattr(rotary, f"{prefix}attention_scaling"))


def smaller_tables(
    settings: Mapping[str, Any], tables: Iterable[Table], couples: Mapping[str, Tensor]
) -> dict[str, Any]:
    """Return the ``rope_parameters`` of heads that keep some couples.

    Args:
        settings: The configuration, with the ``rope_parameters`` of the dense model.
        tables: The tables of the dense model.
        couples: Name of a table to the couples that it keeps, int64 ``[couples]``.

    Raises:
        ExportError: A table changes with the length of the sequence.
    """
    result = dict(settings["rope_parameters"])
    for table in tables:
        if table.kind not in _CONSTANT:
            raise ExportError(
                f"its rotary table is of the type {table.kind!r}, which changes with the length; a "
                "stock class has no such table for some of its couples. Keep the rotary couples "
                "with protect=['*.qk'], or export with pad=True from a plan in which the heads "
                "keep all couples between them."
            )
        old = result[table.name] if table.name else result
        factors = longrope_factors(table.frequencies[couples[table.name]], old["rope_theta"])
        new = {
            "rope_type": "longrope",
            "rope_theta": old["rope_theta"],
            "factor": 1.0,
            "attention_factor": float(table.scaling),
            "short_factor": factors,
            "long_factor": factors,
            "original_max_position_embeddings": settings["max_position_embeddings"],
        }
        result = result | {table.name: new} if table.name else new
    return result


def longrope_factors(frequencies: Tensor, base: float) -> list[float]:
    """Return the factors with which ``longrope`` gives these frequencies.

    transformers computes the frequencies in float32. Of the float32 factors around each exact
    one, that is taken which comes nearest, so that angles agree at long distances too.

    Args:
        frequencies: Positive float32 ``[couples]``.
        base: The base of the rotary embedding.

    Example:
        >>> longrope_factors(torch.tensor([1.0, 0.25]), 16.0)
        [1.0, 1.0]
    """
    exponents = torch.arange(0, 2 * len(frequencies), 2).float() / (2 * len(frequencies))
    powers = base**exponents
    exact = 1 / (frequencies.double() * powers.double())
    steps = torch.arange(-4, 5).unsqueeze(1) * 2.0**-24
    candidates = (exact * (1 + steps)).float()
    errors = (1.0 / (candidates * powers) - frequencies).abs()
    nearest: list[float] = candidates.gather(0, errors.argmin(0, keepdim=True))[0].tolist()
    return nearest
