"""Digests become paths in one place, which checks them; a folder that is not this version's store stays as it is."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given, strategies as st

from registry.errors import DamagedStore, NotAStore, StoreTooNew, StoreTooOld
from registry.manifests import is_digest
from registry.storage.paths import StorePaths
from registry.store import Store

PATHS = StorePaths(Path("store"))


def test_a_blob_lies_in_the_folder_of_its_first_digit() -> None:
    digest = "3f" + "0" * 62
    assert PATHS.file("blobs", digest) == f"store/blobs/3/{digest}"


@pytest.mark.parametrize("text", ["", "../../x", "3F" + "0" * 62, "0" * 63, "0" * 65, "0" * 64 + "\n", "é" * 64])
def test_what_is_no_digest_never_becomes_a_path(text: str) -> None:
    with pytest.raises(ValueError, match="not a digest"):
        PATHS.file("manifests", text)


@given(st.binary(min_size=32, max_size=32))
def test_every_sha256_in_hexadecimal_is_a_digest(raw: bytes) -> None:
    assert is_digest(raw.hex())


@pytest.mark.parametrize(
    ("text", "error"),
    [("icm store 10\n", StoreTooOld), ("icm manifests 2\n", StoreTooNew), ("icm manifests", DamagedStore)],
)
@pytest.mark.parametrize("options", [{}, {"create": True}, {"read_only": True}])
def test_a_store_of_another_version_is_refused_and_not_touched(
    tmp_path: Path, text: str, error: type[Exception], options: dict[str, bool]
) -> None:
    (tmp_path / "FORMAT").write_text(text)
    (tmp_path / "registry.db").write_bytes(b"rows")
    with pytest.raises(error):
        Store.open(tmp_path, **options)  # type: ignore[arg-type]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["FORMAT", "registry.db"]
    assert (tmp_path / "registry.db").read_bytes() == b"rows"


@pytest.mark.parametrize("read_only", [False, True])
def test_two_stores_that_share_a_database_are_refused(tmp_path: Path, read_only: bool) -> None:
    Store.open(tmp_path / "store", create=True).close()
    (tmp_path / "copy").mkdir()
    os.link(tmp_path / "store" / "registry.db", tmp_path / "copy" / "registry.db")  # as `cp -al` does
    with pytest.raises(
        NotAStore, match=r"shares its database with another store: registry\.db has 2 hard links"
    ) as error:
        Store.open(tmp_path / "store", read_only=read_only)
    assert error.value.hint == f"make a real copy: `cp -a {tmp_path / 'store'} NEW`"
