"""Digests become paths in one place, which checks them."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from registry.manifests import is_digest
from registry.storage.paths import StorePaths

PATHS = StorePaths(Path("store"))


def test_a_blob_lies_in_the_folder_of_its_first_digit() -> None:
    digest = "3f" + "0" * 62
    assert PATHS.file("blobs", digest) == Path("store/blobs/3") / digest


@pytest.mark.parametrize("text", ["", "../../x", "3F" + "0" * 62, "0" * 63, "0" * 65, "0" * 64 + "\n", "é" * 64])
def test_what_is_no_digest_never_becomes_a_path(text: str) -> None:
    with pytest.raises(ValueError, match="not a digest"):
        PATHS.file("manifests", text)


@given(st.binary(min_size=32, max_size=32))
def test_every_sha256_in_hexadecimal_is_a_digest(raw: bytes) -> None:
    assert is_digest(raw.hex())
