"""Read the fields of a JSON object strictly: exactly the keys of the bundle format, each of its type."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection
from typing import Any, TypeVar, cast

from icmlora.errors import BundleError
from registry.names import escape

Value = TypeVar("Value")
MAX_COUNT = 2**53  # whole numbers above this differ between JSON readers

_DIGEST = re.compile(r"[0-9a-f]{64}")


class Fields:
    """One object of a bundle's index; every reader names the field in what it raises."""

    def __init__(self, value: object, keys: Collection[str], what: str) -> None:
        if not isinstance(value, dict) or value.keys() != set(keys):
            raise BundleError(f"{what} does not have the fields of this format")
        self._values = cast(dict[str, Any], value)
        self._what = what

    def text(self, key: str, limit: int) -> str:
        """Return a text of 1 to `limit` characters."""
        value = self._values[key]
        if not isinstance(value, str) or not 1 <= len(value) <= limit:
            raise self._wrong(key)
        return value

    def optional_text(self, key: str, limit: int) -> str | None:
        """Return a text of up to `limit` characters, or None for an empty one."""
        return None if self._values[key] == "" else self.text(key, limit)

    def optional(self, key: str, read: Callable[[str], Value]) -> Value | None:
        """Return what one of the other readers does, or None for null."""
        return None if self._values[key] is None else read(key)

    def digest(self, key: str) -> str:
        """Return a SHA-256 in lower-case hexadecimal."""
        return as_digest(self._values[key], f"{self._what}: {key}")

    def flag(self, key: str) -> bool:
        """Return true or false."""
        value = self._values[key]
        if not isinstance(value, bool):
            raise self._wrong(key)
        return value

    def count(self, key: str, *, least: int = 0) -> int:
        """Return a whole number."""
        return as_count(self._values[key], f"{self._what}: {key}", least=least)

    def number(self, key: str) -> float:
        """Return a finite number."""
        return as_number(self._values[key], f"{self._what}: {key}")

    def mapping(self, key: str) -> dict[str, Any]:
        """Return an object as it is."""
        value = self._values[key]
        if not isinstance(value, dict):
            raise self._wrong(key)
        return value

    def entries(self, key: str) -> list[Any]:
        """Return a list as it is."""
        value = self._values[key]
        if not isinstance(value, list):
            raise self._wrong(key)
        return value

    def _wrong(self, key: str) -> BundleError:
        return wrong(self._values[key], f"{self._what}: {key}")


def as_digest(value: object, what: str) -> str:
    """Return a value that must be a SHA-256 in lower-case hexadecimal."""
    if not isinstance(value, str) or not _DIGEST.fullmatch(value):
        raise wrong(value, what)
    return value


def as_row(value: object, length: int, what: str) -> list[Any]:
    """Return a value that must be a list of so many values."""
    if not isinstance(value, list) or len(value) != length:
        raise wrong(value, what)
    return value


def as_count(value: object, what: str, *, least: int = 0) -> int:
    """Return a value that must be a whole number; `True` is none."""
    if type(value) is not int or not least <= value <= MAX_COUNT:
        raise wrong(value, what)
    return value


def as_number(value: object, what: str) -> float:
    """Return a finite number."""
    # Another type than the writer's would be written differently again; a whole number of JSON may be huge.
    if not isinstance(value, float) or not math.isfinite(value):
        raise wrong(value, what)
    return value


def wrong(value: object, what: str) -> BundleError:
    """Return the error that names a value of the wrong kind."""
    return BundleError(f"{what} is {escape(repr(value), 60)}, which this format does not allow")
