"""Rows of a file in every form, read from bytes that anybody may have written."""

from __future__ import annotations

import codecs
import contextlib
import io
import json
import sys
from typing import Any

import pytest
from hypothesis import given, strategies as st

from icmlora.base_models.examples import rows
from icmlora.base_models.examples.examples import Example, parse_examples
from icmlora.base_models.examples.rows import BadRow, read_rows
from icmlora.errors import DataError

ROWS = st.lists(st.dictionaries(st.text(max_size=5), st.integers() | st.text(max_size=30) | st.none()), max_size=6)
FRAGMENTS = st.sampled_from(
    [
        *(b"[", b"]", b"{", b"}", b",", b":", b'"', b"\n", b"\r\n", b"\xff", b"\xef\xbb\xbf", b"\xff\xfe", b"PAR1"),
        *(b'{"text": "a"}', b'{"messages": [{"role": "user", "content": "a"}]}', b"1e999", b"NaN", b"\\ud800", b"\x00"),
    ]
)


def values(data: bytes) -> list[Any]:
    return [value for _, value in read_rows(data).values]


def parquet(table: dict[str, list[Any]], **options: Any) -> bytes:
    """Write columns as a Parquet file."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet as files

    buffer = io.BytesIO()
    files.write_table(pyarrow.table(table), buffer, **options)
    return buffer.getvalue()


@pytest.mark.slow
@given(ROWS)
def test_json_lines_give_their_rows(expected: list[dict[str, Any]]) -> None:
    assert values("\n".join(map(json.dumps, expected)).encode()) == expected


@pytest.mark.slow
@given(ROWS, st.sampled_from([None, 1]))
def test_an_array_gives_its_elements(expected: list[dict[str, Any]], indent: int | None) -> None:
    assert values(json.dumps(expected, indent=indent, ensure_ascii=False).encode()) == expected


def test_elements_longer_than_the_first_look_are_read_whole() -> None:
    long = [{"text": "x" * 100_000}, {"text": "y"}]
    assert values(json.dumps(long).encode()) == long


def test_what_follows_a_broken_element_is_not_read() -> None:
    assert values(b'[{"text": "a"}, {"text": oops}, {"text": "b"}]')[0] == {"text": "a"}
    assert [type(value) for value in values(b'[{"text": "a"}, {"text": oops}, {"text": "b"}]')] == [dict, BadRow]


def test_an_array_that_was_cut_off_gives_what_is_there() -> None:
    assert [type(value) for value in values(b'[{"text": "a"}, {"te')] == [dict, BadRow]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-8-sig"])
def test_files_with_a_byte_order_mark_are_read(encoding: str) -> None:
    assert values('{"text": "é"}\r\n{"text": "料"}\r\n'.encode(encoding)) == [{"text": "é"}, {"text": "料"}]


def test_blank_lines_count_as_lines_but_not_as_rows() -> None:
    assert [number for number, _ in read_rows(b'\n{"text": "a"}\n \n{"text": "b"}').values] == [2, 4]


def test_one_bad_line_costs_only_itself() -> None:
    found = parse_examples(b'{"text": "a"}\n{"text": "caf\xe9"}\nnull\n{"text": "b"}\n')
    assert found.items == (Example("", "a"), Example("", "b"))
    assert (found.skipped, found.reason) == (2, "line 2 is not UTF-8: invalid continuation byte")


@pytest.mark.parametrize("deep", [b"[" * 100_000, b'{"a":' * 100_000])
def test_deep_nesting_is_a_bad_row(deep: bytes) -> None:
    (first, *_) = values(b'{"text": "a"}\n' + deep)[1:]
    assert isinstance(first, BadRow)
    assert all(isinstance(value, BadRow) for value in values(deep))


def test_a_line_over_the_limit_is_a_bad_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "MAX_ROW_BYTES", 20)
    assert values(b'{"text": "a"}\n{"text": "' + b"x" * 40 + b'"}\n{"text": "b"}') == [
        {"text": "a"},
        BadRow("is longer than 0 MiB"),
        {"text": "b"},
    ]


def test_an_element_over_the_limit_ends_the_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "MAX_ROW_BYTES", 20)
    monkeypatch.setattr(rows, "_FIRST_WINDOW", 16)
    data = json.dumps([{"text": "a"}, {"text": "x" * 400}, {"text": "b"}]).encode()
    assert [type(value) for value in values(data)] == [dict, BadRow]


@pytest.mark.parametrize("letter", ["x", "料"])
def test_an_element_over_the_limit_is_refused_at_any_size(monkeypatch: pytest.MonkeyPatch, letter: str) -> None:
    monkeypatch.setattr(rows, "MAX_ROW_BYTES", 60)
    monkeypatch.setattr(rows, "_FIRST_WINDOW", 16)  # the next windows would be 128 and 1,024 without the limit
    long = letter * (100 // len(letter.encode()))
    data = json.dumps([{"text": "a"}, {"text": long}], ensure_ascii=False).encode()
    assert [type(value) for value in values(data)] == [dict, BadRow]
    assert "longer than 0 MiB" in values(data)[1].reason


def test_parquet_gives_its_rows() -> None:
    table = {"text": ["one", "two"], "id": [1, 2]}
    assert values(parquet(table)) == [{"text": "one", "id": 1}, {"text": "two", "id": 2}]


def test_chats_in_parquet_are_read_as_from_json() -> None:
    turns = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]
    from_json = parse_examples(json.dumps({"messages": turns}).encode())
    assert parse_examples(parquet({"messages": [turns]})).items == from_json.items


def test_a_bad_row_of_parquet_is_called_a_row() -> None:
    found = parse_examples(parquet({"text": ["one", "", None]}))
    assert (len(found), found.skipped, found.reason) == (1, 2, "row 2 is empty text")


@pytest.mark.parametrize("keep", [4, 20, -20])
def test_damaged_parquet_is_refused_as_data(keep: int) -> None:
    with pytest.raises(DataError, match="the Parquet file cannot be read"):
        parse_examples(parquet({"text": ["one", "two"]})[:keep])


@given(st.data())
def test_parquet_with_any_bytes_changed_is_read_or_refused(data: st.DataObject) -> None:
    damaged = bytearray(parquet({"text": ["one", "two"] * 20}))
    for place in data.draw(st.lists(st.integers(4, len(damaged) - 1), min_size=1, max_size=8)):
        damaged[place] = data.draw(st.integers(0, 255))
    with contextlib.suppress(DataError):
        parse_examples(bytes(damaged))


def test_without_pyarrow_parquet_is_refused_with_the_extra_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match="pyarrow is not installed") as caught:
        parse_examples(b"PAR1 and so on", path="samples.parquet")
    assert "icm-lora[parquet]" in str(caught.value.hint)
    assert caught.value.path == "samples.parquet"


@given(st.binary(max_size=60) | st.lists(FRAGMENTS, max_size=12).map(b"".join))
def test_any_bytes_give_rows_or_are_refused(data: bytes) -> None:
    with contextlib.suppress(DataError):
        for number, _ in read_rows(data).values:
            assert number >= 1
    with contextlib.suppress(DataError):
        assert parse_examples(data).items


@given(st.lists(st.sampled_from([codecs.BOM_UTF8, b" ", b"\n", b"\t"]), max_size=6).map(b"".join))
def test_a_file_of_nothing_holds_no_example(data: bytes) -> None:
    with pytest.raises(DataError):
        parse_examples(data)
