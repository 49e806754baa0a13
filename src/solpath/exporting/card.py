"""The model card of an exported folder: from facts to Markdown."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Facts:
    """What a model card says.

    Attributes:
        model: The name of the model's class.
        format: What the folder holds: ``"plain transformers"``, ``"ONNX"``.
        load: Lines of code that load the folder, or a command that runs it.
        language: The language of `load`, for the fence around it.
        library: The name of the library that loads it, as the Hub knows it; empty if it has none.
        base: The dense model, as the Hub knows it; empty if that is not known.
        license: The fields of the licence in the dense model's card: ``license``, and where there
            are any ``license_name`` and ``license_link``. Empty if they are not known.
        sizes: What was counted, to the number in the dense model and in this one.
        cut: What was cut: a name, the least and the most units of a head that stay, and the dense
            number.
        padded: What was filled with zeros: what was counted, to how much of `sizes` that is.
        notes: Further paragraphs.
    """

    model: str
    format: str
    load: str
    language: str = "python"
    library: str = ""
    base: str = ""
    license: Mapping[str, str] = field(default_factory=dict)
    sizes: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    cut: Sequence[tuple[str, int, int, int]] = ()
    padded: Mapping[str, int] = field(default_factory=dict)
    notes: Sequence[str] = ()


def model_card(facts: Facts) -> str:
    """Return the model card, Markdown with the metadata that the Hub reads.

    Args:
        facts: What it says. What is not known is left out.

    Example:
        >>> facts = Facts("BertModel", "plain transformers", "…", sizes={"parameters": (200, 150)})
        >>> print(model_card(facts).splitlines()[5])
        # BertModel with 75.0 % of its parameters
    """
    name = facts.base or facts.model
    dense, small = facts.sizes.get("parameters", (0, 0))
    share = f" with {small / dense:.1%} of its parameters".replace("%", " %") if dense else ""
    parts = [_metadata(facts), f"# {name}{share}"]
    article = f"`{facts.model}` in the format of {facts.format}"
    origin = f", pruned from [{facts.base}](https://huggingface.co/{facts.base})"
    parts.append(f"A {article}{origin if facts.base else ''}.")
    parts.append(f"```{facts.language}\n{facts.load.strip()}\n```")
    if facts.sizes:
        sizes = [[n, f"{a:,}", f"{b:,}", f"{b / a:.1%}"] for n, (a, b) in facts.sizes.items() if a]
        parts.append(_table(("", "dense", "here", "share"), sizes))
    if facts.cut:
        widths = [[n, f"{whole:,}", _range(low, high)] for n, low, high, whole in facts.cut]
        parts.append(_table(("units of a head", "dense", "kept"), widths))
    if any(facts.padded.values()):
        amounts = " and ".join(f"{n:,} {what}" for what, n in facts.padded.items() if n)
        parts.append(f"Of the sizes here, {amounts} are zeros: they fill layers up to one width.")
    parts.extend(facts.notes)
    return "\n\n".join(part for part in parts if part) + "\n"


def _range(low: int, high: int) -> str:
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table of which all columns but the first are aligned to the right."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _metadata(facts: Facts) -> str:
    from huggingface_hub import ModelCardData

    fields: dict[str, Any] = {**facts.license, "tags": ["pruned"]}
    fields |= {"base_model": facts.base or None, "library_name": facts.library or None}
    data = ModelCardData(**fields)
    return f"---\n{data.to_yaml()}\n---"
