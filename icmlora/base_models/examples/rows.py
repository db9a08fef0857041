"""Read the rows of a file of examples in any supported format. Never imports torch.

    JSON lines     one JSON object per line (jsonlines.org)
    JSON           one array of objects
    Parquet        one object per row; needs pyarrow

The format is detected from the bytes, because the store keeps files without their names. Files are untrusted: an
unreadable row is yielded as a `BadRow`, and no row takes more memory than `MAX_ROW_BYTES` of JSON can.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from icmlora.errors import DataError

MAX_ROW_BYTES = 16 * 2**20
_FIRST_WINDOW = 2**14
_PARQUET = b"PAR1"
_BATCH = 64
_LINE = re.compile(rb"\S[^\n]*")
_BETWEEN = re.compile(r"[\s,]*")
_DECODER = json.JSONDecoder()
_INSTALL = "pip install 'icm-lora[parquet]', or save the file as JSON lines"


@dataclass(frozen=True)
class BadRow:
    """An unreadable row and the reason, such as "is not JSON"."""

    reason: str


@dataclass(frozen=True)
class Rows:
    """The rows of a file."""

    unit: str  # the word for a row in messages: "line" or "row"
    values: Iterator[tuple[int, Any]]  # (number from 1, value) for each row; can be iterated only once


def read_rows(data: bytes) -> Rows:
    """Detect the format of a file and return its rows; blank lines are counted but are not rows.

    Raises:
        DataError: It is unreadable Parquet; may also be raised while iterating. The error has no path.
    """
    if data.startswith(_PARQUET):
        return Rows("row", _parquet_rows(data))
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):  # PowerShell's default
        data = data.decode("utf-16", errors="replace").encode("utf-8")
    data = data.removeprefix(codecs.BOM_UTF8)
    if data[:1024].lstrip().startswith(b"["):
        try:
            return Rows("row", _array_rows(data.decode("utf-8")))
        except UnicodeDecodeError:
            pass  # read as lines, so that the valid UTF-8 lines are usable
    return Rows("line", _line_rows(data))


def _line_rows(data: bytes) -> Iterator[tuple[int, Any]]:
    number, counted = 1, 0
    # Not split() or a loop over all lines: a file of newlines would take gigabytes or minutes.
    for line in _LINE.finditer(data):
        number += data.count(b"\n", counted, line.start())
        counted = line.start()
        row: Any
        if line.end() - line.start() > MAX_ROW_BYTES:
            row = BadRow(f"is longer than {MAX_ROW_BYTES >> 20} MiB")
        else:
            try:
                row = json.loads(line.group().decode("utf-8"))
            except UnicodeDecodeError as error:
                row = BadRow(f"is not UTF-8: {error.reason}")
            except (ValueError, RecursionError) as error:
                row = BadRow(f"is not JSON: {error}")
        yield number, row


def _array_rows(text: str) -> Iterator[tuple[int, Any]]:
    """Decode one element at a time: a whole array as Python objects can take twenty times its size in bytes."""
    place, number = text.index("[") + 1, 0
    while True:
        gap = _BETWEEN.match(text, place)
        place = place if gap is None else gap.end()
        if place >= len(text) or text[place] == "]":
            return
        number += 1
        window = min(_FIRST_WINDOW, MAX_ROW_BYTES)
        while True:
            try:
                value, length = _DECODER.raw_decode(text[place : place + window])
                break
            except (ValueError, RecursionError) as error:
                is_cut_off = isinstance(error, ValueError) and place + window < len(text)
                if not is_cut_off or window == MAX_ROW_BYTES:
                    limit = f" or longer than {MAX_ROW_BYTES >> 20} MiB" if is_cut_off else ""
                    yield number, BadRow(f"is not JSON{limit}, so reading stopped: {error}")
                    return
                window = min(8 * window, MAX_ROW_BYTES)
        is_long = 4 * length > MAX_ROW_BYTES and len(text[place : place + length].encode()) > MAX_ROW_BYTES
        yield number, BadRow(f"is longer than {MAX_ROW_BYTES >> 20} MiB") if is_long else value
        place += length


def _parquet_rows(data: bytes) -> Iterator[tuple[int, Any]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise DataError("the file is Parquet, and pyarrow is not installed", hint=_INSTALL) from error
    number = 0
    try:
        # Small batches, because columns unpack to far more bytes than in the file.
        for batch in parquet.ParquetFile(pyarrow.BufferReader(data)).iter_batches(batch_size=_BATCH):
            if batch.nbytes > _BATCH * MAX_ROW_BYTES:
                raise DataError(f"row {number + 1} or one of the next is longer than {MAX_ROW_BYTES >> 20} MiB")
            for value in batch.to_pylist():
                number += 1
                yield number, value
    # For damaged files, pyarrow raises its own errors, OSError, ValueError or UnicodeDecodeError.
    except (pyarrow.ArrowException, OSError, ValueError, NotImplementedError, OverflowError) as error:
        raise DataError(f"the Parquet file cannot be read: {error}", hint=_INSTALL) from error
