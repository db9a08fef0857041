"""Draw a map of tasks as one SVG file, without matplotlib: readable on a light or dark ground, always the same bytes.

    task: a marker in the shape and colour of its cluster, and its name
    support set: a small dot with a line to its task

The colours are Okabe and Ito's, which people with the common kinds of colour blindness can tell apart; the shapes
repeat what they say. matplotlib with adjustText was tried: its labels cover markers and leave the frame, and its SVG
has neither colours for a dark ground nor names under the pointer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import chain
from typing import TYPE_CHECKING

from icmlora.fleet.map.label_placement import Box, place_labels
from icmlora.io.text import counted
from registry.names import escape as printable

if TYPE_CHECKING:
    from icmlora.task_vectors.map import MappedTask, TaskMap
    from registry.manifests import View

_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
_SHAPES = (
    "M-5,0a5,5 0 1,0 10,0a5,5 0 1,0 -10,0z",
    "M-4.5,-4.5h9v9h-9z",
    "M0,-6L5.5,4H-5.5z",
    "M0,-6.2L6.2,0L0,6.2L-6.2,0z",
    "M0,6L5.5,-4H-5.5z",
)
"""Paths around (0, 0). With the colours they tell 30 clusters apart."""
_WIDTH, _FRAME, _LEGEND = 940.0, Box(28, 64, 660, 560), 708.0
_MARGIN, _MARKER, _DOT = 34.0, 12.0, 4.0
_LETTER, _LINE = 6.3, 14.0
"""Width of a letter and height of a line in labels: a little more than common fonts of 11 pixels need."""
_LONGEST = 32
_LEGEND_ROWS = 24
_MANY = 200
"""With more tasks than this, support sets would hide each other, so they are not drawn."""
STYLE = """
.map { font: 11px system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif }
.map .title { font-size: 16px; font-weight: 600 }
.map .ground { fill: #ffffff }
.map .ink { fill: #1f2328 }
.map .soft { fill: #59636e }
.map .frame { fill: none; stroke: #d1d9e0 }
.map .link { stroke: #59636e; stroke-width: 0.7 }
.map .alone { fill: none; stroke: #6e7781; stroke-width: 1.8 }
.map .set { stroke-width: 0.8; opacity: 0.4 }
@media screen and (prefers-color-scheme: dark) {
  .map .ground { fill: #0d1117 }
  .map .ink { fill: #f0f6fc }
  .map .soft { fill: #9198a1 }
  .map .frame { stroke: #3d444d }
  .map .link { stroke: #9198a1 }
  .map .alone { stroke: #9198a1 }
  .map .set { opacity: 0.55 }
}
"""
"""The picture's own style sheet. Every rule is for what is inside of it, so a page may hold several maps."""


@dataclass(frozen=True)
class _Placed:
    """A task with the points of its mean vector and of its support sets, in pixels."""

    task: MappedTask
    point: tuple[float, float]
    support_sets: tuple[tuple[float, float], ...]
    is_alone: bool

    @property
    def colour(self) -> str:
        return "#6e7781" if self.is_alone else _COLOURS[(self.task.cluster - 1) % len(_COLOURS)]


def draw_map(found: TaskMap, base_model: str, view: View, rows: Mapping[str, int] | None = None) -> str:
    """Return the picture of a map as the text of an SVG file.

    Args:
        found: The map.
        base_model: Whose tasks it shows.
        view: Which vectors it was made from.
        rows: A number for each task, written to its marker as `data-row`, for a page that does something with it.
    """
    placed = _placed(found)
    legend, end = _legend(found)
    height = max(_FRAME.bottom + 32, end)
    name = printable(base_model, 120)
    title = f"{len(placed)} tasks of {name} by their task vectors, {view} view"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" class="map" viewBox="0 0 {_WIDTH:g} {height:g}" '
        f'width="{_WIDTH:g}" height="{height:g}" role="img">',
        f"<title>{escape(title)}</title>",
        f"<style>{STYLE}</style>",
        f'<rect class="ground" width="{_WIDTH:g}" height="{height:g}"/>',
        _text(_FRAME.left, 26, "ink title", f"{len(placed)} tasks by their vectors"),
        _text(_FRAME.left, 46, "soft", f"{name}, {view} view"),
        f'<rect class="frame" x="{_FRAME.left:g}" y="{_FRAME.top:g}" width="{_FRAME.width:g}" '
        f'height="{_FRAME.height:g}" rx="6"/>',
        _text(_FRAME.left, _FRAME.bottom + 18, "soft", _axes(found)),
        *chain.from_iterable(map(_support_sets, placed)),
        *_labels(placed),
        *(_marker(spot, None if rows is None else rows[spot.task.name]) for spot in placed),
        *legend,
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _placed(found: TaskMap) -> list[_Placed]:
    """Scale all points into the frame, with the same scale for both axes so that distances stay comparable."""
    tasks = found.tasks
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

    alone = {members[0].name for members in found.clusters if len(members) == 1}
    drawn = _support_sets_are_drawn(found)
    return [
        _Placed(task, pixel(task.point), tuple(map(pixel, task.support_sets)) if drawn else (), task.name in alone)
        for task in tasks
    ]


def _labels(placed: Sequence[_Placed]) -> Iterator[str]:
    """Write the names. Tasks with near neighbours choose their place first, because crowds are hardest to read."""
    order = sorted(placed, key=lambda spot: (spot.task.nearest.distance, spot.task.name))
    names = [printable(spot.task.name, _LONGEST) for spot in order]
    labels = place_labels(
        [spot.point for spot in order],
        [(_LETTER * len(name) + 2, _LINE) for name in names],
        _FRAME,
        [_around(spot.point, _MARKER) for spot in placed],
        [_around(dot, _DOT) for spot in placed for dot in spot.support_sets],
    )
    for spot, name, label in zip(order, names, labels, strict=True):
        if label is None:
            continue
        if label.is_away:
            (x, y), (end_x, end_y) = spot.point, label.end(spot.point[1])
            yield f'<line class="link" x1="{x:.1f}" y1="{y:.1f}" x2="{end_x:.1f}" y2="{end_y:.1f}"/>'
        yield _text(label.x, label.box.middle[1] + 4, "ink", name, anchor=label.anchor)


def _support_sets(spot: _Placed) -> Iterator[str]:
    x, y = spot.point
    for u, v in spot.support_sets:
        yield (
            f'<g class="set" stroke="{spot.colour}" fill="{spot.colour}"><line x1="{x:.1f}" y1="{y:.1f}" '
            f'x2="{u:.1f}" y2="{v:.1f}"/><circle cx="{u:.1f}" cy="{v:.1f}" r="1.6"/></g>'
        )


def _marker(spot: _Placed, row: int | None) -> str:
    near = spot.task.nearest
    tooltip = f"{spot.task.name}: nearest is {near.task} at {near.distance:.2f}"
    return _shape(0 if spot.is_alone else spot.task.cluster, *spot.point, tooltip, row)


def _shape(cluster: int, x: float, y: float, tooltip: str = "", row: int | None = None) -> str:
    """Write the marker of a cluster, or of a task that is alone (0). `tooltip` appears under the pointer."""
    number = cluster - 1
    path = _SHAPES[number % len(_SHAPES)] if cluster else _SHAPES[0]
    paint = 'class="alone"' if not cluster else f'fill="{_COLOURS[number % len(_COLOURS)]}"'
    inner = f"<title>{escape(printable(tooltip, 400))}</title>" if tooltip else ""
    number_of_row = "" if row is None else f' data-row="{row}"'
    return f'<path {paint} d="{path}" transform="translate({x:.1f} {y:.1f})"{number_of_row}>{inner}</path>'


def _legend(found: TaskMap) -> tuple[list[str], float]:
    """Return the legend and its lower edge."""
    clusters = [members for members in found.clusters if len(members) > 1]
    alone = len(found.clusters) - len(clusters)
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


def _facts(found: TaskMap) -> Iterator[str]:
    if found.silhouette_by_task is not None:
        yield from ("silhouette of support sets", f"by task: {found.silhouette_by_task:.2f}")
    if found.silhouette_by_cluster is not None:
        yield from ("silhouette of tasks", f"by cluster: {found.silhouette_by_cluster:.2f}")
    if _support_sets_are_drawn(found):
        yield "small dots: single support sets"


def _support_sets_are_drawn(found: TaskMap) -> bool:
    return len(found.tasks) <= _MANY and any(len(task.support_sets) > 1 for task in found.tasks)


def _axes(found: TaskMap) -> str:
    across, up = found.variation
    shown = f"The picture shows {across + up:.0%} of the variation ({across:.0%} across, {up:.0%} up)"
    return f"{shown}. Clusters use all of it, so tasks that look close may be far apart."


def _text(x: float, y: float, style: str, text: str, *, anchor: str = "start") -> str:
    return f'<text class="{style}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _around(point: tuple[float, float], size: float) -> Box:
    return Box(point[0] - size / 2, point[1] - size / 2, size, size)
