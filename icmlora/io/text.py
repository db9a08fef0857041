"""Format sizes, percentages, times and untrusted names as text, and parse sizes.

All commands format a kind of value with the same function, so tables and messages agree.
"""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from functools import lru_cache
from itertools import groupby

from icmlora.errors import DataError
from registry.filters import parse_size
from registry.names import escape as escape, some as some

_UNITS = ("KiB", "MiB", "GiB", "TiB", "PiB")


def human_size(size: int) -> str:
    """Return a size in IEC units with one decimal, such as `11.4 MiB`; below 1 KiB exactly, such as `17 B`."""
    value, unit = float(abs(size)), "B"
    for larger in _UNITS:
        # 1023.95 would be shown as 1024.0 of the smaller unit.
        if value < 1023.95:
            break
        value, unit = value / 1024, larger
    sign = "-" if size < 0 else ""
    return f"{sign}{value:.0f} B" if unit == "B" else f"{sign}{value:.1f} {unit}"


def parse_bytes(text: str) -> int:
    """Return the number of bytes in a text such as `1500`, `64MiB` or `2GB`; raises `DataError`."""
    size = parse_size(text.strip())
    if not size:
        raise DataError(f"{escape(text, 40)!r} is not a size", hint="write 1500, 10MB, 10MiB or 10M")
    return int(size)


def human_percent(fraction: float | None) -> str:
    """Return a fraction as a percentage with one decimal, or `-` where there is none."""
    return "-" if fraction is None else f"{100 * fraction:.1f}%"


def human_duration(seconds: float) -> str:
    """Return a duration as `0.4s`, `42s`, `2:10` (minutes) or `1:02:10` (hours)."""
    if seconds < 10:
        return f"{seconds:.1f}s"
    total = round(seconds)
    if total < 60:
        return f"{total}s"
    hours, rest = divmod(total, 3600)
    minutes, second = divmod(rest, 60)
    return f"{hours}:{minutes:02}:{second:02}" if hours else f"{minutes}:{second:02}"


def utc(moment: datetime) -> str:
    """Return a time as RFC 3339 in UTC with seconds, such as `2026-11-24T16:03:00Z`."""
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def counted(count: int, noun: str, plural: str | None = None) -> str:
    """Return `1 adapter` or `12 adapters`."""
    return f"{count:,} {noun if count == 1 else plural or noun + 's'}"


_LAST_NUMBER = re.compile(r"(.*?)(?<!\d)(0|[1-9]\d{0,8})(\D*)", re.ASCII | re.DOTALL)


def in_ranges(names: Sequence[str]) -> list[str]:
    """Return names with three or more consecutive last numbers merged: `conv0-33`."""
    numbers: defaultdict[tuple[str, str], list[int]] = defaultdict(list)
    for name in names:
        found = _LAST_NUMBER.fullmatch(name)
        numbers[(found[1], found[3]) if found else (name, "")].extend([int(found[2])] if found else [])
    return [shown for (start, end), some in numbers.items() for shown in _runs(start, sorted(some), end)]


def _runs(start: str, numbers: Sequence[int], end: str) -> Iterator[str]:
    if not numbers:
        yield start
    for _, run in groupby(enumerate(numbers), lambda pair: pair[1] - pair[0]):
        found = [number for _, number in run]
        if len(found) > 2:
            yield f"{start}{found[0]}-{found[-1]}{end}"
        else:
            yield from (f"{start}{number}{end}" for number in found)


def with_article(noun: str) -> str:
    """Return `a language model` or `an image model`."""
    return f"{'an' if noun[:1].lower() in 'aeiou' else 'a'} {noun}"


def escape_lines(text: str) -> str:
    """Escape a text and keep its line breaks."""
    return "\n".join(escape(line) for line in text.split("\n"))


@lru_cache(maxsize=4096)  # a table measures each cell several times
def width(text: str) -> int:
    """Return the width of a text in terminal cells; wide East Asian characters take two, combining marks none."""
    if text.isascii():
        return len(text)
    return sum(
        0 if unicodedata.combining(character) else 2 if unicodedata.east_asian_width(character) in "WF" else 1
        for character in text
    )


def shortened(text: str, cells: int) -> str:
    """Return `text` cut to a number of terminal cells, with an ellipsis at the cut."""
    if width(text) <= cells:
        return text
    while text and width(text) > cells - 1:
        text = text[:-1]
    return text + "…"


def shortened_inside(text: str, cells: int) -> str:
    """Return `text` cut in its middle to a number of terminal cells: the end of a path matters more."""
    if width(text) <= cells:
        return text
    end = text[-(cells - cells // 3 - 1) :] if cells > 1 else ""
    while width(end) > cells - cells // 3 - 1:
        end = end[1:]
    return shortened(text[: len(text) - len(end)], max(1, cells - width(end))) + end
