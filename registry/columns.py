"""How values are stored in the columns of the database. Every task pays for them, so they are small.

in Python                   in SQLite
64 hexadecimal digits       Digest   32 bytes
RFC 3339, UTC, seconds      Moment   seconds since 1970
one of a few words          Choice   its place among them
a JSON value                Packed   its text, deflated: a layout names every module of a model
"""

from __future__ import annotations

import json
import zlib
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import Integer, LargeBinary
from sqlalchemy.engine import Dialect
from sqlalchemy.types import TypeDecorator, TypeEngine

_START = datetime(1970, 1, 1, tzinfo=UTC)


class UnreadableValue(ValueError):
    """A column holds something that icm did not write there."""


class _Column(TypeDecorator[Any]):
    """A column that stores a value in another form; None is NULL in all of them."""

    impl: TypeEngine[Any] | type[TypeEngine[Any]] = LargeBinary
    cache_ok = True

    def pack(self, value: Any) -> Any:
        """Return what SQLite stores."""
        raise NotImplementedError

    def unpack(self, stored: Any) -> Any:
        """Return the value; any error of this is damage."""
        raise NotImplementedError

    def process_bind_param(self, value: Any, dialect: Dialect) -> Any:
        """Turn a value into what is stored (SQLAlchemy's hook)."""
        return None if value is None else self.pack(value)

    def process_result_value(self, value: Any, dialect: Dialect) -> Any:
        """Turn what is stored into the value (SQLAlchemy's hook)."""
        try:
            return None if value is None else self.unpack(value)
        except (AttributeError, LookupError, OverflowError, TypeError, ValueError, zlib.error) as error:
            raise UnreadableValue(f"not a {type(self).__name__.lower()}: {error}") from error


class Digest(_Column):
    """A SHA-256."""

    cache_ok = True

    def pack(self, value: str) -> bytes:
        """Return 32 bytes."""
        return bytes.fromhex(value)

    def unpack(self, stored: bytes) -> str:
        """Return 64 digits."""
        return stored.hex()


class Packed(_Column):
    """A JSON value."""

    cache_ok = True

    def pack(self, value: object) -> bytes:
        """Return the deflated text."""
        return pack_text(compact_json(value))

    def unpack(self, stored: bytes) -> object:
        """Return the value."""
        return json.loads(zlib.decompress(stored))


class Moment(_Column):
    """A time, to the second."""

    impl = Integer
    cache_ok = True

    def pack(self, value: str) -> int:
        """Return seconds since 1970."""
        return (datetime.fromisoformat(value) - _START) // timedelta(seconds=1)

    def unpack(self, stored: int) -> str:
        """Return RFC 3339."""
        return (_START + timedelta(seconds=stored)).strftime("%Y-%m-%dT%H:%M:%SZ")


class Choice(_Column):
    """One of a few words, given in alphabetical order so that rows sort as the words do."""

    impl = Integer
    cache_ok = True

    def __init__(self, *words: str) -> None:
        """Name the words; their order is part of the schema."""
        super().__init__()
        self.words = words

    def pack(self, value: str) -> int:
        """Return the place of a word."""
        return self.words.index(value)

    def unpack(self, stored: int) -> str:
        """Return the word at a place."""
        return self.words[stored]


def compact_json(value: object) -> str:
    """Write JSON in one canonical way, so that equal values are equal texts.

    Raises:
        ValueError: the value holds NaN or an infinity, which JSON does not have.
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def pack_text(text: str) -> bytes:
    """Deflate the text of a JSON value."""
    return zlib.compress(text.encode(), 9)
