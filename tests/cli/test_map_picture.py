"""The picture of a map: well-formed whatever is in it, complete, and readable for everyone."""

import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from icmlora.fleet.map.picture import draw_map
from icmlora.fleet.map.task_map import MapReport
from icmlora.task_vectors.map import map_tasks

SVG = "{http://www.w3.org/2000/svg}"


def fleet(groups: int = 3, each: int = 3, *, sets: int = 4, base_model: str = "acme/tiny", seed: int = 0) -> MapReport:
    random = np.random.default_rng(seed)
    middles = random.standard_normal((groups, 24))
    tasks = {
        f"group-{group}-task-{number}": middles[group]
        + 0.3 * random.standard_normal(24)
        + 0.2 * random.standard_normal((sets, 24))
        for group in range(groups)
        for number in range(each)
    }
    return MapReport(base_model, "adapted", map_tasks(tasks), sets * len(tasks), ())


def draw(found: MapReport) -> str:
    return draw_map(found.map, found.base_model, found.view)


def texts(found: MapReport) -> list[str]:
    return ["".join(text.itertext()) for text in ET.fromstring(draw(found)).iter(f"{SVG}text")]


def markers(found: MapReport) -> list[ET.Element]:
    """Return the markers of tasks: those of the legend tell nothing."""
    return [path for path in ET.fromstring(draw(found)).iter(f"{SVG}path") if path.find(f"{SVG}title") is not None]


def luminance(colour: str) -> float:
    """Return the relative luminance of a colour (WCAG 2)."""
    parts = [int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_every_task_has_a_marker_and_a_label() -> None:
    found = fleet()
    names = {task.name for task in found.map.tasks}
    assert names <= set(texts(found))
    assert len(markers(found)) == len(names)


def test_each_cluster_has_a_marker_of_its_own() -> None:
    found = fleet(groups=8)
    looks = {}
    for task, marker in zip(found.map.tasks, markers(found), strict=True):
        looks.setdefault(task.cluster, set()).add((marker.get("d"), marker.get("fill"), marker.get("class")))
    assert {len(one) for one in looks.values()} == {1}
    assert len(set.union(*looks.values())) == len(looks) == 8


def test_a_task_that_is_alone_is_a_ring_without_a_colour() -> None:
    found = fleet(groups=3, each=1)
    assert [marker.get("class") for marker in markers(found)].count("alone") == sum(
        len(members) == 1 for members in found.map.clusters
    )


def test_the_legend_shows_the_silhouettes() -> None:
    found = fleet()
    assert f"by task: {found.map.silhouette_by_task:.2f}" in texts(found)
    assert f"by cluster: {found.map.silhouette_by_cluster:.2f}" in texts(found)


def test_it_says_how_much_of_the_variation_it_shows() -> None:
    found = fleet()
    assert any(f"shows {sum(found.map.variation):.0%} of the variation" in text for text in texts(found))


def test_hostile_text_cannot_break_the_file() -> None:
    found = fleet(base_model='</text><script>alert("1")</script>\x1b[31m\u202e&amp;')
    root = ET.fromstring(draw(found))
    assert not list(root.iter(f"{SVG}script"))
    assert not {"\x1b", "\u202e"} & set(draw(found))


def test_nothing_is_drawn_outside_the_picture() -> None:
    for found in (fleet(), fleet(groups=40, each=2), fleet(groups=3, each=1, sets=1)):
        root = ET.fromstring(draw(found))
        width, height = (float(root.get(name, "0")) for name in ("width", "height"))
        for element in root.iter():
            for name, limit in (
                ("x", width),
                ("x2", width),
                ("cx", width),
                ("y", height),
                ("y2", height),
                ("cy", height),
            ):
                assert 0 <= float(element.get(name, "0")) <= limit


def test_support_sets_are_drawn_if_a_task_has_several_and_there_are_few_tasks() -> None:
    assert draw(fleet()).count("<circle") == 4 * 9
    assert "<circle" not in draw(fleet(sets=1))
    assert "<circle" not in draw(fleet(groups=51, each=4))


@pytest.mark.parametrize("ground", ["#ffffff", "#0d1117"])
def test_markers_and_text_stand_out_from_the_ground(ground: str) -> None:
    drawn = draw(fleet(groups=6))
    light, dark = drawn.split("prefers-color-scheme")[0], drawn.split("prefers-color-scheme")[1].split("</style>")[0]
    style = light if ground == "#ffffff" else dark
    assert f".ground {{ fill: {ground} }}" in style
    colours = set(re.findall(r'<path fill="(#\w{6})"', drawn))
    inks = {found for name in ("ink", "soft") for found in re.findall(rf"\.{name} {{ fill: (#\w{{6}})", style)}
    assert len(colours) == 6
    for colour, least in [*((colour, 2.0) for colour in colours), *((ink, 4.5) for ink in inks)]:
        bright, dim = sorted([luminance(colour), luminance(ground)], reverse=True)
        assert (bright + 0.05) / (dim + 0.05) >= least, colour
