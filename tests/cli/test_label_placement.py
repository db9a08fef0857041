"""Labels are clear of each other, of points and of the frame."""

from hypothesis import given, strategies as st

from icmlora.fleet.map.label_placement import Box, place_labels

FRAME = Box(0, 0, 300, 200)
SIZE = (60.0, 14.0)
POINTS = st.lists(st.tuples(st.floats(0, 300), st.floats(0, 200)), max_size=25)


def dot(point: tuple[float, float]) -> Box:
    return Box(point[0] - 4, point[1] - 4, 8, 8)


def share_a_point(one: Box, other: Box) -> bool:
    """By definition: neither is next to or above the other."""
    next_to = one.left + one.width <= other.left or other.left + other.width <= one.left
    above = one.top + one.height <= other.top or other.top + other.height <= one.top
    return not (next_to or above)


@given(POINTS)
def test_no_label_covers_another_or_a_point_or_leaves_the_frame(points: list[tuple[float, float]]) -> None:
    dots = [dot(point) for point in points]
    boxes = [label.box for label in place_labels(points, [SIZE] * len(points), FRAME, dots) if label is not None]
    for number, box in enumerate(boxes):
        assert not any(share_a_point(box, other) for other in [*boxes[:number], *dots])
        assert FRAME.holds(box)


@given(POINTS)
def test_the_first_label_always_has_a_place_without_obstacles(points: list[tuple[float, float]]) -> None:
    labels = place_labels(points, [SIZE] * len(points), FRAME, [])
    assert len(labels) == len(points)
    assert all(label is not None for label in labels[:1])


def test_a_label_with_room_is_right_of_its_point() -> None:
    (label,) = place_labels([(100, 100)], [SIZE], FRAME, [dot((100, 100))])
    assert label is not None
    assert (label.across, label.is_away, label.box.middle[1]) == (1, False, 100)
    assert 4 < label.box.left - 100 < 15


def test_a_label_at_the_right_edge_is_left_of_its_point() -> None:
    (label,) = place_labels([(295, 100)], [SIZE], FRAME, [])
    assert label is not None
    assert (label.across, label.is_away) == (-1, False)


def test_a_label_avoids_soft_obstacles_if_it_can() -> None:
    (label,) = place_labels([(100, 100)], [SIZE], FRAME, [], [Box(110, 95, 10, 10)])
    assert label is not None
    assert label.across != 1


def test_a_label_moves_away_if_all_near_places_are_taken() -> None:
    ring = Box(85, 85, 30, 30)
    (label,) = place_labels([(100, 100)], [SIZE], FRAME, [ring])
    assert label is not None
    assert label.is_away
    assert not label.box.overlaps(ring)


def test_a_label_without_a_place_is_left_out() -> None:
    assert place_labels([(100, 100)], [SIZE], FRAME, [FRAME]) == [None]
