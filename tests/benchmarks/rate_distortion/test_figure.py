"""The figures of a study: which methods README shows, where their names are, and that all can be told apart."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from icmlora.fleet.map.label_placement import Box
from tests.benchmarks.rate_distortion.figure import COLOURS, styles
from tests.benchmarks.rate_distortion.small_figure import DEFAULT, STYLE, chosen, place_names, small_figure
from tests.benchmarks.rate_distortion.summary import OURS
from tests.cli.test_map_picture import luminance

ROOT = Path(__file__).parents[3]
FRAME = Box(0, 0, 700, 300)


def point(family: str, share: float, gain: float, name: str = "p") -> dict[str, Any]:
    return {"family": family, "name": name, "share": share, "gain": gain, "worst": gain - 0.1}


def contrast(colour: str, ground: str) -> float:
    bright, dim = sorted([luminance(colour), luminance(ground)], reverse=True)
    return (bright + 0.05) / (dim + 0.05)


def test_methods_that_are_best_somewhere_come_before_those_that_are_only_well_known() -> None:
    best = [point(f"new-{number}", 0.02 * 1.1**number, 0.8 + 0.01 * number) for number in range(3)]
    known = [point("LoRAQuant", 0.1, 0.75), point("uniform", 0.2, 0.75), point("joint diagonalisation", 0.3, 0.75)]
    unknown = [point("worse", 0.2, 0.71)]
    assert list(chosen([*unknown, *known, *best])) == ["new-0", "new-1", "new-2", "fewer bits", "LoRAQuant"]


def test_a_method_and_its_strengthened_twin_are_one_curve_and_icm_is_none_of_them() -> None:
    points = [point("x", 0.1, 0.8), point("x, full strength", 0.1, 0.9), point("x", 0.2, 0.95), point(OURS, 0.01, 1.0)]
    assert chosen(points) == {"x": ((0.1, 0.9), (0.2, 0.95))}


def test_names_cover_neither_each_other_nor_a_curve() -> None:
    lines = {f"curve {number}": [(40 + 50 * number, 280), (140 + 60 * number, 40 + 4 * number)] for number in range(7)}
    names = place_names(lines, FRAME)
    boxes = [name.label.box for name in names.values()]
    assert not any(one.overlaps(other) for one, other in combinations(boxes, 2))
    assert all(FRAME.holds(box) for box in boxes)
    for (x, y), (end_x, end_y) in lines.values():
        spots = [Box(x + (end_x - x) * part / 200, y + (end_y - y) * part / 200, 0.1, 0.1) for part in range(201)]
        assert not any(box.overlaps(spot) for box in boxes for spot in spots)


def test_a_name_without_room_is_an_error() -> None:
    with pytest.raises(ValueError, match="no room for the name of a rather long one"):
        place_names({"a rather long one": [(10, 10), (40, 20)]}, Box(0, 0, 60, 30))


def test_the_default_is_marked_where_it_is_if_the_study_names_one() -> None:
    study = {"tasks": 2, "points": [point(OURS, 0.01, 0.9, "a"), point(OURS, 0.05, 0.99, "b"), point("x", 0.1, 0.8)]}
    assert DEFAULT not in small_figure(study)
    curve, marks = [], []
    for element in ET.fromstring(small_figure({**study, "default": "b"})).iter():
        if element.get("class") == "icm-dot":
            (marks if element.get("r") == "6.5" else curve).append((element.get("cx"), element.get("cy")))
    assert marks == [curve[1]]


@pytest.mark.parametrize("ground", ["#ffffff", "#0d1117"])
def test_lines_and_text_of_the_small_figure_stand_out_from_either_ground(ground: str) -> None:
    style = STYLE.split("@media")[ground == "#0d1117"]
    assert f".ground {{ fill: {ground} }}" in style
    for kind, least in (("soft", 4.5), ("name, .icm-dot", 4.5), ("other", 3.0), ("other-dot", 3.0), ("icm", 3.0)):
        (colour,) = re.findall(rf"\.{kind} {{ (?:fill|stroke): (#\w{{6}}) }}", style)
        assert contrast(colour, ground) >= least, kind


def test_no_two_families_of_the_full_figure_look_alike() -> None:
    families = [f"method {number}{end}" for number in range(24) for end in ("", ", full strength")]
    looks = {(style["color"], style["marker"], style["linestyle"]) for style in styles(families).values()}
    assert len(looks) == len(families)
    assert all(contrast(colour, "#ffffff") >= 3 for colour in COLOURS)


def test_readme_shows_what_was_measured() -> None:
    study = json.loads((ROOT / "tests/benchmarks/results/rate-distortion.json").read_text(encoding="utf-8"))
    assert (ROOT / "docs/results/rates.svg").read_text(encoding="utf-8") == small_figure(study)
