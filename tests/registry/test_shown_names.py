"""Names from outside: task names, module names, and how they are shown."""

from __future__ import annotations

import pytest
from hypothesis import given, strategies as st

from registry.names import escape, is_module_name, natural_key, task_name_problem


@pytest.mark.parametrize(
    "name", ["a", "wordnet-gloss", "v1.2_b", "0", "x" * 128, "console", "com10", "\u00e9", "\u6c34\u58a8\u753b"]
)
def test_a_plain_name_can_name_a_task(name: str) -> None:
    assert task_name_problem(name) is None


HOSTILE = (
    *("", ".", "..", "../x", "/abs", "-rf", "--help", "a\0b", "x" * 300, "con", "CON.txt", "nul", "a\nb", "a\x1b[31m"),
    *(
        "a\u202eb",
        "e\u0301",
        "a\u200db",
        "a\u3164",
        "\ud800",
        "\U0001f600",
        "[red]",
        "[/nope]",
        "'; DROP TABLE x",
        "a b",
        "_a",
    ),
)


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_name_cannot_name_a_task(name: str) -> None:
    assert task_name_problem(name)


@given(st.text())
def test_shown_text_never_holds_a_control_or_bidi_character(text: str) -> None:
    assert escape(text, 120).isprintable()


def test_shown_text_is_shortened() -> None:
    assert len(escape("x" * 10_000, 120)) == 120


@pytest.mark.parametrize(("text", "shown"), [("\x1b", "\\x1b"), ("\u202e", "\\u202e"), ("\U000e0001", "\\U000e0001")])
def test_escapes_show_the_code_point(text: str, shown: str) -> None:
    assert escape(text, 120) == shown


def test_layer_two_comes_before_layer_ten() -> None:
    names = ["layers.10.q", "layers.2.q", "layers.2.k", "head"]
    assert sorted(names, key=natural_key) == ["head", "layers.2.k", "layers.2.q", "layers.10.q"]


@given(st.text(alphabet="a.019"), st.text(alphabet="a.019"))
def test_different_names_have_different_places_in_the_order(left: str, right: str) -> None:
    assert (natural_key(left) == natural_key(right)) == (left == right)


@pytest.mark.parametrize("name", ["", ".", "a.", ".a", "a..b", "-a", "a.-b", "a b", "\u00e9"])
def test_a_broken_path_is_no_module_name(name: str) -> None:
    assert not is_module_name(name)
