"""Make batches for a model from tables: what it takes decides which columns, and how."""

import inspect
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from solpath.data.batches import Batches
from solpath.data.columns import Labels, Role, check_column, find_columns
from solpath.data.images import image_batches, image_text_batches
from solpath.data.mixture import Mixture, Part
from solpath.data.tables import Table
from solpath.data.text import text_batches
from solpath.errors import ConfigError
from solpath.positions import most_tokens

_NO_LIMIT = 100_000  # a tokenizer without a longest text gives far more
_TOKENS = 128


class Feed(NamedTuple):
    """Batches, and what was taken for them.

    Attributes:
        batches: The batches.
        said: What was read, a line for every source.
        rows: The rows that they are made of, as mappings from role to value.
        paired: Whether the rows are both texts of pairs in turn.
        labels: What their ``labels`` mean; None if they have none.
        groups: What every sample is from, by a column of groups or as one of a pair of texts; None
            if there is neither, or nobody asked.
    """

    batches: Batches
    said: list[str]
    rows: Mixture
    paired: bool
    labels: Labels | None
    groups: Sequence[Hashable] | None


def takes(model: Any) -> set[str]:
    """Return what a model takes, such as ``{"text"}`` or ``{"image"}``.

    A decoder that follows an encoder adds ``"decoder input"``. The text half of a family that also
    sees says that it takes images, but has no argument for them.
    """
    kinds = model.input_modalities
    found = {kinds} if isinstance(kinds, str) else set(kinds)
    if not any(name.startswith("pixel") for name in inspect.signature(model.forward).parameters):
        found.discard("image")
    return found | {"decoder input"} if model.config.is_encoder_decoder else found


def is_classifier(model: Any) -> bool:
    """Return whether a model puts whole texts or images into classes."""
    name = type(model).__name__
    return any(kind in name for kind in ("ForSequenceClassification", "ForImageClassification"))


def longest_text(model: Any, tokenizer: Any) -> int | None:
    """Return the largest number of tokens that a model and its tokenizer allow, if they say so."""
    known = [most_tokens(model), tokenizer.model_max_length]
    return min((count for count in known if count and count <= _NO_LIMIT), default=None)


def feed(
    model: Any,
    processor: Any,
    tables: Sequence[tuple[Table, float | None]],
    *,
    columns: Mapping[Role, str] | None = None,
    labels: bool | None = False,
    pack: bool | None = None,
    grouped: bool = False,
    batch_size: int | None = None,
    length: int | None = None,
    limit: int | None = None,
    batches: int | None = None,
    seed: int | None = 0,
    device: str | torch.device = "cpu",
) -> Feed:
    """Return batches of what a model takes, from the columns that `find_columns` finds.

    Decoders get full blocks unless `pack` says otherwise, classifiers pairs of texts as one row,
    and other models of text both texts of a pair as rows of their own.

    Args:
        model: The model, of text, of images, or of pairs of both.
        processor: Its tokenizer or processor.
        tables: The tables, with their weights; see `solpath.data.mixture.shares`.
        columns: Role to column, for roles whose column is not found by its name.
        labels: Whether classifiers get ``labels``. None adds them where all tables have some.
        pack: Whether texts are joined and cut into full blocks, or a row each. None takes blocks
            for decoders.
        grouped: Whether pairs of texts are groups, which takes another reading of the rows. A
            column of groups says so itself.
        batch_size: Samples per batch. None takes 16 texts or blocks, or 32 images.
        length: Tokens per text or block. None takes 128, or all that the model allows if that is
            less; with images it takes all that the tokenizer allows.
        limit: The largest number of rows that are read.
        batches: The largest number of batches.
        seed: Seeds the order of the rows. None keeps the order of every table.
        device: The device of the batches.

    Raises:
        ConfigError: The model takes something else, a column is missing or not clear, labels do not
            fit its classes, it allows fewer tokens, or texts with groups are packed.
        BatchError: The tables hold less than one batch of text, or something that is no text.
    """
    kinds = takes(model)
    if kinds not in ({"text"}, {"image"}, {"text", "image"}) or (
        len(kinds) == 2 and model.can_generate()
    ):
        raise ConfigError(
            f"{type(model).__name__} takes {' and '.join(sorted(kinds))}; use it from Python, with "
            "your own batches."
        )
    chosen = dict(columns or {})
    roles: list[Role] = [role for role in ("image", "text") if role in kinds]
    if labels is not False and is_classifier(model):
        there = all("label" in chosen or _has_label(table) for table, _ in tables)
        roles += ["label"] if labels or there else []
    elif labels:
        raise ConfigError(f"{type(model).__name__} is no classifier, so labels say nothing of it.")
    if "label" in chosen and "label" not in roles:
        unused = chosen.pop("label")
        for table, _ in tables:
            check_column(table, unused)
    parts: list[Part] = [(table, find_columns(table, roles, chosen)) for table, _ in tables]
    if len(kinds) == 2:
        parts = [(t, {r: c for r, c in found.items() if r != "pair"}) for t, found in parts]
    known = None
    if "label" in roles:
        known = Labels(model.config, [(table, found["label"]) for table, found in parts])
    pack = model.can_generate() if pack is None else pack
    together = is_classifier(model)
    paired = {"pair" in found for _, found in parts}
    if len(paired) == 2:
        raise ConfigError("some sources have pairs of texts and others single ones; use one kind.")
    apart = not together and paired == {True}
    rows = Mixture(
        parts,
        [weight for _, weight in tables],
        limit=limit,
        seed=seed,
        labels=known,
        apart=apart,
    )
    size = batch_size or (32 if "image" in kinds else 16)
    common: dict[str, Any] = {"batch_size": size, "seed": None, "device": device}
    common["limit"] = None if batches is None else batches * size
    label_column = None if known is None else "label"
    if kinds == {"image"}:
        made = image_batches(rows, processor, label_column=label_column, **common)
    elif kinds == {"text"}:
        made = text_batches(
            rows,
            processor,
            length=_length(model, processor, length),
            pack=pack,
            pair_column="pair" if together and True in paired else None,
            label_column=label_column,
            **common,
        )
    else:
        made = image_text_batches(rows, processor, length=length, **common)
    said = [
        _said(table, found, count) for (table, found), count in zip(parts, rows.counts, strict=True)
    ]
    if known is not None and known.note:
        said.append(known.note)
    groups, named = None, any("group" in found for _, found in parts)
    if named and pack and kinds == {"text"}:
        raise ConfigError("blocks of several texts have no groups; give every text a row.")
    if (grouped or named) and not pack:
        groups = _of_filled(rows) if kinds == {"text"} else rows.groups()
    return Feed(made, said, rows, apart, known, groups)


def _of_filled(rows: Mixture) -> list[Hashable] | None:
    """Return the groups of rows without those of blank texts, which are no samples."""
    groups = rows.groups()
    if groups is None:
        return None
    texts = ([row[role] for role in ("text", "pair") if role in row] for row in rows)
    return [g for g, both in zip(groups, texts, strict=True) if all(t.strip() for t in both)]


def _has_label(table: Table) -> bool:
    try:
        return bool(find_columns(table, ["label"], {}))
    except ConfigError:
        return False


def _length(model: Any, tokenizer: Any, length: int | None) -> int:
    longest = longest_text(model, tokenizer)
    if length is None:
        return min(_TOKENS, longest or _TOKENS)
    if longest is not None and length > longest:
        raise ConfigError(f"length is {length}, and the model takes {longest} tokens at most.")
    return length


def _said(table: Table, columns: Mapping[Role, str], count: int) -> str:
    unused = [column for column in table.holds if column not in columns.values()]
    used = ", ".join(f"{role} from {column!r}" for role, column in columns.items())
    rest = f" (not used: {', '.join(unused)})" if unused else ""
    return f"{table.name}: {count:,} of {len(table):,} rows, {used}{rest}"
