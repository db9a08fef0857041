"""Images of examples are decoded with limits, and what cannot be decoded is told as a fact about its row."""

from __future__ import annotations

import io
import struct
import zlib
from contextlib import suppress

import pytest
from hypothesis import given, strategies as st
from PIL import Image

from icmlora.base_models.examples import media
from icmlora.base_models.examples.media import Media, open_image
from icmlora.errors import DataError


def image_bytes(form: str = "PNG", mode: str = "RGB", size: tuple[int, int] = (6, 4)) -> bytes:
    stream = io.BytesIO()
    Image.new(mode, size, 1).save(stream, form)
    return stream.getvalue()


def as_media(data: bytes) -> Media:
    return Media("some.png", lambda: data)


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose head promises that many pixels."""
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "BMP", "GIF"])
def test_an_image_of_every_form_is_opened_as_rgb(form: str) -> None:
    image = open_image(as_media(image_bytes(form)))
    assert (image.mode, image.size) == ("RGB", (6, 4))


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "1"])
def test_grey_images_and_images_with_transparency_become_rgb(mode: str) -> None:
    assert open_image(as_media(image_bytes(mode=mode))).mode == "RGB"


@pytest.mark.parametrize("size", [(9000, 9000), (60000, 60000)])
def test_an_image_with_too_many_pixels_is_refused_before_it_is_decoded(size: tuple[int, int]) -> None:
    with pytest.raises(DataError, match="pixels"):
        open_image(as_media(bomb(*size)))


def test_a_file_that_is_too_long_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(media, "MAX_FILE", 10)
    with pytest.raises(DataError, match="more than 10"):
        open_image(as_media(image_bytes()))


def test_an_image_that_is_cut_short_is_refused() -> None:
    with pytest.raises(DataError, match="cannot be read"):
        open_image(as_media(image_bytes(size=(300, 300))[:60]))


def test_forms_that_pillow_reads_and_nobody_trains_on_are_refused() -> None:
    with pytest.raises(DataError, match="not an image"):
        open_image(as_media(image_bytes("TIFF")))


@given(st.binary(max_size=200))
def test_any_bytes_give_an_image_or_a_refusal(data: bytes) -> None:
    with suppress(DataError):
        assert open_image(as_media(data)).mode == "RGB"


def test_media_are_compared_by_their_names() -> None:
    assert Media("a", lambda: b"1") == Media("a", lambda: b"2") != Media("b", lambda: b"1")
