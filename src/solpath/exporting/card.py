"""The model card of an exported folder: from facts to Markdown."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from solpath.exporting.formats import Load
from solpath.exporting.origin import Origin
from solpath.exporting.parity import Parity

_HUB = "https://huggingface.co"


@dataclass(frozen=True)
class Facts:
    """What a model card says.

    Attributes:
        model: The name of the model's class.
        title: What the folder holds: ``"plain transformers"``, ``"ONNX"``.
        loads: How runtimes load the folder.
        library: The name of the library that loads it, as the Hub knows it; empty if it has none.
        origin: What is known of the dense model.
        sizes: What was counted, to the number in the dense model and in this one.
        cut: What was cut: a name, the least and the most that stay, and the dense number.
        padded: What was filled with zeros: what was counted, to how much of `sizes` that is.
        file_bytes: Size of all files but the card and the record; 0 says nothing of it.
        asked: What the plan was asked for.
        metrics: Metrics of an evaluation of the model; empty if there was none.
        intervals: Name of a metric to the ends of its confidence interval, where it is known.
        samples: The number of samples of that evaluation.
        parity: How far the exported model was from the model that it was made from.
        runtime: What it ran in.
        versions: Packages to the versions that made it.
    """

    model: str
    title: str
    loads: Sequence[Load] = ()
    library: str = ""
    origin: Origin = field(default_factory=Origin)
    sizes: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    cut: Sequence[tuple[str, int, int, int]] = ()
    padded: Mapping[str, int] = field(default_factory=dict)
    file_bytes: int = 0
    asked: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    samples: int = 0
    parity: Sequence[Parity] = ()
    runtime: str = ""
    versions: Mapping[str, str | None] = field(default_factory=dict)


def model_card(facts: Facts) -> str:
    """Return the model card, Markdown with the metadata that the Hub reads.

    Args:
        facts: What it says. What is not known is left out, or said to be unknown.

    Example:
        >>> facts = Facts("BertModel", "plain transformers", sizes={"parameters": (200, 150)})
        >>> print(model_card(facts).splitlines()[5])
        # BertModel with 75.0 % of its parameters
    """
    sections = [("Use", _use(facts)), ("Size", _size(facts)), ("Quality", _quality(facts))]
    sections.append(("Origin", _origin(facts)))
    parts = [_metadata(facts), f"# {title_of(facts)}", f"A `{facts.model}` for {facts.title}."]
    for name, paragraphs in sections:
        parts += [f"## {name}", *paragraphs] if paragraphs else []
    return "\n\n".join(parts) + "\n"


def title_of(facts: Facts) -> str:
    """Return the heading of a card.

    Args:
        facts: What the card says.
    """
    dense, small = facts.sizes.get("parameters", (0, 0))
    share = f" with {small / dense:.1%} of its parameters".replace("%", " %") if dense else ""
    return f"{facts.origin.base or facts.model}{share}"


def _use(facts: Facts) -> list[str]:
    return [
        f"{load.runtime}:\n\n```{load.language}\n{load.code.strip()}\n```" for load in facts.loads
    ]


def _size(facts: Facts) -> list[str]:
    parts = []
    if facts.sizes:
        sizes = [[n, f"{a:,}", f"{b:,}", f"{b / a:.1%}"] for n, (a, b) in facts.sizes.items() if a]
        parts.append(_table(("", "dense", "here", "share"), sizes))
    if facts.cut:
        widths = [[n, f"{whole:,}", _range(low, high)] for n, low, high, whole in facts.cut]
        parts.append(_table(("units of a head", "dense", "kept"), widths))
    if any(facts.padded.values()):
        amounts = " and ".join(f"{n:,} {what}" for what, n in facts.padded.items() if n)
        parts.append(f"Of the sizes here, {amounts} are zeros: they fill layers up to one width.")
    if facts.file_bytes:
        parts.append(f"The files take {facts.file_bytes / 1e6:,.1f} MB.")
    return parts


def _quality(facts: Facts) -> list[str]:
    parts = []
    if facts.metrics:
        rows = []
        for name, value in facts.metrics.items():
            ends = facts.intervals.get(name)
            between = "not known" if ends is None else "{:.4g} to {:.4g}".format(*ends)
            rows.append([name, f"{value:.4g}", between])
        parts.append(
            f"Of the model in torch, on {facts.samples:,} held-out samples; `kl`, `agreement`, "
            "`cosine` and `relative_error` are beside the dense model. Intervals are over samples."
        )
        parts.append(_table(("metric", "mean", "95 % confidence"), rows))
    else:
        parts.append("How well it does on a task was not measured when this was written.")
    for variant in dict.fromkeys(row.inputs.partition(", ")[2] for row in facts.parity):
        found = [row for row in facts.parity if row.inputs.partition(", ")[2] == variant]
        worst = max(row.difference for row in found)
        kinds = ", ".join(dict.fromkeys(row.inputs.partition(", ")[0] for row in found))
        parts.append(
            f"{f'The file in {variant}' if variant else 'It'} was run in {facts.runtime} beside "
            f"the model that it was made from (inputs: {kinds}): the largest difference of an "
            f"output is {worst:.1e} of its largest value, and {found[0].tolerance:.2g} was allowed."
        )
    return parts


def _origin(facts: Facts) -> list[str]:
    origin = facts.origin
    if origin.base:
        dense = f"The dense model is [{origin.base}]({_HUB}/{origin.base})."
    elif origin.ancestors:
        names = ", ".join(f"[{name}]({_HUB}/{name})" for name in origin.ancestors)
        dense = f"The dense model says that it was made from {names}."
    else:
        dense = "Of the dense model no name on the Hub is known."
    if not origin.license:
        dense += " Its licence, which binds this one too, is not known here."
    parts = [dense]
    if facts.asked:
        asked = ", ".join(f"{name}={value!r}" for name, value in facts.asked.items())
        parts.append(f"The plan was asked for `{asked}`.".replace("\n", " "))
    if facts.versions:
        made = ", ".join(f"{name} {version}" for name, version in facts.versions.items() if version)
        parts.append(f"Made with {made}; `solpath_export.json` has the whole record.")
    return parts


def _range(low: int, high: int) -> str:
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table of which all columns but the first are aligned to the right."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _metadata(facts: Facts) -> str:
    from huggingface_hub import ModelCardData

    models = list(facts.origin.models)
    fields: dict[str, Any] = dict(facts.origin.license)
    fields |= {"tags": ["pruned"] if facts.sizes else None}
    fields |= {"base_model": models[0] if len(models) == 1 else models or None}
    data = ModelCardData(**fields, library_name=facts.library or None)
    return f"---\n{data.to_yaml()}\n---"
