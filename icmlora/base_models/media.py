"""Images and recordings of examples: bytes from anywhere, opened with limits. Pillow is imported when it is needed.

A row names a file; whoever reads the rows turns the name into a `Media`, which reads its bytes when they are needed:

    {"image": "cats/1.png"}  --beside the JSON lines-->   Media("cats/1.png", read)
    {"image": "sha256:..."}  --blobs of the store-->      Media("sha256:...", read)
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from icmlora.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image

MEDIA_KEYS = ("image", "audio")
"""The keys of a row that name a file."""
MAX_FILE = 32 * 2**20
"""Bytes of one image or recording."""
MAX_PIXELS = 64 * 10**6
"""Pixels of one image: what a good camera takes."""
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")


@dataclass(frozen=True)
class Media:
    """One image or recording. Two are equal if their names are."""

    name: str
    read: Callable[[], bytes] = field(compare=False, repr=False)


def open_image(media: Media) -> Image:
    """Decode an image, as RGB.

    Raises:
        DataError: It is not an image, is damaged, or is too large; or Pillow is not installed.
    """
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError as error:
        hint = "install the extra: pip install 'icm-lora[vision]'"
        raise DataError("reading images needs Pillow, which is not installed", hint=hint) from error
    data = media.read()
    if len(data) > MAX_FILE:
        raise DataError(f"has an image of {len(data)} bytes, more than {MAX_FILE}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise DataError(f"has an image of {image.width} x {image.height} pixels, more than {MAX_PIXELS}")
                return image.convert("RGB")
    except UnidentifiedImageError as error:
        raise DataError(f"has a file that is not an image ({', '.join(_FORMATS)})") from error
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise DataError(f"has an image that cannot be read: {error}") from error
