"""Rows and their files, read together."""

from __future__ import annotations

import pytest

from icmlora.fleet.context import with_files
from registry.errors import MissingBlob


def test_what_is_there_is_read_once() -> None:
    rows = iter(["one"])
    assert with_files(lambda: next(rows), str.upper) == "ONE"


def test_a_file_that_is_gone_sends_back_to_the_row_until_one_is_there() -> None:
    rows, files = iter(["one", "two", "three"]), {"three": b"3"}

    def read(row: str) -> bytes:
        if row not in files:
            raise MissingBlob(row)
        return files[row]

    assert with_files(lambda: next(rows), read) == b"3"


def test_a_file_that_the_row_still_names_is_missing() -> None:
    rows = iter(["one", "two", "two"])

    def read(row: str) -> bytes:
        raise MissingBlob(row)

    with pytest.raises(MissingBlob, match="two"):
        with_files(lambda: next(rows), read)
