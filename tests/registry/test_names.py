"""Task names: allowed and refused ones."""

from __future__ import annotations

import pytest
from hypothesis import given, strategies as st

from registry.errors import InvalidName
from registry.names import check_name, some

HOSTILE = [
    "", ".", "..", "../x", "/abs", "a/b", "a\\b", "-rf", "--help", "a\nb", "a\n", "a\0b", "\x1b[31m", "\u202eevil",
    "e\u0301", "\u0301e", "a\u200bb", "x\ufe0f", "\u3164", "猫" * 65, "com²",
    "\ud800", "\N{PILE OF POO}", "[red]", "[/nope]", "'; DROP TABLE", "a b", "x" * 129,
    "con", "CON", "nul.txt", "com1", "LPT9.tar.gz",
]  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE, ids=ascii)
def test_a_hostile_name_is_refused(name: str) -> None:
    with pytest.raises(InvalidName):
        check_name(name)


@pytest.mark.parametrize(
    "name", ["a", "7", "dog-detection", "Wiki_2024.v2", "x" * 128, "console", "com10", "é", "水墨画", "चित्र-2", "٣"]
)
def test_an_ordinary_name_is_returned_unchanged(name: str) -> None:
    assert check_name(name) == name


@given(st.text(max_size=140))
def test_what_passes_is_a_safe_single_path_component(name: str) -> None:
    try:
        check_name(name)
    except InvalidName:
        return
    assert name.isprintable()
    assert name.split() == [name]
    assert len(f"{name}.safetensors".encode()) <= 255
    assert "/" not in name
    assert not name.startswith((".", "-"))


def test_a_short_list_is_shown_whole() -> None:
    assert some(["a", "b", "c", "d"]) == "a, b, c, d"


def test_a_long_list_is_cut_and_says_how_much_is_missing() -> None:
    assert some(list("abcdefg")) == "a, b, c, d, and 3 more"
    assert some(list("abc"), "; ", most=1) == "a; and 2 more"
