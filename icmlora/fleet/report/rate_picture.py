"""Where things are in the rate picture: bytes of each task, on a logarithmic axis, against the quality of its code.

    retained gain   as `icm eval` measured it, if half of the codes have one; the originals are the line of 1
    relative error  else

The template page/rate.svg draws it. With many tasks the dots of a kind become one path, and have no names.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from icmlora.fleet.map.label_placement import Box, place_labels
from icmlora.fleet.stats.bill import Bill, TaskBill
from icmlora.io.text import counted, escape, human_size

Quality = Literal["retained gain", "relative error"]

_WIDTH, _HEIGHT, _FRAME = 720.0, 400.0, Box(64, 28, 632, 312)
_MANY = 500
"""With more tasks than this, single dots would take megabytes and cover each other."""
_NAMED = 3
_LETTER, _LINE, _DOT, _LONGEST = 6.8, 15.0, 9.0, 32
_LOWEST_GAIN, _HIGHEST_GAIN, _HIGHEST_ERROR = 0.0, 1.25, 1.5
"""Values outside are drawn at the edge, so that a diverged adapter does not flatten the others."""


@dataclass(frozen=True)
class Tick:
    """A mark on an axis, in pixels."""

    at: float
    text: str


@dataclass(frozen=True)
class Dot:
    """A task; `tooltip` appears under the pointer."""

    x: float
    y: float
    row: int
    tooltip: str


@dataclass(frozen=True)
class Note:
    """A text in the picture; `end` is where a line leads from it, if it needs one to its dot."""

    x: float
    y: float
    text: str
    anchor: Literal["start", "middle", "end"]
    kind: Literal["code", "original", "name"]
    line: tuple[float, float, float, float] | None = None


@dataclass(frozen=True)
class RatePicture:
    """The picture; everything is in pixels."""

    title: str
    quality: Quality
    across: Sequence[Tick]
    up: Sequence[Tick]
    codes: Sequence[Dot]  # empty if there are many
    originals: Sequence[Dot]
    code_path: str  # empty if there are few
    original_path: str
    notes: Sequence[Note]
    caption: str
    width: float = _WIDTH
    height: float = _HEIGHT
    frame: Box = _FRAME


def rate_picture(bill: Bill, numbers: Mapping[str, int]) -> RatePicture | None:
    """Return the picture of a store; None where no code was measured.

    Args:
        bill: Bytes and quality of each task.
        numbers: Its row in the report's table.
    """
    tasks = [task for fleet in bill.fleets for task in fleet.encoded]
    gains = [task for task in tasks if task.row.gain is not None]
    quality: Quality = "retained gain" if gains and 2 * len(gains) >= len(tasks) else "relative error"
    shown = gains if quality == "retained gain" else [task for task in tasks if task.relative_error is not None]
    if not shown:
        return None
    space = _Space.of(shown, quality)
    codes = [space.code(task, numbers[task.row.name]) for task in shown]
    originals = [space.original(task, numbers[task.row.name]) for task in shown]
    are_many = len(shown) > _MANY
    return RatePicture(
        title=f"{quality} against size for {counted(len(shown), 'task')}",
        quality=quality,
        across=space.across(),
        up=space.up(),
        codes=[] if are_many else codes,
        originals=[] if are_many else originals,
        code_path=_path(codes) if are_many else "",
        original_path=_path(originals) if are_many else "",
        notes=_notes(shown, codes, originals, space),
        caption=_caption(shown, space, len(tasks)),
    )


@dataclass(frozen=True)
class _Space:
    """The axes: the decimal logarithm of bytes from left to right, the quality upwards."""

    quality: Quality
    sizes: tuple[float, float]
    values: tuple[float, float]
    step: float  # between marks of the quality

    @classmethod
    def of(cls, tasks: Sequence[TaskBill], quality: Quality) -> _Space:
        sizes = [size for task in tasks for size in (task.size, task.bf16_size)]
        low, high = math.log10(max(1, min(sizes))), math.log10(max(2, *sizes))
        margin = max(0.1, 0.06 * (high - low))
        if quality == "retained gain":
            gains = [_kept_inside(task.row.gain or 0.0, quality) for task in tasks]
            least, most = min(1.0, *gains), max(1.0, *gains)
        else:
            least, most = 0.0, max(_kept_inside(task.relative_error or 0.0, quality) for task in tasks)
        span = max(most - least, 0.02)
        step = _nice(span / 4)
        bottom = 0.0 if quality == "relative error" else math.floor((least - 0.04 * span) / step) * step
        return cls(quality, (low - margin, high + margin), (bottom, least + 1.12 * span), step)

    def x(self, size: int) -> float:
        """Return the x coordinate of a size."""
        low, high = self.sizes
        return _FRAME.left + _FRAME.width * (math.log10(max(1, size)) - low) / (high - low)

    def y(self, value: float) -> float:
        """Return where a quality is."""
        low, high = self.values
        return _FRAME.bottom - _FRAME.height * (_kept_inside(value, self.quality) - low) / (high - low)

    def value(self, task: TaskBill) -> float:
        """Return the quality of a task's code."""
        found = task.row.gain if self.quality == "retained gain" else task.relative_error
        assert found is not None  # only measured tasks are drawn
        return found

    def code(self, task: TaskBill, row: int) -> Dot:
        value = self.value(task)
        tooltip = f"{escape(task.row.name)}: {human_size(task.size)}, {self.quality} {value:.3f}"
        return Dot(self.x(task.size), self.y(value), row, tooltip)

    def original(self, task: TaskBill, row: int) -> Dot:
        best = 1.0 if self.quality == "retained gain" else 0.0
        tooltip = f"{escape(task.row.name)}: original, {human_size(task.bf16_size)} in bf16"
        return Dot(self.x(task.bf16_size), self.y(best), row, tooltip)

    def across(self) -> list[Tick]:
        """Return marks at powers of 4 bytes, KiB, MiB; fewer where there is little room."""
        first, last = (size / math.log10(4) for size in self.sizes)
        powers = range(math.ceil(first), math.floor(last) + 1)
        every = math.ceil(len(powers) / 7)
        sizes = [4**power for power in powers if power % every == 0]
        return [Tick(self.x(size), human_size(size).replace(".0 ", " ")) for size in sizes]  # as in `64 KiB`

    def up(self) -> list[Tick]:
        low, high = self.values
        digits = max(0, -math.floor(math.log10(self.step)))
        marks = range(round(low / self.step), math.floor(high / self.step + 1e-9) + 1)
        return [Tick(self.y(mark * self.step), f"{mark * self.step:.{digits}f}") for mark in marks]


def _kept_inside(value: float, quality: Quality) -> float:
    low, high = (_LOWEST_GAIN, _HIGHEST_GAIN) if quality == "retained gain" else (0.0, _HIGHEST_ERROR)
    return min(max(value, low), high)


def _nice(step: float) -> float:
    """Return the next of 1, 2 and 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(step))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= step * (1 - 1e-9))


def _path(dots: Iterable[Dot]) -> str:
    """Return dots as one path of points, each pixel once."""
    pixels = sorted({(round(dot.x), round(dot.y)) for dot in dots})
    return "".join(f"M{x} {y}h0" for x, y in pixels)


def _notes(tasks: Sequence[TaskBill], codes: Sequence[Dot], originals: Sequence[Dot], space: _Space) -> list[Note]:
    """Name both kinds next to their dots, and the tasks whose codes keep the least."""
    sign = 1 if space.quality == "retained gain" else -1
    order = sorted(range(len(tasks)), key=lambda place: sign * space.value(tasks[place]))
    worst = order[:_NAMED] if len(tasks) > _NAMED else []
    kinds: list[tuple[tuple[float, float], str, Literal["code", "original", "name"]]] = [
        (_top(originals), "originals in bf16", "original"),
        (_top(codes), "codes", "code"),
        *(((codes[at].x, codes[at].y), escape(tasks[at].row.name, _LONGEST), "name") for at in worst),
    ]
    dots = [*codes, *originals]
    labels = place_labels(
        [point for point, _, _ in kinds],
        [(_LETTER * len(text), _LINE) for _, text, _ in kinds],
        _FRAME,
        [Box(dot.x - _DOT / 2, dot.y - _DOT / 2, _DOT, _DOT) for dot in dots[: 2 * _MANY]],
    )
    notes = []
    for ((x, y), text, kind), label in zip(kinds, labels, strict=True):
        if label is None:
            continue
        line = (x, y, *label.end(y)) if label.is_away else None
        notes.append(Note(label.x, label.box.middle[1] + 4, text, label.anchor, kind, line))
    return notes


def _top(dots: Sequence[Dot]) -> tuple[float, float]:
    """Return the place above which a group of dots is named."""
    xs = sorted(dot.x for dot in dots)
    return xs[len(xs) // 2], min(dot.y for dot in dots)


def _caption(tasks: Sequence[TaskBill], space: _Space, coded: int) -> str:
    values = [space.value(task) for task in tasks]
    mean_size = round(sum(task.size for task in tasks) / len(tasks))
    parts = [
        f"Mean over {counted(len(tasks), 'task')} with a code: {human_size(mean_size)}, {space.quality} "
        f"{sum(values) / len(values):.3f}."
    ]
    if unknown := coded - len(tasks):
        parts.append(f"{counted(unknown, 'code')} {'was' if unknown == 1 else 'were'} not measured.")
    beyond = sum(_kept_inside(value, space.quality) != value for value in values)
    if beyond:
        parts.append(f"{counted(beyond, 'dot')} at the edge {'lies' if beyond == 1 else 'lie'} outside the chart.")
    if space.quality == "relative error":
        parts.append("A relative error of 0 means equal to the original.")
    else:
        parts.append("A retained gain of 1 is as good as the original, and 0 as the base model alone.")
    return " ".join(parts)
