"""Place the labels of a picture next to their points, without overlaps; earlier points choose first.

A label has 8 candidates around its point, then the same 8 farther away, connected to the point by a line.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

_AROUND = ((1, 0), (-1, 0), (0, -1), (0, 1), (1, -1), (-1, -1), (1, 1), (-1, 1))
GAPS = (9.0, 22.0, 38.0)
"""Pixels from a point to its label. Beyond the first gap a line connects the two."""


@dataclass(frozen=True)
class Box:
    """A rectangle in a picture; y grows downwards."""

    left: float
    top: float
    width: float
    height: float

    @property
    def right(self) -> float:
        """The right edge."""
        return self.left + self.width

    @property
    def bottom(self) -> float:
        """The lower edge."""
        return self.top + self.height

    @property
    def middle(self) -> tuple[float, float]:
        """The point in its middle."""
        return self.left + self.width / 2, self.top + self.height / 2

    def overlaps(self, other: Box) -> bool:
        """Whether the two have a point in common."""
        return (
            self.left < other.right and other.left < self.right and self.top < other.bottom and other.top < self.bottom
        )

    def holds(self, other: Box) -> bool:
        """Whether the other one is inside."""
        return (
            self.left <= other.left
            and other.right <= self.right
            and self.top <= other.top
            and other.bottom <= self.bottom
        )


@dataclass(frozen=True)
class PlacedLabel:
    """A label in its place."""

    box: Box
    across: int  # -1 if it is left of its point, 1 if right, 0 if above or below
    is_away: bool  # whether it needs a line to its point

    @property
    def anchor(self) -> Literal["start", "middle", "end"]:
        """Where its text begins to grow: the width is an estimate, so at the side that is nearest to its point."""
        return "start" if self.across > 0 else "end" if self.across else "middle"

    @property
    def x(self) -> float:
        """Where that is."""
        return {"start": self.box.left, "middle": self.box.middle[0], "end": self.box.right}[self.anchor]

    def end(self, y: float) -> tuple[float, float]:
        """Return where the line from its point, which is at `y`, ends."""
        box = self.box
        return self.x, box.middle[1] if self.across else box.top if box.top > y else box.bottom


def place_labels(
    points: Sequence[tuple[float, float]],
    sizes: Sequence[tuple[float, float]],
    frame: Box,
    obstacles: Sequence[Box],
    soft: Sequence[Box] = (),
    gaps: Sequence[float] = GAPS,
) -> list[PlacedLabel | None]:
    """Place each label at its first free candidate, in the order of the points."""
    taken = list(obstacles)
    labels: list[PlacedLabel | None] = []
    for point, size in zip(points, sizes, strict=True):
        label = _first_free(point, size, frame, taken, soft, gaps)
        labels.append(label)
        if label is not None:
            taken.append(label.box)
    return labels


def _first_free(
    point: tuple[float, float],
    size: tuple[float, float],
    frame: Box,
    taken: Sequence[Box],
    soft: Sequence[Box],
    gaps: Sequence[float],
) -> PlacedLabel | None:
    for gap in gaps:
        places = [PlacedLabel(_next_to(point, size, gap, way), way[0], gap > gaps[0]) for way in _AROUND]
        free = [place for place in places if frame.holds(place.box) and not any(map(place.box.overlaps, taken))]
        if free:
            return min(free, key=lambda place: sum(map(place.box.overlaps, soft)))
    return None


def _next_to(point: tuple[float, float], size: tuple[float, float], gap: float, direction: tuple[int, int]) -> Box:
    """Return the box whose edge or corner is `gap` away from a point, in one of the 8 directions."""
    across, down = direction
    reach = gap if 0 in direction else 0.7 * gap
    left = point[0] + across * reach - (1 - across) / 2 * size[0]
    top = point[1] + down * reach - (1 - down) / 2 * size[1]
    return Box(left, top, *size)
