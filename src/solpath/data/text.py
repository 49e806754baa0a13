"""Batches of text: one text per row, or texts packed into full blocks."""

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from solpath.data.batches import (
    Batches,
    Broken,
    OnError,
    Source,
    Tensors,
    check_columns,
    check_counts,
    check_vocabulary,
    label_of,
    move,
    rows_in_order,
)
from solpath.errors import BatchError, ConfigError, FileError

_TOKENISED_AT_ONCE = 256
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_LINE_END = re.compile(rb"\r\n|\n|\r")  # not form feeds and the like, which texts may hold


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
    pair_column: str | None = None,
    label_column: str | None = None,
    on_error: OnError = "raise",
    device: str | torch.device = "cpu",
) -> Batches:
    """Return batches of text, all of one length. Blank texts are skipped.

    Args:
        source: A file in UTF-8 with one text per line; or an iterable (a list, a data set of
            `datasets` or a column of it, a table of pandas, a stream) of texts or of rows with a
            `text_column`.
        tokenizer: The tokenizer of the model.
        batch_size: The number of texts per batch, or of blocks with `pack`.
        length: The number of tokens per text or block.
        limit: The largest number of texts, or of blocks with `pack`: the first ones in the order
            that `seed` gives. None takes all. A stream needs a limit.
        seed: Seeds the order of the texts. None keeps the order of the source. A stream always
            keeps its order.
        pack: False gives every text a row of its own, truncated or padded to `length`, which suits
            encoders. True joins the texts, puts the tokenizer's end token after each, and cuts them
            into full blocks without padding, which suits decoders; tokens left over at the end are
            dropped.
        text_column: The column of the texts, if the source has rows.
        pair_column: The column of a second text, which the tokenizer puts behind the first in the
            same row, as for a classifier of pairs. None, and with `pack`, there is none.
        label_column: The column of the labels, whole numbers that are added as ``labels``. None,
            and with `pack`, adds none.
        on_error: What happens to a line or a row that cannot be read: ``"raise"`` raises the error
            below. ``"skip"`` leaves it out of its batch, and a warning counts and names it.
        device: The device that the batches are moved to.

    Returns:
        A sequence of dicts of what the model takes: ``input_ids``, ``attention_mask`` and whatever
        else the tokenizer gives, int64 ``[batch, length]``; and, if asked for, ``labels``, int64
        ``[batch]``.

    Raises:
        FileError: The file cannot be read or holds no text.
        BatchError: The source has no text, fewer tokens than one block, or a sample that is not
            text. A label that is no whole number raises it when its batch is read.
        ConfigError: A column is missing, a stream has no limit, a setting is out of its range, the
            tokenizer knows no words, it has no padding token and `pack` is False, or `pack` is True
            and there is a column of pairs or labels.

    Example:
        >>> from transformers import ByT5Tokenizer
        >>> tokenizer = ByT5Tokenizer()  # a token per byte, 1 ends a text, 0 is padding
        >>> batches = solpath.text_batches(["cat", "a dog"], tokenizer, length=6, seed=None)
        >>> batches[0]["input_ids"]
        tensor([[102, 100, 119,   1,   0,   0],
                [100,  35, 103, 114, 106,   1]])
    """
    check_counts(batch_size=batch_size, length=length, limit=limit)
    if isinstance(tokenizer, str | os.PathLike):
        raise ConfigError(
            f"tokenizer must be a tokenizer, got {tokenizer!r}; give "
            f"transformers.AutoTokenizer.from_pretrained({os.fspath(tokenizer)!r})."
        )
    check_vocabulary(tokenizer)
    broken = Broken(on_error)
    if not pack and tokenizer.pad_token_id is None:
        raise ConfigError(
            "this tokenizer has no padding token; give pack=True for blocks without padding, or "
            "set tokenizer.pad_token."
        )
    extra = [column for column in (pair_column, label_column) if column is not None]
    if pack and extra:
        raise ConfigError(f"{extra[0]}: packed blocks have neither pairs nor labels.")
    texts = _texts(source, limit, seed, text_column, pair_column, broken, extra)
    if pack:
        blocks = _blocks((text for text, _ in texts), tokenizer, length, limit)
        broken.report()
        ones = torch.ones_like(blocks)
        return Batches(
            lambda places: move(
                {"input_ids": blocks[list(places)], "attention_mask": ones[list(places)]}, device
            ),
            range(len(blocks)),
            batch_size,
        )
    known = list(islice(texts, limit))
    broken.report()
    if not known:
        raise BatchError("source has no text; give at least one.")

    def make(places: Sequence[int]) -> Tensors:
        rows = [known[i] for i in places]
        texts = [[text for text, _ in rows]]
        if pair_column is not None:
            texts.append([row[pair_column] for _, row in rows])
        encoded = tokenizer(
            *texts, truncation=True, max_length=length, padding="max_length", return_tensors="pt"
        )
        batch = dict(encoded)
        if label_column is not None:
            labels = [label_of(f"{text!r:.40}", row, label_column) for text, row in rows]
            batch["labels"] = torch.tensor(labels)
        return move(batch, device)

    return Batches(make, range(len(known)), batch_size)


_Sample: TypeAlias = tuple[str, Any]
"""A text and its row, of which the columns besides the text are read."""


def _texts(
    source: Source,
    limit: int | None,
    seed: int | None,
    text_column: str,
    pair_column: str | None,
    broken: Broken,
    extra: Sequence[str],
) -> Iterator[_Sample]:
    """Yield the texts that are not blank, in order, with those columns of their rows."""
    if isinstance(source, str | os.PathLike):
        source = read_lines(Path(source), broken)
    if isinstance(source, Sized):
        rows, order = rows_in_order(source, None, seed)
        samples: Iterable[tuple[str, Any]] = broken.rows(rows, order)
    else:
        if limit is None:
            raise ConfigError("limit: a stream needs one.")
        samples = ((f"row {i}", row) for i, row in enumerate(source))
    for name, row in samples:
        if extra or isinstance(row, Mapping):
            check_columns(row, (text_column, *extra))
        text = row[text_column] if isinstance(row, Mapping) else row
        pair = "-" if pair_column is None else row[pair_column]
        kinds = [type(part).__name__ for part in (text, pair) if not isinstance(part, str)]
        if kinds:
            broken.note(
                name,
                BatchError(
                    f"{name}: a text is needed, got a {kinds[0]}; drop such rows first, "
                    "or leave them out with on_error='skip'."
                ),
            )
        elif text.strip() and pair.strip():
            yield text, {column: row[column] for column in extra}


def read_lines(file: Path, broken: Broken) -> list[str]:
    """Return the lines of a text file that are not blank, without the space around them.

    Args:
        file: The file, in UTF-8.
        broken: What to do about a line that is not UTF-8.

    Raises:
        FileError: The file or a line cannot be read, or there is no text. The message names them.
    """
    try:
        content = file.read_bytes()
    except OSError as error:
        raise FileError(f"cannot read {file}: {error}.") from error
    lines = []
    for i, line in enumerate(_LINE_END.split(content.removeprefix(_BYTE_ORDER_MARK))):
        try:
            text = line.decode("utf-8").strip()
        except UnicodeDecodeError as error:
            name = f"line {i + 1} of {file}"
            broken.note(name, FileError(f"cannot read {name}: {error}; save the file as UTF-8."))
            continue
        if "\0" in text:
            name = f"line {i + 1} of {file}"
            broken.note(name, FileError(f"{name} is not UTF-8 text; save the file as UTF-8."))
        elif text:
            lines.append(text)
    if not lines:
        raise FileError(f"{file} has no text; give one text per line.")
    return lines


def _blocks(texts: Iterator[str], tokenizer: Any, length: int, limit: int | None) -> Tensor:
    """Return the texts joined and cut into full blocks, int64 ``[blocks, length]``."""
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
