"""Notes on the form of an adapter, for writing a decoded adapter in the same form: JSON of unusual properties.

    {"dtype": "F32", "dtypes": {TENSOR: TYPE}, ...}      and other properties of a format

A note may come from an untrusted bundle: a note that does not fit is refused. Never imports torch.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from icmlora.errors import AdapterRefused
from icmlora.formats.format import Template
from icmlora.io.safetensors import FLOAT_TYPES, TensorInfo
from icmlora.io.strict_json import parse_object

_MAX_BYTES = 64 << 20  # it names every tensor of a file, and holds the metadata of its header

_T = TypeVar("_T")


def types_to_note(factors: Sequence[TensorInfo]) -> dict[str, object]:
    """Return the entries of a note for the types of factors."""
    usual = commonest(tensor.dtype for tensor in factors)
    others = {tensor.name: tensor.dtype for tensor in factors if tensor.dtype != usual}
    return {"dtypes": others, "dtype": usual if others else None}


def note(details: Mapping[str, object], always: Mapping[str, object]) -> str:
    """Return the JSON of non-empty details and of all of `always`; "" if there are none."""
    found = {key: value for key, value in details.items() if value} | dict(always)
    return json.dumps(found, sort_keys=True, separators=(",", ":")) if found else ""


@contextmanager
def reading(like: Template) -> Iterator[dict[str, Any]]:
    """Yield a note to a block that removes its entries; refuse the note if an entry is invalid or left over."""
    noted = parse_object((like.details or "{}").encode(), what="the template", max_bytes=_MAX_BYTES)
    try:
        yield noted
    except (AttributeError, TypeError, ValueError):
        raise bad_note() from None
    if noted:
        raise bad_note()


def types_of(noted: dict[str, Any], like: Template) -> Callable[[str], str]:
    """Remove the types from a note, and return a function from a factor's name to its type; used in `reading`."""
    usual, others = noted.pop("dtype", like.dtype), dict(noted.pop("dtypes", {}))
    if not {usual, *others.values()} <= FLOAT_TYPES:
        raise ValueError("not a valid type for factors")
    return lambda tensor: others.get(tensor, usual)


def bad_note() -> AdapterRefused:
    """Return the refusal of a note that does not fit."""
    return AdapterRefused("the recorded form of the original does not fit it", kind="template")


def commonest(values: Iterable[_T]) -> _T:
    """Return the most frequent value; the first in case of a tie."""
    ((value, _),) = Counter(values).most_common(1)
    return value
