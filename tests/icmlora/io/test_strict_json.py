"""JSON from strangers."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, strategies as st

from icmlora.errors import AdapterRefused, UnsafeInput
from icmlora.io.strict_json import MAX_DEPTH, parse_object


def parse(text: str | bytes) -> dict[str, Any]:
    return parse_object(text.encode() if isinstance(text, str) else text, what="the file", max_bytes=1 << 20)


PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**20), 10**20)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=12,
)


@given(st.dictionaries(st.text(), PLAIN))
def test_a_plain_object_is_read_as_the_standard_parser_reads_it(value: dict[str, Any]) -> None:
    text = json.dumps(value)
    assert parse(text) == json.loads(text)


@given(st.binary(max_size=200))
def test_any_bytes_give_an_object_or_one_of_our_errors(data: bytes) -> None:
    try:
        assert isinstance(parse(data), dict)
    except AdapterRefused as error:
        refused = error
    else:
        return
    assert refused.message.isprintable()


def test_a_duplicate_key_is_refused_by_name() -> None:
    with pytest.raises(UnsafeInput, match="'r' twice") as caught:
        parse('{"r": 8, "r": 16}')
    assert caught.value.kind == "duplicate-key"


def test_a_duplicate_key_deep_inside_is_refused() -> None:
    with pytest.raises(UnsafeInput, match="twice"):
        parse('{"a": [{"b": 1, "b": 2}]}')


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "-1e999"])
def test_a_number_that_is_not_finite_is_refused(number: str) -> None:
    with pytest.raises(AdapterRefused, match="not valid JSON"):
        parse(f'{{"alpha": {number}}}')


def test_a_number_of_ten_thousand_digits_is_refused() -> None:
    with pytest.raises(AdapterRefused, match="not valid JSON"):
        parse('{"r": ' + "9" * 10_000 + "}")


@pytest.mark.parametrize("text", ["[]", "1", '"a"', "null"])
def test_anything_but_an_object_is_refused(text: str) -> None:
    with pytest.raises(AdapterRefused, match="not a JSON object"):
        parse(text)


@pytest.mark.parametrize("opening", ["[", '{"a":'])
def test_a_nesting_bomb_is_refused(opening: str) -> None:
    with pytest.raises(UnsafeInput, match="nested") as caught:
        parse('{"a":' + opening * 100_000)
    assert caught.value.kind == "limits"


BOMBS = {
    "numbers": '{"a":[' + "1," * 500_000 + "1]}",
    "empty lists": '{"a":[' + "[]," * 500_000 + "1]}",
    "texts": '{"a":[' + '"a" ' * 250_000 + "]}",
    "quotes": '{"a":"' + '\\"' * 500_000 + '"}',
    "backslashes": '{"a":"' + "\\" * 1_000_000,
    "strings that never end": '{"a":' + '"\\' * 500_000,
}


@pytest.mark.parametrize("case", BOMBS)
def test_a_bomb_of_many_small_things_is_refused_unparsed(case: str) -> None:
    with pytest.raises(UnsafeInput, match="of the character") as caught:
        parse_object(BOMBS[case].encode(), what="the file", max_bytes=1 << 24)
    assert caught.value.kind == "limits"


def test_one_string_of_a_megabyte_that_never_ends_is_refused() -> None:
    with pytest.raises(AdapterRefused, match="not valid JSON"):
        parse('{"a":"' + "x" * 1_000_000)


def test_the_deepest_nesting_allowed_is_read() -> None:
    depth = MAX_DEPTH - 1
    assert parse('{"a":' + "[" * depth + "]" * depth + "}")


def test_brackets_inside_text_are_no_nesting() -> None:
    assert parse(json.dumps({"a": '["{' * 1000})) == {"a": '["{' * 1000}


def test_more_bytes_than_allowed_are_refused_unparsed() -> None:
    with pytest.raises(UnsafeInput, match="more than 4"):
        parse_object(b'{"a": 1}', what="the file", max_bytes=4)


def test_a_lone_surrogate_is_refused() -> None:
    with pytest.raises(UnsafeInput, match="surrogate"):
        parse('{"a": {"b": ["\\ud800"]}}')


def test_an_escaped_pair_of_surrogates_is_one_character() -> None:
    assert parse('{"a": "\\ud83d\\ude00"}') == {"a": "\U0001f600"}


def test_bytes_that_are_no_utf8_are_refused() -> None:
    with pytest.raises(AdapterRefused, match="not valid JSON"):
        parse(b'{"a": "\xff"}')
