"""Batches from what users have: folders of images, text files, `datasets` data sets, captions."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias, overload

import torch
from torch import Tensor

from solpath.config import check_count
from solpath.errors import BatchError, ConfigError, FileError

Tensors: TypeAlias = dict[str, Tensor]
Source: TypeAlias = str | os.PathLike[str] | Iterable[Any]

IMAGE_SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})
_TOKENISED_AT_ONCE = 256
_NO_LIMIT = 100_000  # what tokenizers without a longest text give is far above


class Batches(Sequence[Tensors]):
    """Batches of samples that are read when a batch is asked for, and not kept.

    ``list(batches)`` reads all of them once and keeps them; ``batches[:100]`` reads none yet. The
    last batch may be shorter.
    """

    def __init__(self, make: Callable[[Sequence[int]], Tensors], order: Sequence[int], size: int):
        self._make, self._order, self._size = make, order, size

    def __len__(self) -> int:
        return -(-len(self._order) // self._size)

    @overload
    def __getitem__(self, index: int) -> Tensors: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Tensors]: ...
    def __getitem__(self, index: int | slice) -> Tensors | Sequence[Tensors]:
        places = range(len(self))[index]
        if not isinstance(places, range):
            start = places * self._size
            return self._make(self._order[start : start + self._size])
        if places.step != 1:
            return [self[place] for place in places]
        part = self._order[places.start * self._size : places.stop * self._size]
        return Batches(self._make, part, self._size)


def image_batches(
    source: Source,
    processor: Any,
    *,
    batch_size: int = 32,
    limit: int | None = None,
    seed: int | None = 0,
    image_column: str = "image",
    label_column: str | None = None,
    device: str | torch.device = "cpu",
) -> Batches:
    """Batches of images, read when they are asked for.

    Args:
        source: a folder, searched with all its subfolders; or images, paths, or rows with an
            `image_column`: a list, a data set of `datasets`, a stream. All are made RGB.
        processor: the model's image processor.
        batch_size: images per batch.
        limit: images at most, the first ones in the order of `seed`; a stream needs one.
        seed: of the order; None keeps that of `source`, or for a folder that of the paths. A stream
            is read as it comes.
        image_column: of the rows.
        label_column: of the rows; adds ``labels``. In a folder the label is the place of the first
            subfolder among all of them in sorted order, as in ImageNet.
        device: where the batches go.

    Returns:
        Dicts of ``pixel_values``, float ``[batch, channels, height, width]``, and of ``labels``,
        int64 ``[batch]``, when asked.

    Raises:
        FileError: no such folder, no images in it, or an unreadable image.
        BatchError: an empty `source`, or what is neither an image nor a path.
        ConfigError: a missing column, a setting out of range, or Pillow not installed.

    Example:
        >>> batches = image_batches("photos/", processor, limit=512)  # doctest: +SKIP
    """
    _check_counts(batch_size=batch_size, limit=limit)
    _pillow()
    if isinstance(source, str | os.PathLike):
        source = _image_files(Path(source), image_column, label_column)
    rows, order = _rows(source, limit, seed)
    columns = [image_column] if label_column is None else [image_column, label_column]
    if label_column is not None or isinstance(rows[order[0]], Mapping):
        _check_columns(rows[order[0]], columns)

    def make(places: Sequence[int]) -> Tensors:
        part = [rows[i] for i in places]
        images = [row[image_column] if isinstance(row, Mapping) else row for row in part]
        batch = dict(processor(images=_read_images(images), return_tensors="pt"))
        if label_column is not None:
            batch["labels"] = torch.tensor([int(row[label_column]) for row in part])
        return _to(batch, device)

    return Batches(make, order, batch_size)


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
    _check_counts(batch_size=batch_size, length=length, limit=limit)
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
            lambda places: _to(
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
        return _to(dict(encoded), device)

    return Batches(make, range(len(known)), batch_size)


def image_text_batches(
    source: Iterable[Any],
    processor: Any,
    *,
    batch_size: int = 32,
    length: int | None = None,
    limit: int | None = None,
    seed: int | None = 0,
    image_column: str = "image",
    text_column: str = "text",
    device: str | torch.device = "cpu",
) -> Batches:
    """Batches of images with one text each, for models with two towers such as CLIP.

    Args:
        source: pairs (image or path, text), or rows with an `image_column` and a `text_column`.
        processor: the model's, of images and text.
        batch_size: pairs per batch.
        length: tokens per text, cut or padded; None takes the tokenizer's longest.
        limit: pairs at most; a stream needs one.
        seed: of the order; None keeps it. A stream is read as it comes.
        image_column: of the rows.
        text_column: of the rows.
        device: where the batches go.

    Returns:
        Dicts of what the model takes: ``pixel_values``, float ``[batch, channels, height, width]``,
        and ``input_ids`` and more, int64 ``[batch, length]``.

    Raises:
        FileError: an unreadable image.
        BatchError: an empty `source`, or a sample that is no pair of image and text.
        ConfigError: a missing column, a setting out of range, or Pillow not installed.

    Example:
        >>> pairs = [("cat.png", "a cat"), ("dog.png", "a dog")]
        >>> batches = image_text_batches(pairs, processor)  # doctest: +SKIP
    """
    _check_counts(batch_size=batch_size, limit=limit)
    _pillow()
    if length is None:
        length = processor.tokenizer.model_max_length
        if length > _NO_LIMIT:
            raise ConfigError("length: this tokenizer has no longest text; give a length.")
    _check_counts(length=length)
    rows, order = _rows(source, limit, seed)

    def pair(row: Any) -> tuple[Any, str]:
        if isinstance(row, Mapping):
            _check_columns(row, (image_column, text_column))
            row = row[image_column], row[text_column]
        if not isinstance(row, Sequence) or len(row) != 2 or not isinstance(row[1], str):
            raise BatchError(f"a sample must be an image and a text, got {row!r:.100}.")
        return row[0], row[1]

    pair(rows[order[0]])

    def make(places: Sequence[int]) -> Tensors:
        images, texts = zip(*(pair(rows[i]) for i in places), strict=True)
        encoded = processor(
            images=_read_images(images),
            text=list(texts),
            truncation=True,
            max_length=length,
            padding="max_length",
            return_tensors="pt",
        )
        return _to(dict(encoded), device)

    return Batches(make, order, batch_size)


def _check_counts(**values: int | None) -> None:
    for name, value in values.items():
        if value is not None:
            check_count(name, value, 1)


def _check_columns(row: Any, columns: Iterable[str]) -> None:
    if not isinstance(row, Mapping):
        raise ConfigError(f"rows with columns are needed, got a {type(row).__name__}.")
    for column in columns:
        if column not in row:
            raise ConfigError(f"there is no column {column!r}; the columns are {', '.join(row)}.")


def _rows(source: Iterable[Any], limit: int | None, seed: int | None) -> tuple[Any, Sequence[int]]:
    """Something to index, and the places to take, in order; a stream is read up to `limit`."""
    if isinstance(source, Sized):
        count = len(source)
        order: Sequence[int] = range(count)
        if seed is not None:
            order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
        rows: Any = source
    elif limit is None:
        raise ConfigError("limit: a stream needs one.")
    else:
        rows = list(islice(source, limit))
        order = range(len(rows))
    if not len(order):
        raise BatchError("source is empty; give at least one sample.")
    return rows, order[:limit]


def _image_files(folder: Path, image_column: str, label_column: str | None) -> list[dict[str, Any]]:
    """Rows of all images below `folder`, sorted by path, with the place of their subfolder."""
    if not folder.is_dir():
        raise FileError(f"{folder} is not a folder of images.")
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    if not files:
        raise FileError(f"{folder} has no images; known are {', '.join(sorted(IMAGE_SUFFIXES))}.")
    rows: list[dict[str, Any]] = [{image_column: file} for file in files]
    if label_column is not None:
        if loose := [file for file in files if file.parent == folder]:
            raise FileError(f"{loose[0]} is in no subfolder, so it has no label.")
        names = [file.relative_to(folder).parts[0] for file in files]
        places = {name: place for place, name in enumerate(sorted(set(names)))}
        for row, name in zip(rows, names, strict=True):
            row[label_column] = places[name]
    return rows


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise ConfigError(
            "images need Pillow; install it with: pip install 'solpath[data]'."
        ) from error
    return Image


def _read_images(images: Sequence[Any]) -> list[Any]:
    """RGB images in memory, from images or paths; decoded in threads, which release the GIL."""
    image_module = _pillow()

    def read(image: Any) -> Any:
        if isinstance(image, image_module.Image):
            return image.convert("RGB")
        if not isinstance(image, str | os.PathLike):
            raise BatchError(f"an image or a path is needed, got a {type(image).__name__}.")
        try:
            with image_module.open(image) as opened:
                return opened.convert("RGB")
        except (OSError, ValueError, SyntaxError, image_module.DecompressionBombError) as error:
            raise FileError(f"cannot read the image {os.fspath(image)}: {error}.") from error

    with ThreadPoolExecutor() as pool:
        return list(pool.map(read, images))


def _texts(source: Source, limit: int | None, seed: int | None, text_column: str) -> Iterator[str]:
    """Texts that are not empty, in order."""
    if isinstance(source, str | os.PathLike):
        source = _lines(Path(source))
    if isinstance(source, Sized):
        rows, order = _rows(source, None, seed)
        samples: Iterable[Any] = (rows[i] for i in order)
    else:
        if limit is None:
            raise ConfigError("limit: a stream needs one.")
        samples = source
    return (text for text in (_text(row, text_column) for row in samples) if text.strip())


def _text(row: Any, column: str) -> str:
    if isinstance(row, Mapping):
        _check_columns(row, (column,))
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


def _to(batch: Mapping[str, Any], device: str | torch.device) -> Tensors:
    return {name: value.to(device) for name, value in batch.items()}
