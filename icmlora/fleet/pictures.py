"""What `icm map` shows: a fleet's map, and the tasks that are not on it.

Where the labels of a picture go: beside their points and clear of each other; the first ones choose first.

candidates of a label: 8 places around its point, then the same farther away, with a line to the point

The map of a fleet as one SVG file: readable on light and dark ground, without matplotlib, the same every time.

    task ── marker: shape and colour of its cluster      look ── small dot, with a line to its task      label ── name

Colours are Okabe and Ito's, which the common kinds of colour blindness tell apart; shapes repeat what they say.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from itertools import chain

from icmlora.fleet.stored_vectors import LeftOut
from icmlora.io.text import counted
from icmlora.task_vectors.clusters import MappedTask, TaskMap
from registry.names import printable
from registry.records import View


@dataclass(frozen=True)
class MappedFleet:
    """The map of one base model's tasks.

    Attributes:
        support_sets: How many vectors it was made from.
        left_out: Tasks of the base model that are not on it.
    """

    base_model: str
    view: View
    map: TaskMap
    support_sets: int
    left_out: tuple[LeftOut, ...]


def grouped_reasons(left_out: Sequence[LeftOut]) -> list[str]:
    """Return a line for each reason why tasks are not on a map, with their names."""
    names: defaultdict[str, list[str]] = defaultdict(list)
    for entry in left_out:
        names[entry.reason].append(entry.task)
    return [f"{reason}: {', '.join(tasks)}" for reason, tasks in names.items()]


_AROUND = ((1, 0), (-1, 0), (0, -1), (0, 1), (1, -1), (-1, -1), (1, 1), (-1, 1))
_GAPS = (9.0, 22.0, 38.0)
"""From a point to its label; beyond the first, the two need a line between them."""


@dataclass(frozen=True)
class Box:
    """A rectangle of a picture; y grows downwards."""

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
        """Whether the other lies inside."""
        return (
            self.left <= other.left
            and other.right <= self.right
            and self.top <= other.top
            and other.bottom <= self.bottom
        )


@dataclass(frozen=True)
class Label:
    """A label that has its place.

    Attributes:
        box: Where it is.
        across: -1 where it lies left of its point, 1 right, 0 above or below.
        is_away: Whether it needs a line to its point.
    """

    box: Box
    across: int
    is_away: bool


def place_labels(
    points: Sequence[tuple[float, float]],
    sizes: Sequence[tuple[float, float]],
    frame: Box,
    obstacles: Sequence[Box],
    soft: Sequence[Box] = (),
) -> list[Label | None]:
    """Give each point's label the first place that is free, in the order of the points.

    Args:
        points: One a label.
        sizes: Width and height of each label.
        frame: What no label leaves.
        obstacles: What no label covers.
        soft: What a label covers only where it must: of the places at one distance, that with the fewest of them.

    Returns:
        One a point; None where no place is free.
    """
    taken = list(obstacles)
    labels: list[Label | None] = []
    for point, size in zip(points, sizes, strict=True):
        label = _first_free(point, size, frame, taken, soft)
        labels.append(label)
        if label is not None:
            taken.append(label.box)
    return labels


def _first_free(
    point: tuple[float, float], size: tuple[float, float], frame: Box, taken: Sequence[Box], soft: Sequence[Box]
) -> Label | None:
    for gap in _GAPS:
        places = [Label(_beside(point, size, gap, way), way[0], gap > _GAPS[0]) for way in _AROUND]
        free = [place for place in places if frame.holds(place.box) and not any(map(place.box.overlaps, taken))]
        if free:
            return min(free, key=lambda place: sum(map(place.box.overlaps, soft)))
    return None


def _beside(point: tuple[float, float], size: tuple[float, float], gap: float, direction: tuple[int, int]) -> Box:
    """Return the box of a size whose edge or corner is a gap away from a point, in one of the 8 directions."""
    across, down = direction
    reach = gap if 0 in direction else 0.7 * gap
    left = point[0] + across * reach - (1 - across) / 2 * size[0]
    top = point[1] + down * reach - (1 - down) / 2 * size[1]
    return Box(left, top, *size)


_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
_SHAPES = (
    "M-5,0a5,5 0 1,0 10,0a5,5 0 1,0 -10,0z",
    "M-4.5,-4.5h9v9h-9z",
    "M0,-6L5.5,4H-5.5z",
    "M0,-6.2L6.2,0L0,6.2L-6.2,0z",
    "M0,6L5.5,-4H-5.5z",
)
"""Paths around (0, 0); with the colours, 30 clusters look different."""
_WIDTH, _FRAME, _LEGEND = 940.0, Box(28, 64, 660, 560), 708.0
_MARGIN, _MARKER, _DOT = 34.0, 12.0, 4.0
_LETTER, _LINE = 6.3, 14.0
"""Width of a letter and height of a line of labels, a little more than they take in common fonts of 11 pixels."""
_LONGEST = 32
_LEGEND_ROWS = 24
_MANY = 200
"""Tasks above which their looks would hide each other, and are not drawn."""
_STYLE = """
svg { font: 11px system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif }
.title { font-size: 16px; font-weight: 600 }
.ground { fill: #ffffff } .ink { fill: #1f2328 } .soft { fill: #59636e } .frame { fill: none; stroke: #d1d9e0 }
.link { stroke: #59636e; stroke-width: 0.7 } .alone { fill: none; stroke: #6e7781; stroke-width: 1.8 }
.look { stroke-width: 0.8; opacity: 0.4 }
@media (prefers-color-scheme: dark) {
  .ground { fill: #0d1117 } .ink { fill: #f0f6fc } .soft { fill: #9198a1 } .frame { stroke: #3d444d }
  .link { stroke: #9198a1 } .alone { stroke: #9198a1 } .look { opacity: 0.55 }
}"""


@dataclass(frozen=True)
class _Placed:
    """A task with its point and its looks in pixels."""

    task: MappedTask
    point: tuple[float, float]
    support_sets: tuple[tuple[float, float], ...]
    is_alone: bool

    @property
    def colour(self) -> str:
        return "#6e7781" if self.is_alone else _COLOURS[(self.task.cluster - 1) % len(_COLOURS)]


def draw_map(found: MappedFleet) -> str:
    """Return the picture of a map as the text of an SVG file."""
    placed = _placed(found)
    rows, end = _legend(found)
    height = max(_FRAME.bottom + 32, end)
    name = printable(found.base_model)
    title = f"{len(placed)} tasks of {name} by their task vectors, {found.view} view"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH:g} {height:g}" width="{_WIDTH:g}" '
        f'height="{height:g}" role="img">',
        f"<title>{escape(title)}</title>",
        f"<style>{_STYLE}\n</style>",
        f'<rect class="ground" width="{_WIDTH:g}" height="{height:g}"/>',
        _text(_FRAME.left, 26, "ink title", f"{len(placed)} tasks by their vectors"),
        _text(_FRAME.left, 46, "soft", f"{name}, {found.view} view"),
        f'<rect class="frame" x="{_FRAME.left:g}" y="{_FRAME.top:g}" width="{_FRAME.width:g}" '
        f'height="{_FRAME.height:g}" rx="6"/>',
        _text(_FRAME.left, _FRAME.bottom + 18, "soft", _axes(found)),
        *chain.from_iterable(map(_support_sets, placed)),
        *_labels(placed),
        *map(_marker, placed),
        *rows,
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _placed(found: MappedFleet) -> list[_Placed]:
    """Scale all points into the frame, with one scale for both axes: distances are what a map is about."""
    tasks = found.map.tasks
    spots = [spot for task in tasks for spot in (task.point, *task.support_sets)]
    low = [min(spot[axis] for spot in spots) for axis in (0, 1)]
    span = [max(spot[axis] for spot in spots) - low[axis] or 1.0 for axis in (0, 1)]
    scale = min((_FRAME.width - 2 * _MARGIN) / span[0], (_FRAME.height - 2 * _MARGIN) / span[1])
    middle = _FRAME.middle

    def pixel(spot: tuple[float, float]) -> tuple[float, float]:
        return (
            middle[0] + scale * (spot[0] - low[0] - span[0] / 2),
            middle[1] - scale * (spot[1] - low[1] - span[1] / 2),
        )

    alone = {members[0].name for members in found.map.clusters if len(members) == 1}
    drawn = _support_sets_are_drawn(found)
    return [
        _Placed(task, pixel(task.point), tuple(map(pixel, task.support_sets)) if drawn else (), task.name in alone)
        for task in tasks
    ]


def _labels(placed: Sequence[_Placed]) -> Iterator[str]:
    """Write the names, those of tasks with near neighbours first: in a crowd, that is what one wants to read."""
    order = sorted(placed, key=lambda spot: (spot.task.nearest.distance, spot.task.name))
    names = [printable(spot.task.name, _LONGEST) for spot in order]
    labels = place_labels(
        [spot.point for spot in order],
        [(_LETTER * len(name) + 2, _LINE) for name in names],
        _FRAME,
        [_around(spot.point, _MARKER) for spot in placed],
        [_around(look, _DOT) for spot in placed for look in spot.support_sets],
    )
    for spot, name, label in zip(order, names, labels, strict=True):
        if label is not None:
            yield from _label(spot, name, label)


def _label(spot: _Placed, name: str, label: Label) -> Iterator[str]:
    box, (x, y) = label.box, spot.point
    # The width is an estimate, so a label begins or ends where it is nearest to its point.
    anchor, at = {1: ("start", box.left), -1: ("end", box.right), 0: ("middle", box.middle[0])}[label.across]
    if label.is_away:
        end = box.middle[1] if label.across else box.top if box.top > y else box.bottom
        yield f'<line class="link" x1="{x:.1f}" y1="{y:.1f}" x2="{at:.1f}" y2="{end:.1f}"/>'
    yield _text(at, box.middle[1] + 4, "ink", name, anchor=anchor)


def _support_sets(spot: _Placed) -> Iterator[str]:
    x, y = spot.point
    for look in spot.support_sets:
        yield (
            f'<g class="look" stroke="{spot.colour}" fill="{spot.colour}"><line x1="{x:.1f}" y1="{y:.1f}" '
            f'x2="{look[0]:.1f}" y2="{look[1]:.1f}"/><circle cx="{look[0]:.1f}" cy="{look[1]:.1f}" r="1.6"/></g>'
        )


def _marker(spot: _Placed) -> str:
    near = spot.task.nearest
    told = f"{spot.task.name}: nearest is {near.task} at {near.distance:.2f}"
    return _shape(0 if spot.is_alone else spot.task.cluster, *spot.point, told)


def _shape(cluster: int, x: float, y: float, told: str = "") -> str:
    """Write the marker of a cluster, or of a task that is alone (0); what it tells shows under a pointer."""
    number = cluster - 1
    path = _SHAPES[number % len(_SHAPES)] if cluster else _SHAPES[0]
    look = 'class="alone"' if not cluster else f'fill="{_COLOURS[number % len(_COLOURS)]}"'
    inner = f"<title>{escape(printable(told, 400))}</title>" if told else ""
    return f'<path {look} d="{path}" transform="translate({x:.1f} {y:.1f})">{inner}</path>'


def _legend(found: MappedFleet) -> tuple[list[str], float]:
    """Return the legend and the lower edge of it."""
    clusters = [members for members in found.map.clusters if len(members) > 1]
    alone = len(found.map.clusters) - len(clusters)
    parts: list[str] = []
    y = _FRAME.top + 12
    for members in clusters[:_LEGEND_ROWS]:
        mean = sum(task.silhouette for task in members) / len(members)
        text = f"{members[0].cluster}: {counted(len(members), 'task')}, silhouette {mean:.2f}"
        parts += _shape(members[0].cluster, _LEGEND + 6, y), _text(_LEGEND + 18, y + 4, "ink", text)
        y += 20
    if len(clusters) > _LEGEND_ROWS:
        parts.append(_text(_LEGEND + 18, y + 4, "soft", f"and {len(clusters) - _LEGEND_ROWS} more clusters"))
        y += 20
    if alone:
        parts += _shape(0, _LEGEND + 6, y), _text(_LEGEND + 18, y + 4, "ink", f"{alone} alone")
        y += 20
    for text in _facts(found):
        y += 16
        parts.append(_text(_LEGEND, y, "soft", text))
    return parts, y + 16


def _facts(found: MappedFleet) -> Iterator[str]:
    if found.map.silhouette_by_task is not None:
        yield from ("silhouette of support sets", f"by task: {found.map.silhouette_by_task:.2f}")
    if found.map.silhouette_by_cluster is not None:
        yield from ("silhouette of tasks", f"by cluster: {found.map.silhouette_by_cluster:.2f}")
    if _support_sets_are_drawn(found):
        yield "small dots: single support sets"


def _support_sets_are_drawn(found: MappedFleet) -> bool:
    return len(found.map.tasks) <= _MANY and any(len(task.support_sets) > 1 for task in found.map.tasks)


def _axes(found: MappedFleet) -> str:
    across, up = found.map.variation
    shown = f"The plane shows {across + up:.0%} of the variation ({across:.0%} across, {up:.0%} up)"
    return f"{shown}, so tasks that look near need not be: clusters are made from all of it."


def _text(x: float, y: float, style: str, text: str, *, anchor: str = "start") -> str:
    return f'<text class="{style}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _around(point: tuple[float, float], size: float) -> Box:
    return Box(point[0] - size / 2, point[1] - size / 2, size, size)
