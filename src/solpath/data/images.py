"""Batches of images, and of images with texts, from folders, lists and data sets."""

import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

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

IMAGE_SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})
_NO_LIMIT = 100_000  # what tokenizers without a longest text give is far above


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
    check_counts(batch_size=batch_size, limit=limit)
    _pillow()
    if isinstance(source, str | os.PathLike):
        source = _image_files(Path(source), image_column, label_column)
    rows, order = rows_in_order(source, limit, seed)
    columns = [image_column] if label_column is None else [image_column, label_column]
    if label_column is not None or isinstance(rows[order[0]], Mapping):
        check_columns(rows[order[0]], columns)

    def make(places: Sequence[int]) -> Tensors:
        part = [rows[i] for i in places]
        images = [row[image_column] if isinstance(row, Mapping) else row for row in part]
        batch = dict(processor(images=_read_images(images), return_tensors="pt"))
        if label_column is not None:
            batch["labels"] = torch.tensor([int(row[label_column]) for row in part])
        return move(batch, device)

    return Batches(make, order, batch_size)


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
    check_counts(batch_size=batch_size, limit=limit)
    _pillow()
    if length is None:
        length = processor.tokenizer.model_max_length
        if length > _NO_LIMIT:
            raise ConfigError("length: this tokenizer has no longest text; give a length.")
    check_counts(length=length)
    rows, order = rows_in_order(source, limit, seed)

    def pair(row: Any) -> tuple[Any, str]:
        if isinstance(row, Mapping):
            check_columns(row, (image_column, text_column))
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
        return move(dict(encoded), device)

    return Batches(make, order, batch_size)


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
