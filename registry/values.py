"""How values are stored: each form packs a value into what SQLite stores, and back. The table is in `registry.schema`.

Without SQLAlchemy, which takes longer to import than a listing of hundreds of tasks to read.
"""

from __future__ import annotations

import json
import sys
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import Any

_START = datetime(1970, 1, 1, tzinfo=UTC)
LEAST_SHARE, MOST_SHARE = -1000.0, 1000.0  # beyond that an original does what its base model does
VIEWS = ("adapted", "context")
RUNGS = ("base", "code", "network", "original", "residual", "generate")


class UnreadableValue(ValueError):
    """A column holds something that icm did not write there."""


@dataclass(frozen=True)
class Form:
    """One way to store values."""

    what: str  # what messages call a value
    pack: Callable[[Any], Any]  # value -> what is stored
    unpack: Callable[[Any], Any]  # the way back; any error of it is damage
    absent: object = None  # the value that NULL stands for

    def read(self, stored: Any) -> Any:
        """Return the value of what is stored; raise `UnreadableValue` if there is none."""
        try:
            return self.absent if stored is None else self.unpack(stored)
        except (AttributeError, LookupError, OverflowError, TypeError, ValueError, zlib.error) as error:
            raise UnreadableValue(f"not a {self.what}: {error}") from error


def compact_json(value: object) -> str:
    """Write JSON in one canonical way, so that equal values are equal texts."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def _packed(value: object) -> bytes:
    return zlib.compress(compact_json(value).encode(), 9)


# A page of tasks has the same few descriptions in every row; nobody changes a value, so equal bytes share it.
@lru_cache(maxsize=128)
def _unpacked(stored: bytes) -> object:
    return json.loads(zlib.decompress(stored))


def _seconds(moment: str) -> int:
    return (datetime.fromisoformat(moment) - _START) // timedelta(seconds=1)


@lru_cache(maxsize=4096)  # what was recorded together has one time
def _moment(seconds: int) -> str:
    return (_START + timedelta(seconds=seconds)).isoformat()[:-6] + "Z"  # a fraction of the time of strftime


def choice(*words: str) -> Form:
    """Return the form of one of a few words; their order is part of the schema."""
    return Form("choice", words.index, words.__getitem__)


def figure(least: float, most: float) -> Form:
    """Return the form of a measured number.

    One out of its range is not kept, as if nobody had measured it, and not believed when it is read.
    """

    def believed(stored: float) -> float:
        if not least <= stored <= most:
            raise ValueError(f"{stored} is outside the range {least:g} to {most:g}")
        return stored

    return Form("figure", lambda value: value if least <= value <= most else None, believed)


DIGEST = Form("digest", bytes.fromhex, bytes.hex)
MOMENT = Form("moment", _seconds, _moment)
PACKED = Form("packed", _packed, _unpacked)
WORDS = Form("words", lambda words: " ".join(words) or None, lambda text: tuple(text.split(" ")), absent=())
SQUARED_ERROR = figure(0.0, sys.float_info.max)
SHARE = figure(LEAST_SHARE, MOST_SHARE)
"""What a code keeps of what its original does: a retained gain, an effect."""
