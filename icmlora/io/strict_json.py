"""JSON from strangers: one object, bounded size and depth, no duplicate keys, no NaN, no Infinity.

The standard parser keeps the last of two equal keys, accepts `NaN` and recurses; another reader of the same file may
see something else. Whatever two readers could disagree on is refused here.

Read the fields of a JSON object strictly: exactly the keys of a format, each of its kind.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection
from typing import Any, NoReturn, cast

from icmlora.errors import AdapterRefused, BundleError, UnsafeInput
from registry.names import escape

MAX_DEPTH = 32
"""Nesting allowed; real configurations need 3."""

MAX_PUNCTUATION = 400_000
"""Marks of one kind allowed: twice what the header of 20,000 tensors needs. It bounds the objects that parsing makes,
which take fifty times the memory of their text."""

# A string, or one structural character: enough to follow the nesting without building anything.
# Possessive, and a string may end with the data: the scan never goes back, so it is linear for any input.
_TOKENS = re.compile(rb'"(?:[^"\\]++|\\.)*+(?:"|\\?\Z)|[\[\]{}]', re.DOTALL)
_PUNCTUATION = (b'"', b"\\", b",", b"[", b"]", b"{", b"}")
_SURROGATES = re.compile("[\ud800-\udfff]")


def parse_object(data: bytes, *, what: str, max_bytes: int) -> dict[str, Any]:
    """Parse bytes that must hold exactly one JSON object.

    Args:
        data: UTF-8 bytes.
        what: What the bytes are, for messages ("adapter_config.json", "safetensors header").
        max_bytes: The most bytes that are looked at.

    Returns:
        The object; every string in it can be encoded as UTF-8.

    Raises:
        UnsafeInput: Too large, too deep, or with duplicate keys.
        AdapterRefused: Not JSON, not an object, or with a number that is not finite.
    """
    if len(data) > max_bytes:
        raise UnsafeInput(f"{what} has {len(data):,} bytes, more than {max_bytes:,}", kind="limits")
    _check_punctuation(data, what)
    _check_depth(data, what)

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in items:
            if key in found:
                raise UnsafeInput(f"{what} has the key {escape(key, 120)!r} twice", kind="duplicate-key")
            found[key] = value
        return found

    def number(text: str) -> float:
        value = float(text)
        if not math.isfinite(value):
            raise ValueError(f"the number {text[:32]} is not finite")
        return value

    def constant(text: str) -> NoReturn:
        raise ValueError(f"{text} is not a JSON number")

    try:
        text = data.decode("utf-8")
        parsed = json.loads(text, object_pairs_hook=pairs, parse_float=number, parse_constant=constant)
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        raise AdapterRefused(f"{what} is not valid JSON: {escape(str(error), 120)}", kind="json") from None
    if not isinstance(parsed, dict):
        raise AdapterRefused(f"{what} is not a JSON object", kind="json")
    if "\\u" in text and _has_surrogate(parsed):
        raise UnsafeInput(f"{what} holds text that is not Unicode (a lone surrogate)", kind="text")
    return parsed


def _check_punctuation(data: bytes, what: str) -> None:
    for mark in _PUNCTUATION:
        if data.count(mark) > MAX_PUNCTUATION:
            message = f"{what} holds more than {MAX_PUNCTUATION:,} of the mark {mark.decode()}"
            raise UnsafeInput(message, kind="limits")


def _check_depth(data: bytes, what: str) -> None:
    depth = 0
    for token in _TOKENS.finditer(data):
        char = token[0]
        if char in (b"{", b"["):
            depth += 1
            if depth > MAX_DEPTH:
                raise UnsafeInput(f"{what} is nested deeper than {MAX_DEPTH} levels", kind="limits")
        elif char in (b"}", b"]"):
            depth -= 1


def _has_surrogate(value: object) -> bool:
    if isinstance(value, str):
        return _SURROGATES.search(value) is not None
    if isinstance(value, dict):
        return any(_has_surrogate(key) or _has_surrogate(item) for key, item in value.items())
    if isinstance(value, list):
        return any(_has_surrogate(item) for item in value)
    return False


MAX_COUNT = 2**53
"""Whole numbers above this differ between JSON readers."""

_DIGEST = re.compile(r"[0-9a-f]{64}")


class Fields:
    """One object of a bundle's index; every reader names the field in what it raises.

    Raises:
        BundleError: Not an object, or not exactly with these keys.
    """

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

    def digest(self, key: str) -> str:
        """Return a SHA-256 in lower-case hexadecimal."""
        return as_digest(self._values[key], f"{self._what}: {key}")

    def optional_digest(self, key: str) -> str | None:
        """Return a digest, or None for null."""
        return None if self._values[key] is None else self.digest(key)

    def flag(self, key: str) -> bool:
        """Return true or false."""
        value = self._values[key]
        if not isinstance(value, bool):
            raise self._wrong(key)
        return value

    def count(self, key: str, *, least: int = 0) -> int:
        """Return a whole number."""
        return as_count(self._values[key], f"{self._what}: {key}", least=least)

    def optional_count(self, key: str) -> int | None:
        """Return a whole number, or None for null."""
        return None if self._values[key] is None else self.count(key)

    def optional_number(self, key: str) -> float | None:
        """Return a finite number, or None for null."""
        return None if self._values[key] is None else self.number(key)

    def number(self, key: str) -> float:
        """Return a finite number."""
        value = self._values[key]
        # Another type than the writer's would be written differently again; a whole number of JSON may be huge.
        if not isinstance(value, float) or not math.isfinite(value):
            raise self._wrong(key)
        return value

    def mapping(self, key: str) -> dict[str, Any]:
        """Return an object as it is."""
        value = self._values[key]
        if not isinstance(value, dict):
            raise self._wrong(key)
        return value

    def optional_mapping(self, key: str) -> dict[str, Any] | None:
        """Return an object, or None for null."""
        return None if self._values[key] is None else self.mapping(key)

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


def as_count(value: object, what: str, *, least: int = 0) -> int:
    """Return a value that must be a whole number; `True` is none."""
    if type(value) is not int or not least <= value <= MAX_COUNT:
        raise wrong(value, what)
    return value


def wrong(value: object, what: str) -> BundleError:
    """Return the error that names a value of the wrong kind."""
    return BundleError(f"{what} is {escape(repr(value), 60)}, which this format does not have")
