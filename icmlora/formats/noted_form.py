"""What is noted of an adapter's form, so that a decoded one can be written like it: JSON of what is not as usual.

    {"dtype": "F32", "dtypes": {TENSOR: TYPE}, ...}      and what else a format notes

A note may come with a bundle from anywhere: one that does not fit is refused. Never imports torch.
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
    """Return what a note says of the types of factors."""
    usual = commonest(tensor.dtype for tensor in factors)
    others = {tensor.name: tensor.dtype for tensor in factors if tensor.dtype != usual}
    return {"dtypes": others, "dtype": usual if others else None}


def note(details: Mapping[str, object], always: Mapping[str, object]) -> str:
    """Return the JSON of details that are not empty, and of others always; nothing if all is as usual."""
    found = {key: value for key, value in details.items() if value} | dict(always)
    return json.dumps(found, sort_keys=True, separators=(",", ":")) if found else ""


@contextmanager
def reading(like: Template) -> Iterator[dict[str, Any]]:
    """Give a note to a block that takes everything out of it; refuse it if something is odd, or left."""
    noted = parse_object((like.details or "{}").encode(), what="the template", max_bytes=_MAX_BYTES)
    try:
        yield noted
    except (AttributeError, TypeError, ValueError):
        raise bad_note() from None
    if noted:
        raise bad_note()


def types_of(noted: dict[str, Any], like: Template) -> Callable[[str], str]:
    """Take the types out of a note, and return what says the type of a factor by its name; a block of `reading`."""
    usual, others = noted.pop("dtype", like.dtype), dict(noted.pop("dtypes", {}))
    if not {usual, *others.values()} <= FLOAT_TYPES:
        raise ValueError("not a valid type for factors")
    return lambda tensor: others.get(tensor, usual)


def bad_note() -> AdapterRefused:
    """Return the refusal of what was noted of an original's form."""
    return AdapterRefused("the recorded form of the original does not fit it", kind="template")


def commonest(values: Iterable[_T]) -> _T:
    """Return the value that occurs most often, the first of several."""
    ((value, _),) = Counter(values).most_common(1)
    return value
