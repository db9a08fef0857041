"""The filter language: valid filters, and errors for invalid ones."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given, strategies as st

from registry.errors import InvalidFilter
from registry.filters import FIELDS, Filter, parse_filter, parse_size, parse_sort

TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20)
SPACES = st.sampled_from(["", " ", "  "])


@given(st.sampled_from(["name", "base", "source", "note"]), st.data())
def test_text_comes_back_without_its_case(name: str, data: st.DataObject) -> None:
    field = FIELDS[name]
    operator, value = data.draw(st.sampled_from(field.operators)), data.draw(TEXT)
    if value.startswith("="):  # `==` is `=`
        value = f"x{value}"
    found = parse_filter(f"{data.draw(SPACES)}{field.name}{data.draw(SPACES)}{operator}{data.draw(SPACES)}{value}")
    assert found == Filter(field, operator, value.strip().lower())


@given(st.floats(-1e9, 1e9, allow_nan=False), st.sampled_from(["rank", "gain", "error"]), st.data())
def test_a_number_comes_back(number: float, name: str, data: st.DataObject) -> None:
    operator = data.draw(st.sampled_from(FIELDS[name].operators))
    found = parse_filter(f"{name}{operator}{number:.6f}")
    assert found == Filter(FIELDS[name], operator, float(f"{number:.6f}"))


@given(st.text(max_size=40), st.sampled_from([parse_filter, parse_sort]))
def test_any_text_is_understood_or_refused_on_one_line(text: str, parse: Callable[[str], object]) -> None:
    refusal = ""
    try:
        parse(text)
    except InvalidFilter as refused:
        refusal = f"{refused.message} {refused.hint}"
    assert refusal.isprintable()


@given(st.integers(0, 10**12))
def test_a_bare_number_is_bytes(size: int) -> None:
    assert parse_size(str(size)) == size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1500", 1500),
        ("10B", 10),
        ("2kB", 2000),
        ("2KB", 2000),
        ("2K", 2048),
        ("2 KiB", 2048),
        ("1.5MiB", 1572864),
        ("10mb", 10_000_000),
        ("10M", 10_485_760),
        ("3GB", 3_000_000_000),
        ("1T", 1 << 40),
    ],
)
def test_a_size_takes_units(text: str, size: float) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "MB", "-5", "5XB", "1e3", "10 M B", "5i", "5iB", "nan", "٣MB", "1" * 40])
def test_what_is_not_a_size_is_none(text: str) -> None:
    assert parse_size(text) is None


@pytest.mark.parametrize(
    ("text", "fact", "hint"),
    [
        ("rank", "'rank' is not a filter", "FIELD OPERATOR VALUE"),
        ("=8", "'=8' is not a filter", "fields: name, base, rank"),
        ("ranks>=8", "there is no field 'ranks'", "did you mean 'rank'?"),
        ("colour=red", "there is no field 'colour'", "fields: name, base, rank"),
        ("rank~8", "rank cannot be compared with ~", "rank takes = != > >= < <="),
        ("tag>prod", "tag cannot be compared with >", "tag takes = != ~"),
        ("rank>=eight", "'eight' is not a number", "rank is the largest rank"),
        ("gain>nan", "'nan' is not a number", "gain is"),
        ("size>big", "'big' is not a size", "10MB"),
        ("status=gone", "'gone' is not a valid status", "one of evicted, pinned, coded"),
        ("tag=a b", "'a b' is not a valid tag", "tag=prod"),
        ("note~\udc80", r"'\\udc80' is not text", ""),
    ],
)
def test_a_wrong_filter_says_what_would_be_right(text: str, fact: str, hint: str) -> None:
    with pytest.raises(InvalidFilter) as refused:
        parse_filter(text)
    assert refused.value.message == fact
    assert hint in (refused.value.hint or "")


@pytest.mark.parametrize(
    ("text", "fact"),
    [
        ("size:up", "'up' is not a sort order"),
        ("weight", "there is no field 'weight'"),
        ("tag", "tasks cannot be sorted by tag"),
        ("status:desc", "tasks cannot be sorted by status"),
    ],
)
def test_a_wrong_order_says_why(text: str, fact: str) -> None:
    with pytest.raises(InvalidFilter) as refused:
        parse_sort(text)
    assert (refused.value.message, bool(refused.value.hint)) == (fact, True)


def test_two_equal_signs_are_one() -> None:
    assert parse_filter("rank==8") == parse_filter("rank=8")


@pytest.mark.parametrize(("text", "descending"), [("size", False), ("size:asc", False), ("SIZE:DESC", True)])
def test_an_order_is_upwards_unless_it_says_otherwise(text: str, descending: bool) -> None:
    assert parse_sort(text).descending is descending
