"""Decode images to RGB, as a viewer shows them."""

import os
import struct
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from solpath.data.batches import Broken
from solpath.errors import BatchError, ConfigError, FileError

_WITH_ALPHA = ("LA", "La", "PA", "RGBA", "RGBa")
_ORIENTATION = 0x0112  # the EXIF tag that says how a camera was held


def pillow() -> Any:
    """Return ``PIL.Image``; raise `ConfigError` if Pillow is not installed."""
    try:
        from PIL import Image
    except ImportError as error:
        raise ConfigError(
            "images need Pillow; install it with: pip install 'solpath[data]'."
        ) from error
    return Image


def read_images(images: Sequence[tuple[str, Any]], broken: Broken) -> list[Any]:
    """Return RGB images in memory, decoded in threads because decoding releases the GIL.

    Args:
        images: Name, for messages, and image or file of each.
        broken: Decides about images that cannot be read, which are None in the result.

    Raises:
        FileError: A file cannot be read, and `broken` raises.
        BatchError: An image is none, or its values have no known white, and `broken` raises.
    """
    with ThreadPoolExecutor() as pool:
        found = list(pool.map(lambda named: _read(*named), images))
    for i, image in enumerate(found):
        if isinstance(image, FileError | BatchError):
            broken.note(images[i][0], image)
            found[i] = None
    return found


def _read(name: str, image: Any) -> Any:
    """Return an RGB image, or the error that says why there is none."""
    module = pillow()
    try:
        if isinstance(image, module.Image):
            return as_shown(image)
        if not isinstance(image, str | os.PathLike):
            return BatchError(
                f"{name}: an image or a path is needed, got a {type(image).__name__}."
            )
        if os.path.exists(image) and not os.path.isfile(image):  # a pipe would be waited for
            return FileError(f"cannot read the image {name}: it is not a regular file.")
        with module.open(image) as opened:
            return as_shown(opened)
    except BatchError as error:
        return BatchError(f"{name}: {error}")
    except (OSError, ValueError, SyntaxError, module.DecompressionBombError) as error:
        return FileError(f"cannot read the image {name}: {error}.")


def as_shown(image: Any) -> Any:
    """Return an image of any mode in RGB, as a viewer shows it.

    - It is turned upright, if it says how the camera was held.
    - What is transparent shows white.
    - 16-bit grays are scaled to 8 bits. Mode ``I`` has 32 bits and no white of its own: values
      of up to 255 are taken as they are, up to 65535 as 16 bits.
    - Grays of mode ``F`` are taken from 0 to 1 if all of them are, or else from 0 to 255.

    Args:
        image: An image of Pillow, which is left untouched.

    Raises:
        BatchError: The values of a mode ``I`` or ``F`` are out of these ranges.
        ValueError: Pillow cannot convert the mode.

    Example:
        >>> import numpy as np
        >>> from PIL import Image
        >>> as_shown(Image.fromarray(np.array([[0, 257, 65535]], np.uint16))).getpixel((2, 0))
        (255, 255, 255)
    """
    if _orientation(image) != 1:
        from PIL import ImageOps

        image = ImageOps.exif_transpose(image)
    if image.mode == "I" or image.mode.startswith("I;16"):
        image = _from_integers(image)
    elif image.mode == "F":
        image = _from_floats(image)
    palette = image.palette if image.mode == "P" else None
    if (
        image.mode not in _WITH_ALPHA
        and "transparency" not in image.info
        and not (palette is not None and palette.mode.endswith("A"))
    ):
        return image.convert("RGB")
    image = image.convert("LA" if image.mode == "La" else "RGBA").convert("RGBA")
    if image.getchannel("A").getextrema()[0] == 255:
        return image.convert("RGB")
    white = pillow().new("RGBA", image.size, "white")
    white.alpha_composite(image)
    return white.convert("RGB")


def _orientation(image: Any) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except (OSError, SyntaxError, ValueError, TypeError, struct.error):  # it says nothing readable
        return 1


def _from_integers(image: Any) -> Any:
    """Return an image of grays of more than 8 bits in 8 bits, transparent where it said so."""
    values = np.asarray(image).astype(np.int64)
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 65535:
        raise BatchError(f"grays from {low} to {high} have no known white; scale them to 0 to 255.")
    if image.mode == "I" and image.format != "PNG" and high <= 255:
        return image
    gray = pillow().fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))
    clear = image.info.get("transparency")
    if not isinstance(clear, int):
        return gray
    alpha = pillow().fromarray(np.where(values == clear, 0, 255).astype(np.uint8))
    return pillow().merge("LA", (gray, alpha))


def _from_floats(image: Any) -> Any:
    values = np.asarray(image)
    low, high = float(values.min()), float(values.max())
    if not (low >= 0 and high <= 255):  # or NaN
        raise BatchError(f"grays from {low} to {high} have no known white; scale them to 0 to 1.")
    return pillow().fromarray(np.rint(values * 255).astype(np.uint8)) if high <= 1 else image
