"""Sizes, percentages, durations, and names that try to drive a terminal."""

import unicodedata

import pytest
from hypothesis import given, strategies as st

from icmlora.io.text import (
    counted,
    escape,
    human_duration,
    human_percent,
    human_size,
    in_ranges,
    shortened,
    shortened_inside,
    width,
    with_article,
)


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1_048_524, "1023.9 KiB"),
        (1_048_560, "1.0 MiB"),
        (11_953_766, "11.4 MiB"),
        (-2048, "-2.0 KiB"),
        (1 << 60, "1024.0 PiB"),
    ],
)
def test_sizes_are_iec_with_one_decimal(size: int, text: str) -> None:
    assert human_size(size) == text


def test_no_size_is_shown_as_1024_of_a_smaller_unit() -> None:
    assert not any(human_size(1024**power - 1).startswith("1024") for power in range(1, 6))


def test_an_unknown_percentage_is_a_dash() -> None:
    assert (human_percent(0.7812), human_percent(None), human_percent(-0.013)) == ("78.1%", "-", "-1.3%")


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.44, "0.4s"), (42.4, "42s"), (130, "2:10"), (3599.7, "1:00:00"), (3730, "1:02:10")]
)
def test_durations_are_short(seconds: float, text: str) -> None:
    assert human_duration(seconds) == text


@pytest.mark.parametrize(
    ("names", "shown"),
    [
        ([f"conv{number}" for number in range(34)], ["conv0-33"]),
        (["q_proj", "v_proj"], ["q_proj", "v_proj"]),
        (["a.0.x", "a.1.x", "a.2.x", "a.5.x", "b"], ["a.0-2.x", "a.5.x", "b"]),
        (["fc1", "fc2"], ["fc1", "fc2"]),
        (["x01", "x02", "x03"], ["x01", "x02", "x03"]),
    ],
)
def test_names_that_are_counted_are_shown_as_a_range(names: list[str], shown: list[str]) -> None:
    assert in_ranges(names) == shown


def test_an_article_fits_its_noun() -> None:
    assert (with_article("image-and-text model"), with_article("text model")) == (
        "an image-and-text model",
        "a text model",
    )


def test_counts_carry_their_noun() -> None:
    assert (counted(1, "adapter"), counted(1200, "adapter"), counted(2, "pass", "passes")) == (
        "1 adapter",
        "1,200 adapters",
        "2 passes",
    )


@pytest.mark.parametrize(
    ("hostile", "shown"),
    [
        ("\x1b[31mred", r"\x1b[31mred"),
        ("a\nb", r"a\x0ab"),
        ("file\u202egnp", r"file\u202egnp"),
        ("\udcff", r"\udcff"),
        ("\x9b31m", r"\x9b31m"),
    ],
)
def test_control_and_bidi_characters_are_written_out(hostile: str, shown: str) -> None:
    assert escape(hostile) == shown


def test_ordinary_names_of_any_script_stay_as_they_are() -> None:
    assert escape("рецепты-料理-crème") == "рецепты-料理-crème"


@given(st.text())
def test_nothing_escaped_can_drive_a_terminal(text: str) -> None:
    assert all(unicodedata.category(character) not in {"Cc", "Cs"} for character in escape(text))
    assert not set("\u202e\u2066\u200f") & set(escape(text))


@given(st.text(alphabet="ab料é", max_size=20), st.integers(1, 12))
def test_a_shortened_text_fits(text: str, cells: int) -> None:
    assert width(shortened(text, cells)) <= cells


@given(st.text(max_size=40), st.integers(1, 30))
def test_a_text_that_is_cut_inside_fits_and_keeps_its_ends(text: str, cells: int) -> None:
    cut = shortened_inside(text, cells)
    assert width(cut) <= cells
    if width(text) <= cells:
        assert cut == text
    else:
        start, _, end = cut.rpartition("…") if "…" not in text else ("", "", "")
        assert text.startswith(start)
        assert text.endswith(end)
