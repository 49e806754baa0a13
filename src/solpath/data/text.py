"""Batches of text, one text a row or packed into full blocks."""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from solpath.data.batches import (
    Batches,
    Source,
    Tensors,
    check_columns,
    check_counts,
    move,
    rows_in_order,
)
from solpath.errors import BatchError, ConfigError, FileError

_TOKENISED_AT_ONCE = 256


def text_batches(
    source: Source,
    tokenizer: Any,
    *,
    batch_size: int = 16,
    length: int = 128,
    limit: int | None = None,
    seed: int | None = 0,
    pack: bool = False,
    text_column: str = "text",
    device: str | torch.device = "cpu",
) -> Batches:
    """Batches of text, all of one length. Empty texts are skipped.

    Args:
        source: a file with one text per line; or texts, or rows with a `text_column`: a list, a
            data set of `datasets`, a stream.
        tokenizer: the model's.
        batch_size: texts, or blocks, per batch.
        length: tokens per text, or block.
        limit: texts, or blocks, at most; a stream needs one.
        seed: of the order of the texts; None keeps it. A stream is read as it comes.
        pack: False gives every text its own row, cut or padded to `length`, as encoders are used.
            True joins the texts, the tokenizer's end token between them, and cuts all into full
            blocks without padding, as decoders are trained.
        text_column: of the rows.
        device: where the batches go.

    Returns:
        Dicts of what the model takes, int64 ``[batch, length]``.

    Raises:
        FileError: a file that cannot be read, or holds no text.
        BatchError: no text, fewer tokens than one block, or what is not text.
        ConfigError: a missing column, a setting out of range, or no padding token and no `pack`.

    Example:
        >>> batches = text_batches("texts.txt", tokenizer)  # doctest: +SKIP
    """
    check_counts(batch_size=batch_size, length=length, limit=limit)
    if not pack and tokenizer.pad_token_id is None:
        raise ConfigError(
            "this tokenizer has no padding token; give pack=True for blocks without padding, or "
            "set tokenizer.pad_token."
        )
    texts = _texts(source, limit, seed, text_column)
    if pack:
        blocks = _blocks(texts, tokenizer, length, limit)
        ones = torch.ones_like(blocks)
        return Batches(
            lambda places: move(
                {"input_ids": blocks[list(places)], "attention_mask": ones[list(places)]}, device
            ),
            range(len(blocks)),
            batch_size,
        )
    known = list(islice(texts, limit))
    if not known:
        raise BatchError("source has no text; give at least one.")

    def make(places: Sequence[int]) -> Tensors:
        encoded = tokenizer(
            [known[i] for i in places],
            truncation=True,
            max_length=length,
            padding="max_length",
            return_tensors="pt",
        )
        return move(dict(encoded), device)

    return Batches(make, range(len(known)), batch_size)


def _texts(source: Source, limit: int | None, seed: int | None, text_column: str) -> Iterator[str]:
    """Texts that are not empty, in order."""
    if isinstance(source, str | os.PathLike):
        source = _lines(Path(source))
    if isinstance(source, Sized):
        rows, order = rows_in_order(source, None, seed)
        samples: Iterable[Any] = (rows[i] for i in order)
    else:
        if limit is None:
            raise ConfigError("limit: a stream needs one.")
        samples = source
    return (text for text in (_text(row, text_column) for row in samples) if text.strip())


def _text(row: Any, column: str) -> str:
    if isinstance(row, Mapping):
        check_columns(row, (column,))
        row = row[column]
    if not isinstance(row, str):
        raise BatchError(f"a text is needed, got a {type(row).__name__}.")
    return row


def _lines(file: Path) -> list[str]:
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise FileError(f"cannot read {file}: {error}.") from error
    if not any(line.strip() for line in lines):
        raise FileError(f"{file} has no text; give one text per line.")
    return [line.strip() for line in lines]


def _blocks(texts: Iterator[str], tokenizer: Any, length: int, limit: int | None) -> Tensor:
    """Texts one after the other, cut into full blocks. int64 ``[blocks, length]``."""
    end = tokenizer.eos_token_id
    blocks: list[list[int]] = []
    rest: list[int] = []
    while (limit is None or len(blocks) < limit) and (
        part := list(islice(texts, _TOKENISED_AT_ONCE))
    ):
        for tokens in tokenizer(part, verbose=False)["input_ids"]:
            rest += tokens if end is None or tokens[-1:] == [end] else [*tokens, end]
        full = len(rest) - len(rest) % length
        blocks += [rest[i : i + length] for i in range(0, full, length)]
        rest = rest[full:]
    if not blocks:
        raise BatchError(f"source has {len(rest)} tokens, less than one block of {length}.")
    return torch.tensor(blocks[:limit])
