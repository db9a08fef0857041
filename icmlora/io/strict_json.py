"""Parse untrusted JSON: one object, bounded size and depth, no duplicate keys, no NaN, no Infinity.

The standard parser keeps the last of two equal keys, accepts `NaN` and recurses. Input that two parsers could read
differently is refused here.
"""

from __future__ import annotations

import json
import math
from typing import Any

from icmlora.errors import AdapterRefused, UnsafeInput
from registry.names import escape

MAX_DEPTH = 32  # nesting allowed; real configurations need 3

# Limit per punctuation character: twice the need of a header with 20,000 tensors. It bounds the parsed objects, which
# take fifty times the memory of their text.
MAX_PUNCTUATION = 400_000

_PUNCTUATION = (b'"', b"\\", b",", b"[", b"]", b"{", b"}")


def parse_object(data: bytes, *, what: str, max_bytes: int) -> dict[str, Any]:
    """Parse bytes that must hold exactly one JSON object.

    Args:
        data: UTF-8.
        what: Name of the input in messages.
        max_bytes: Maximum length.

    Raises:
        AdapterRefused: It is not a JSON object.
        UnsafeInput: It is too long or too deep, has duplicate keys, or holds text that is not Unicode.
    """
    if len(data) > max_bytes:
        raise UnsafeInput(f"{what} has {len(data):,} bytes, more than {max_bytes:,}", kind="limits")
    for mark in _PUNCTUATION:
        if data.count(mark) > MAX_PUNCTUATION:
            message = f"{what} contains more than {MAX_PUNCTUATION:,} of the character {mark.decode()}"
            raise UnsafeInput(message, kind="limits")

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in items:
            if key in found:
                raise UnsafeInput(f"{what} has the key {escape(key, 120)!r} twice", kind="duplicate-key")
            found[key] = value
        return found

    try:
        parsed = json.loads(data.decode("utf-8"), object_pairs_hook=pairs, parse_float=_finite, parse_constant=_finite)
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        raise AdapterRefused(f"{what} is not valid JSON: {escape(str(error), 120)}", kind="json") from None
    except RecursionError:
        raise _too_deep(what) from None
    if not isinstance(parsed, dict):
        raise AdapterRefused(f"{what} is not a JSON object", kind="json")
    _check_depth(parsed, what)
    if b"\\u" in data:
        try:
            json.dumps(parsed, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise UnsafeInput(f"{what} contains a lone surrogate, which is not valid Unicode", kind="text") from None
    return parsed


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text[:32]} is not finite")
    return value


def _check_depth(value: dict[str, Any] | list[Any], what: str, depth: int = 1) -> None:
    if depth > MAX_DEPTH:
        raise _too_deep(what)
    for item in value.values() if isinstance(value, dict) else value:
        if isinstance(item, dict | list):
            _check_depth(item, what, depth + 1)


def _too_deep(what: str) -> UnsafeInput:
    return UnsafeInput(f"{what} is nested deeper than {MAX_DEPTH} levels", kind="limits")
