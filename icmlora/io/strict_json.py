"""JSON from strangers: one object, bounded size and depth, no duplicate keys, no NaN, no Infinity.

The standard parser uses the last of two equal keys, accepts `NaN` and recurses; another reader of the same file may
see something else. Anything that two readers could disagree on is refused here.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any, NoReturn

from icmlora.errors import AdapterRefused, UnsafeInput
from registry.names import escape

MAX_DEPTH = 32  # nesting allowed; real configurations need 3

# Marks of one kind allowed: twice what the header of 20,000 tensors needs. It bounds the objects that parsing makes,
# which take fifty times the memory of their text.
MAX_PUNCTUATION = 400_000

# A string, or one structural character: enough to follow the nesting without building anything.
# Possessive, and a string may end with the data: the scan never goes back, so it is linear for any input.
_TOKENS = re.compile(rb'"(?:[^"\\]++|\\.)*+(?:"|\\?\Z)|[\[\]{}]', re.DOTALL)
_PUNCTUATION = (b'"', b"\\", b",", b"[", b"]", b"{", b"}")
_SURROGATES = re.compile("[\ud800-\udfff]")


def parse_object(data: bytes, *, what: str, max_bytes: int) -> dict[str, Any]:
    """Parse bytes that must hold exactly one JSON object.

    Args:
        data: UTF-8.
        what: What it is, for messages.
        max_bytes: How long it may be.

    Raises:
        AdapterRefused: It is something else.
        UnsafeInput: It is too long or too deep, has a key twice, or holds text that is not Unicode.
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
