"""What README shows of a study, as an SVG file: icm in front, five other methods at most in grey, all named directly.

    icm      the mean of the tasks, and as a thin line of the same colour the worst task of the same points
    others   the mean; a method and what icm's own correction of its scales makes of it are one curve

The others are the methods that are the best of the others at some rate, then the best known ones, in the order of
`BEST_KNOWN`. As the map of tasks does, the picture brings a light and a dark ground along, with colours for each.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from typing import Any

from icmlora.fleet.map.label_placement import GAPS, Box, PlacedLabel, place_labels
from tests.benchmarks.rate_distortion.bd_rate import Curve, envelope, frontier
from tests.benchmarks.rate_distortion.summary import OURS, STRENGTHENED

Line = Sequence[tuple[float, float]]
"""Points in pixels; y grows downwards."""
BEST_KNOWN = {
    "uniform": "fewer bits",
    "nf4": "fewer bits",
    "int8": "fewer bits",
    "fewer ranks and bits": "fewer ranks and bits",
    "LoRAQuant": "LoRAQuant",
    "LoRDBA": "LoRDBA",
    "LoRDBA, scales of rank channels": "LoRDBA",
    "E8 lattice": "E8 lattice",
    "E8 lattice by energy": "E8 lattice",
    "E8 lattice by energy, refined": "E8 lattice, refined",
    "joint diagonalisation": "joint diagonalisation",
    "fleet mean and residual": "fleet mean and residual",
}
"""Families and the names of their curves; families of one name are one curve. All others have their own name."""
MOST = 5
LOWEST_GAIN, LARGEST_SHARE = 0.7, 0.6
"""Below the one, an adapter has lost what it was trained for; above the other, there is little left to save."""
WORST, DEFAULT = "its worst task", "icm train"
STYLE = """
svg { font: 13px system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif }
.curve { fill: none; stroke-width: 1.6; stroke-linejoin: round } .icm { stroke-width: 3.4 } .thin { stroke-width: 1.2 }
.name { font-weight: 600 }
.ground { fill: #ffffff } .soft { fill: #59636e } .grid { stroke: #d1d9e0; stroke-width: 0.7 }
.other { stroke: #868f99 } .other-dot { fill: #868f99 } .icm { stroke: #0969da } .name, .icm-dot { fill: #0969da }
@media (prefers-color-scheme: dark) {
  .ground { fill: #0d1117 } .soft { fill: #9198a1 } .grid { stroke: #30363d }
  .other { stroke: #6e7681 } .other-dot { fill: #6e7681 } .icm { stroke: #58a6ff } .name, .icm-dot { fill: #58a6ff }
}
"""
_WIDTH, _HEIGHT, _FRAME = 830.0, 430.0, Box(46, 34, 770, 344)
_LETTER, _LINE, _MARGIN = 7.2, 16.0, 4.0
"""Width of a letter, height of a line and room beside it: a little more than common fonts of 13 pixels need."""
_OWN, _FOREIGN, _STEP = 4.0, (20.0, 12.0, 7.0), 5.0
"""Pixels that a name keeps from its own curve, and from those of others where there is room for so many."""
_GAPS = (*GAPS, 60.0, 90.0, 130.0)  # below the curves there is room, if far from them


def small_figure(document: dict[str, Any]) -> str:
    """Return the picture of a study; its default point is marked if the study names one."""
    measured = [point for point in document["points"] if point["gain"] is not None]
    points = [point for point in measured if point["gain"] >= LOWEST_GAIN and point["share"] <= LARGEST_SHARE]
    ours = {(point["share"], point["gain"]): point for point in points if point["family"] == OURS}
    curves = {OURS: frontier(ours), WORST: [(share, ours[share, gain]["worst"]) for share, gain in frontier(ours)]}
    curves |= chosen(points)
    space = _Space.of([spot for curve in curves.values() for spot in curve])
    lines = {name: [space.at(*spot) for spot in curve] for name, curve in curves.items() if _is_seen(curve)}
    default = [space.at(*spot) for spot, point in ours.items() if point["name"] == document.get("default")]
    names = place_names({**({DEFAULT: default} if default else {}), **lines}, _FRAME)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH:g} {_HEIGHT:g}" width="{_WIDTH:g}" '
        f'height="{_HEIGHT:g}" role="img">',
        f"<title>Retained gain of {document['tasks']} adapters against bytes, icm and other methods</title>",
        f"<style>{STYLE}</style>",
        f'<rect class="ground" width="{_WIDTH:g}" height="{_HEIGHT:g}" rx="6"/>',
        f'<clipPath id="frame"><rect {_sides(_FRAME)}/></clipPath>',
        *space.grid(),
        _text(8, 20, "soft", f"retained gain, mean of {document['tasks']} adapters"),
        _text(_FRAME.right, _HEIGHT - 10, "soft", "bytes, everything counted, of bf16", "end"),
        *(part for text, name in names.items() for part in _named(text, name)),
        *(part for name in reversed(lines) for part in _drawn(name, lines[name])),  # icm last, so in front
        *(_dot("icm-dot", spot, 6.5) for spot in default),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def chosen(points: Iterable[Mapping[str, Any]]) -> dict[str, Curve]:
    """Return the curves of the other methods that are shown, the most telling first."""
    found: defaultdict[str, list[tuple[float, float]]] = defaultdict(list)
    for point in points:
        if point["family"] != OURS:
            family = point["family"].removesuffix(STRENGTHENED)
            found[BEST_KNOWN.get(family, family)].append((point["share"], point["gain"]))
    curves = {name: frontier(spots) for name, spots in found.items()}
    best, known = set(envelope(curves.values())), list(BEST_KNOWN.values())

    def order(name: str) -> tuple[int, int]:
        return -len(best.intersection(curves[name])), known.index(name) if name in known else len(known)

    shown = [name for name in sorted(curves, key=order) if best.intersection(curves[name]) or name in known]
    return {name: curves[name] for name in shown[:MOST]}


def _is_seen(curve: Iterable[tuple[float, float]]) -> bool:
    return any(gain >= LOWEST_GAIN for _, gain in curve)


@dataclass(frozen=True)
class Name:
    """The name of a line, and the point of the line that it is next to."""

    label: PlacedLabel
    spot: tuple[float, float]

    @property
    def connector(self) -> Line:
        """What leads from the line to the name, if they are not side by side."""
        return [self.spot, self.label.end(self.spot[1])] if self.label.is_away else []

    @property
    def distance(self) -> float:
        """How long that is, in pixels."""
        return math.dist(*self.connector) if self.connector else 0.0

    def crosses(self, boxes: Iterable[Box]) -> bool:
        """Whether it runs through one of the boxes."""
        parts = _around([self.connector], 1.0)
        return any(box.overlaps(part) for box in boxes for part in parts)


def place_names(lines: Mapping[str, Line], frame: Box) -> dict[str, Name]:
    """Place the name of each line next to it, away from all other lines and names; earlier lines choose first.

    Raises:
        ValueError: There is no room for one.
    """
    placed: dict[str, Name] = {}
    for name, line in lines.items():
        size = (_LETTER * len(name) + 2 * _MARGIN, _LINE)
        boxes = [known.label.box for known in placed.values()]
        own = boxes + _around([line, *(known.connector for known in placed.values())], _OWN)
        others = [other for key, other in lines.items() if key != name]
        tries = [
            (Name(label, spot), clearance)
            for clearance in _FOREIGN
            for taken in [own + _around(others, clearance)]
            for spot in [*line, *_along(line, 4 * _STEP)]
            for label in place_labels([spot], [size], frame, taken, gaps=_GAPS)
            if label is not None and spot[1] < frame.bottom
        ]
        if not tries:
            raise ValueError(f"no room for the name of {name}")
        # Near to another curve, a name seems to be that one's: then rather one that is connected from farther away.
        placed[name], _ = min(tries, key=lambda found: (found[0].crosses(boxes), found[0].distance - 2 * found[1]))
    return placed


@dataclass(frozen=True)
class _Space:
    """The axes: the logarithm of the share of bf16 from left to right, the gain upwards."""

    smallest: float
    highest: float

    @classmethod
    def of(cls, spots: Sequence[tuple[float, float]]) -> _Space:
        """Return what has all points that are not below the lowest gain."""
        smallest = min((share for share, gain in spots if gain >= LOWEST_GAIN), default=0.01)
        return cls(smallest / 1.15, max([1.0, *(gain for _, gain in spots)]) + 0.01)

    def at(self, share: float, gain: float) -> tuple[float, float]:
        """Return where a point is."""
        across = math.log(share / self.smallest) / math.log(LARGEST_SHARE / self.smallest)
        up = (gain - LOWEST_GAIN) / (self.highest - LOWEST_GAIN)
        return _FRAME.left + across * _FRAME.width, _FRAME.bottom - up * _FRAME.height

    def grid(self) -> Iterator[str]:
        """Write a line and a number for each tenth of gain, and for 1, 2 and 5 times each power of ten in bytes."""
        for tenth in range(round(10 * LOWEST_GAIN), math.floor(10 * self.highest) + 1):
            _, y = self.at(LARGEST_SHARE, tenth / 10)
            yield f'<line class="grid" x1="{_FRAME.left:g}" x2="{_FRAME.right:g}" y1="{y:.1f}" y2="{y:.1f}"/>'
            yield _text(_FRAME.left - 8, y + 4, "soft", f"{tenth / 10:.1f}", "end")
        shares = (digit * 10.0**power for power in range(-6, 0) for digit in (1, 2, 5))
        for share in (share for share in shares if self.smallest <= share <= LARGEST_SHARE):
            x, _ = self.at(share, LOWEST_GAIN)
            yield f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{_FRAME.top:g}" y2="{_FRAME.bottom:g}"/>'
            yield _text(x, _FRAME.bottom + 20, "soft", f"{100 * share:g} %", "middle")


def _drawn(name: str, line: Line) -> Iterator[str]:
    """Write a curve, and a dot for each of its points."""
    kind = "icm" if name in (OURS, WORST) else "other"
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in line)
    yield f'<polyline class="curve {kind}{" thin" if name == WORST else ""}" points="{path}" clip-path="url(#frame)"/>'
    if name != WORST:
        yield from (_dot(f"{kind}-dot", spot, 4 if kind == "icm" else 2.6) for spot in line if spot[1] <= _FRAME.bottom)


def _named(text: str, name: Name) -> Iterator[str]:
    """Write a name, and what connects it with its curve."""
    ours, label = text in (OURS, WORST, DEFAULT), name.label
    if name.connector:
        (x, y), (end_x, end_y) = name.connector
        yield f'<line class="curve other thin" x1="{x:.1f}" y1="{y:.1f}" x2="{end_x:.1f}" y2="{end_y:.1f}"/>'
    yield _text(
        label.x + _MARGIN * label.across, label.box.middle[1] + 4.5, "name" if ours else "soft", text, label.anchor
    )


def _around(lines: Iterable[Line], clearance: float) -> list[Box]:
    """Return boxes that cover lines and so many pixels around them."""
    spots = [spot for line in lines for spot in _along(line, _STEP)]
    return [Box(x - clearance, y - clearance, 2 * clearance, 2 * clearance) for x, y in spots]


def _along(line: Line, step: float) -> Iterator[tuple[float, float]]:
    """Yield points of a line, not farther than a step from each other."""
    yield from line[:1]
    for (x, y), (next_x, next_y) in pairwise(line):
        pieces = max(1, math.ceil(math.hypot(next_x - x, next_y - y) / step))
        for piece in range(1, pieces + 1):
            yield x + (next_x - x) * piece / pieces, y + (next_y - y) * piece / pieces


def _dot(kind: str, spot: tuple[float, float], radius: float) -> str:
    return f'<circle class="{kind}" cx="{spot[0]:.1f}" cy="{spot[1]:.1f}" r="{radius:g}"/>'


def _sides(box: Box) -> str:
    return f'x="{box.left:g}" y="{box.top:g}" width="{box.width:g}" height="{box.height:g}"'


def _text(x: float, y: float, kind: str, text: str, anchor: str = "start") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
