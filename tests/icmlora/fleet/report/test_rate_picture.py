"""The rate picture: what it shows of a fleet, and that everything is inside of it."""

import pytest
from hypothesis import given, strategies as st

from icmlora.fleet.report.rate_picture import RatePicture
from tests.icmlora.fleet.report.made_up import Made, page_of

sizes = st.integers(1, 10**12)
values = st.floats(-1e6, 1e6)
fleets = st.lists(st.tuples(sizes, sizes, values, st.floats(0, 1e6)), min_size=1, max_size=12)


def drawn(made: list[Made]) -> RatePicture:
    picture = page_of(made, with_map=False).rate
    assert picture is not None
    return picture


def tasks(*gains: float | None) -> list[Made]:
    return [Made(f"task-{number}", gain=gain) for number, gain in enumerate(gains)]


@pytest.mark.parametrize(
    ("gains", "quality"),
    [
        ([0.9, 0.95, 1.0], "retained gain"),
        ([0.9, None], "retained gain"),
        ([0.9, None, None], "relative error"),
        ([None], "relative error"),
    ],
)
def test_gains_are_shown_where_half_of_the_codes_have_one(gains: list[float | None], quality: str) -> None:
    picture = drawn(tasks(*gains))
    assert picture.quality == quality
    assert len(picture.codes) == (sum(gain is not None for gain in gains) if quality == "retained gain" else len(gains))


def test_codes_that_were_not_measured_are_counted_in_words() -> None:
    assert "1 code was not measured." in drawn(tasks(0.9, None)).caption


def test_without_codes_there_is_no_picture() -> None:
    assert page_of([Made("apples", code=None)], with_map=False).rate is None


@given(fleets)
def test_every_dot_mark_and_label_is_inside(fleet: list[tuple[int, int, float, float]]) -> None:
    for with_gain in (True, False):
        picture = drawn(
            [
                Made(f"task-{number}", original=original, code=code, gain=gain if with_gain else None, error=error)
                for number, (original, code, gain, error) in enumerate(fleet)
            ]
        )
        frame = picture.frame
        for dot in (*picture.codes, *picture.originals):
            assert frame.left <= dot.x <= frame.right
            assert frame.top - 1e-6 <= dot.y <= frame.bottom + 1e-6
        assert all(frame.left <= tick.at <= frame.right for tick in picture.across)
        assert all(frame.top - 1e-6 <= tick.at <= frame.bottom + 1e-6 for tick in picture.up)
        assert 2 <= len({tick.text for tick in picture.up}) == len(picture.up) <= 10
        assert all(frame.top <= note.y <= frame.bottom for note in picture.notes)


def test_more_bytes_are_farther_right_and_more_gain_is_higher() -> None:
    low, high = drawn([Made("small", code=10_000, gain=0.9), Made("large", code=90_000, gain=0.99)]).codes
    rows = {dot.tooltip.split(":")[0]: dot for dot in (low, high)}
    assert rows["small"].x < rows["large"].x
    assert rows["small"].y > rows["large"].y


def test_one_adapter_that_diverged_does_not_flatten_the_others() -> None:
    picture = drawn(tasks(-400.0, 0.9, 0.95))
    spread = {round(dot.y) for dot in picture.codes}
    assert len(spread) == 3
    assert "1 dot at the edge lies outside the chart." in picture.caption


def test_the_three_worst_tasks_are_named() -> None:
    picture = drawn(tasks(0.99, 0.7, 0.95, 0.8, 0.6))
    assert {note.text for note in picture.notes if note.kind == "name"} == {"task-4", "task-1", "task-3"}
    assert {note.text for note in picture.notes if note.kind != "name"} == {"codes", "originals in bf16"}


def test_labels_do_not_cover_each_other() -> None:
    picture = drawn([Made(f"a-task-with-a-long-name-{n}", gain=0.9 + n / 1000) for n in range(20)])
    places = [(note.y, note.text) for note in picture.notes]
    assert len({round(y) for y, _ in places}) == len(places)


def test_with_many_tasks_dots_are_one_path_with_each_pixel_once() -> None:
    picture = drawn([Made(f"task-{number}", gain=0.9) for number in range(600)])
    assert (picture.codes, picture.originals) == ([], [])
    assert picture.code_path.count("M") == picture.original_path.count("M") == 1
