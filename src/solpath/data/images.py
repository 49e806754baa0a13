"""Batches of images, and of images with texts, from folders, lists and data sets."""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

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
from solpath.data.decoding import pillow, read_images
from solpath.errors import BatchError, ConfigError, FileError

IMAGE_SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})
_NO_LIMIT = 100_000  # a tokenizer without a longest text gives far more


def image_batches(
    source: Source,
    processor: Any,
    *,
    batch_size: int = 32,
    limit: int | None = None,
    seed: int | None = 0,
    image_column: str = "image",
    label_column: str | None = None,
    on_error: OnError = "raise",
    device: str | torch.device = "cpu",
) -> Batches:
    """Return batches of images, which are read and processed only when a batch is asked for.

    Args:
        source: A folder, which is searched with all its subfolders; or an iterable (a list, a data
            set of `datasets`, a table of pandas, a stream) of images, of image files, or of rows
            with an `image_column`. Every image is converted to RGB as a viewer shows it: upright,
            on white where it is transparent, and 16-bit grays scaled to 8 bits.
        processor: The image processor of the model.
        batch_size: The number of images per batch.
        limit: The largest number of images: the first ones in the order that `seed` gives. None
            takes all. A stream needs a limit.
        seed: Seeds the order of the images. None keeps the order of the source; files of a folder
            are then sorted by name. A stream always keeps its order.
        image_column: The column of the images, if the source has rows.
        label_column: The column of the labels, which are added as ``labels``. None adds no labels.
            For a folder, any name does: an image is labelled with the index of its top-level
            subfolder among all of them in sorted order, as in ImageNet.
        on_error: What happens to an image that cannot be read: ``"raise"`` raises the error
            below. ``"skip"`` leaves it out of its batch, and a warning counts and names it.
        device: The device that the batches are moved to.

    Returns:
        A sequence of dicts of ``pixel_values``, float ``[batch, channels, height, width]``, and, if
        asked for, ``labels``, int64 ``[batch]``.

    Raises:
        FileError: There is no such folder, it holds no images, or an image in it has no subfolder
            to give it a label. An image that cannot be read raises it when its batch is read.
        BatchError: The source is empty. A sample that is neither an image nor a file, a label that
            is no whole number, or a batch of which nothing can be read raises it when its batch is
            read.
        ConfigError: A column is missing, a stream has no limit, a setting is out of its range, or
            Pillow is not installed.

    Example:
        >>> from PIL import Image
        >>> from transformers import ViTImageProcessor
        >>> processor = ViTImageProcessor(size={"height": 32, "width": 32})
        >>> photos = [Image.new("RGB", (64, 48)) for _ in range(5)]
        >>> batches = solpath.image_batches(photos, processor, batch_size=4)
        >>> [tuple(batch["pixel_values"].shape) for batch in batches]
        [(4, 3, 32, 32), (1, 3, 32, 32)]
    """
    check_counts(batch_size=batch_size, limit=limit)
    broken = Broken(on_error)
    pillow()
    if isinstance(source, str | os.PathLike):
        source = image_files(Path(source), image_column, label_column)
    rows, order = rows_in_order(source, limit, seed)
    columns = [image_column] if label_column is None else [image_column, label_column]
    for _, row in broken.rows(rows, order[:1]):
        if label_column is not None or isinstance(row, Mapping):
            check_columns(row, columns)

    def make(places: Sequence[int]) -> Tensors:
        part = list(broken.rows(rows, places))
        named = [
            _named(name, row[image_column] if isinstance(row, Mapping) else row)
            for name, row in part
        ]
        images = read_images(named, broken)
        part = [known for known, image in zip(part, images, strict=True) if image is not None]
        broken.report()
        _check_any(part, places)
        batch = dict(
            processor(images=[image for image in images if image is not None], return_tensors="pt")
        )
        if label_column is not None:
            batch["labels"] = torch.tensor([label_of(*known, label_column) for known in part])
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
    on_error: OnError = "raise",
    device: str | torch.device = "cpu",
) -> Batches:
    """Return batches of images with one text each, for models with two towers such as CLIP.

    Images are read, and texts are tokenized, only when a batch is asked for.

    Args:
        source: An iterable of tuples (image or image file, text), or of rows with an `image_column`
            and a `text_column`: a list, a data set of `datasets`, a table of pandas, a stream.
            Every image is converted to RGB as in `image_batches`.
        processor: The processor of the model, for images and text.
        batch_size: The number of images per batch.
        length: The number of tokens per text; texts are truncated or padded to it. None takes the
            longest text that the tokenizer allows.
        limit: The largest number of samples: the first ones in the order that `seed` gives. None
            takes all. A stream needs a limit.
        seed: Seeds the order of the samples. None keeps the order of the source. A stream always
            keeps its order.
        image_column: The column of the images, if the source has rows.
        text_column: The column of the texts, if the source has rows.
        on_error: What happens to a sample that cannot be read: ``"raise"`` raises the error
            below. ``"skip"`` leaves it out of its batch, and a warning counts and names it.
        device: The device that the batches are moved to.

    Returns:
        A sequence of dicts of what the model takes: ``pixel_values``, float
        ``[batch, channels, height, width]``, and ``input_ids`` and whatever else the processor
        gives for text, int64 ``[batch, length]``.

    Raises:
        FileError: An image cannot be read. This is raised when its batch is read.
        BatchError: The source is empty, a sample is no tuple of an image and a text, or nothing of
            a batch can be read.
        ConfigError: A column is missing, a stream has no limit, a setting is out of its range,
            there is no `length` and the tokenizer knows none, it knows no words, or Pillow is not
            installed.

    Example:
        >>> from PIL import Image
        >>> from transformers import ByT5Tokenizer, CLIPImageProcessor, CLIPProcessor
        >>> images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32)
        >>> processor, photo = CLIPProcessor(images, ByT5Tokenizer()), Image.new("RGB", (64, 48))
        >>> batches = solpath.image_text_batches([(photo, "a cat")], processor, length=8)
        >>> {name: tuple(value.shape) for name, value in sorted(batches[0].items())}
        {'attention_mask': (1, 8), 'input_ids': (1, 8), 'pixel_values': (1, 3, 32, 32)}
    """
    check_counts(batch_size=batch_size, limit=limit)
    check_vocabulary(processor.tokenizer)
    broken = Broken(on_error)
    pillow()
    if length is None:
        length = processor.tokenizer.model_max_length
        if length > _NO_LIMIT:
            raise ConfigError("length: this tokenizer has no longest text; give a length.")
    check_counts(length=length)
    rows, order = rows_in_order(source, limit, seed)

    def pairs(places: Sequence[int]) -> Iterator[tuple[str, Any, str]]:
        for name, row in broken.rows(rows, places):
            if isinstance(row, Mapping):
                check_columns(row, (image_column, text_column))
                row = row[image_column], row[text_column]
            if isinstance(row, Sequence) and len(row) == 2 and isinstance(row[1], str):
                yield *_named(name, row[0]), row[1]
            else:
                text = f"{name}: a sample must be an image and a text, got {row!r:.100}."
                broken.note(name, BatchError(text))

    list(pairs(order[:1]))

    def make(places: Sequence[int]) -> Tensors:
        part = list(pairs(places))
        images = read_images([(name, image) for name, image, _ in part], broken)
        known = [
            (image, text)
            for image, (*_, text) in zip(images, part, strict=True)
            if image is not None
        ]
        broken.report()
        _check_any(known, places)
        encoded = processor(
            images=[image for image, _ in known],
            text=[text for _, text in known],
            truncation=True,
            max_length=length,
            padding="max_length",
            return_tensors="pt",
        )
        return move(dict(encoded), device)

    return Batches(make, order, batch_size)


def is_image(path: Path) -> bool:
    """Return whether something in a folder has the name of an image, and is no folder."""
    return path.suffix.lower() in IMAGE_SUFFIXES and not path.is_dir()


def image_files(folder: Path, image_column: str, label_column: str | None) -> list[dict[str, Any]]:
    """Return a row for every image below `folder`, sorted by location, labelled if asked for."""
    if not folder.is_dir():
        raise FileError(f"{folder} is not a folder of images.")
    files = sorted(path for path in folder.rglob("*") if is_image(path))
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


def _named(name: str, image: Any) -> tuple[str, Any]:
    """Return an image with its file, if it is one, or else its row, for messages."""
    return (os.fspath(image) if isinstance(image, str | os.PathLike) else name), image


def _check_any(known: Sequence[Any], places: Sequence[int]) -> None:
    """Raise `BatchError` if nothing of a batch could be read."""
    if not known:
        raise BatchError(
            f"none of the {len(places)} samples of a batch can be read, row {places[0]} the first."
        )
