"""Images and recordings of examples: untrusted bytes, opened with limits. Pillow is imported only when needed.

A row names a file. The reader of the rows turns the name into a `Media`, which reads its bytes on demand:

    {"image": "cats/1.png"}  --next to the JSON lines-->  Media("cats/1.png", read)
    {"image": "sha256:..."}  --blobs of the store-->      Media("sha256:...", read)
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from icmlora.errors import DataError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL.Image import Image

MEDIA_KEYS = ("image", "audio")
"""The keys of a row that name a file."""
MAX_FILE = 32 * 2**20
"""Maximum bytes of one image or recording."""
MAX_PIXELS = 64 * 10**6
"""Maximum pixels of one image: the resolution of a good camera."""
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")


@dataclass(frozen=True)
class Media:
    """One image or recording. Two are equal if their names are equal."""

    name: str
    read: Callable[[], bytes] = field(compare=False, repr=False)


Resolver = Callable[[str], Media]
"""Returns the file that a row names; raises `DataError` if it does not exist."""


def with_media(row: Mapping[str, Any], resolver: Resolver | None) -> Mapping[str, Any]:
    """Return a row with its file names replaced by the files; raise `DataError` if one is missing."""
    named = {key: row[key] for key in MEDIA_KEYS if isinstance(row.get(key), str)}
    if not named:
        return row
    if resolver is None:
        raise DataError("names a file, but files are read only from the folder of the rows")
    return {**row, **{key: resolver(name) for key, name in named.items()}}


def media_of(row: Mapping[str, Any], key: str) -> Media:
    """Return the image or recording of a row; raise `DataError` if there is none."""
    found = row.get(key)
    if isinstance(found, Mapping) and isinstance(reason := found.get("missing"), str):  # set when the row was packed
        raise DataError(reason)
    if not isinstance(found, Media):
        raise DataError(f"has no {key}" if found is None else f"has an {key} that is not a file name")
    return found


def image_of(row: Mapping[str, Any]) -> Media:
    """Return the image of a row, after a check of its header for format and size.

    Raises:
        DataError: There is no file, it is not an image, or it is too large.
    """
    found = media_of(row, "image")
    with _opened(found):
        return found


def image_size(media: Media) -> tuple[int, int]:
    """Return width and height in pixels without decoding the image."""
    with _opened(media) as image:
        return image.size


def open_image(media: Media) -> Image:
    """Decode an image to RGB; raise `DataError` if it is invalid or too large, or Pillow is not installed."""
    with _opened(media) as image:
        return image.convert("RGB")


@contextmanager
def _opened(media: Media) -> Iterator[Image]:
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
                yield image
    except UnidentifiedImageError as error:
        raise DataError(f"has a file that is not an image ({', '.join(_FORMATS)})") from error
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise DataError(f"has an image that cannot be read: {error}") from error


def read_sound(media: Media, rate: int) -> NDArray[np.float32]:
    """Read a 16-bit WAV file as one channel between -1 and 1, shape (samples,).

    Raises:
        DataError: It is not such a file, or its sample rate is not `rate`.
    """
    import wave

    import numpy as np

    data = media.read()
    if len(data) > MAX_FILE:
        raise DataError(f"has a recording of {len(data)} bytes, more than {MAX_FILE}")
    try:
        with wave.open(io.BytesIO(data)) as stream:
            channels, width, found = stream.getnchannels(), stream.getsampwidth(), stream.getframerate()
            samples = stream.readframes(stream.getnframes())
    except (wave.Error, EOFError, ValueError) as error:
        raise DataError(f"has a recording that is not a WAV file: {error}") from error
    if width != 2 or found != rate:
        fact = f"has a recording of {8 * width} bits at {found} Hz; the base model needs 16 bits at {rate} Hz"
        raise DataError(fact)
    whole = len(samples) - len(samples) % (2 * channels)
    sound = np.frombuffer(samples[:whole], dtype="<i2").reshape(-1, channels).mean(axis=1) / 2**15
    if not len(sound):
        raise DataError("has an empty recording")
    return np.asarray(sound, dtype=np.float32)
