"""JSON lines of text."""

from __future__ import annotations

import codecs
import contextlib
import hashlib
import json

import pytest
from hypothesis import given, strategies as st

from icmlora.base_models.examples.examples import Example, parse_examples
from icmlora.base_models.reading import EvaluationData
from icmlora.errors import DataError

TEXTS = st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=40)
COMPLETIONS = TEXTS.filter(lambda text: bool(text.strip()))


def test_plain_text_is_all_completion() -> None:
    assert parse_examples(b'{"text": "one"}\n{"text": "two"}\n').items == (Example("", "one"), Example("", "two"))


def test_a_prompt_is_kept_apart_from_its_completion() -> None:
    (example,) = parse_examples(b'{"prompt": "2 + 2 = ", "completion": "4"}')
    assert example == Example("2 + 2 = ", "4")
    assert example.text == "2 + 2 = 4"


def test_other_fields_of_a_line_are_left_alone() -> None:
    assert parse_examples(b'{"id": 7, "text": "one"}').items == (Example("", "one"),)


def test_blank_lines_and_windows_line_ends_are_no_examples() -> None:
    assert len(parse_examples(b'\r\n{"text": "one"}\r\n\n  \n{"text": "two"}')) == 2


def test_a_byte_order_mark_is_passed_over() -> None:
    assert parse_examples(codecs.BOM_UTF8 + b'{"text": "one"}').items == (Example("", "one"),)


@given(st.lists(st.tuples(TEXTS, COMPLETIONS), min_size=1, max_size=8))
def test_what_is_written_as_json_lines_is_read_back(pairs: list[tuple[str, str]]) -> None:
    data = "\n".join(json.dumps({"prompt": prompt, "completion": end}, ensure_ascii=False) for prompt, end in pairs)
    assert parse_examples(data.encode()).items == tuple(Example(prompt, end) for prompt, end in pairs)


@given(st.binary(max_size=200))
def test_arbitrary_bytes_are_parsed_or_refused_as_data(data: bytes) -> None:
    with contextlib.suppress(DataError):
        assert parse_examples(data)


BAD_LINES = pytest.mark.parametrize(
    ("line", "fact"),
    [
        (b"not json", "is not JSON"),
        (b"\xff\xfe", "is not UTF-8"),
        (b"[" * 100_000, "is not JSON"),
        (b"[1]", "is not a JSON object"),
        (b'{"text": 3}', "has no text"),
        (b'{"prompt": "a"}', "has no text"),
        (b'{"text": " "}', "is empty text"),
        (b'{"prompt": "a", "completion": ""}', "is empty text"),
        (b'{"text": "a \\ud800 b"}', "a lone surrogate"),
        (b'{"messages": [{"role": "user", "content": "a"}]}', "has no assistant turn"),
    ],
)


@BAD_LINES
def test_a_bad_line_is_skipped_and_named_by_its_number(line: bytes, fact: str) -> None:
    found = parse_examples(b'{"text": "good"}\n' + line + b'\n{"text": "better"}\n' + line)
    assert (len(found), found.skipped) == (2, 2)
    assert str(found.reason).startswith("line 2 ")
    assert fact in str(found.reason)
    assert found.summary == f"skipped 2 of 4 rows; the first: {found.reason}"


@BAD_LINES
def test_a_file_of_bad_lines_is_refused_with_the_first_reason(line: bytes, fact: str) -> None:
    with pytest.raises(DataError, match=fact) as caught:
        parse_examples(b"\n" + line + b"\n" + line, path="eval.jsonl")
    # A file that begins with a bracket is an array, and a broken one ends there.
    expected = (
        "eval.jsonl: "
        if line.startswith((b"[", b"\xff\xfe"))
        else "eval.jsonl: none of its 2 rows is usable; the first: line 2 "
    )
    assert str(caught.value).startswith(expected)
    assert '"messages"' in str(caught.value.hint)


def test_a_file_that_can_be_used_whole_has_nothing_to_say() -> None:
    assert parse_examples(b'{"text": "one"}').summary is None


def test_a_text_with_its_chat_beside_it_is_text() -> None:
    assert parse_examples(b'{"messages": [], "text": "one"}').items == (Example("", "one"),)


def test_a_file_without_examples_is_refused() -> None:
    with pytest.raises(DataError, match="holds no example"):
        parse_examples(b"\n\n")


def test_too_many_examples_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("icmlora.base_models.examples.examples.MAX_EXAMPLES", 2)
    with pytest.raises(DataError, match="more than 2 examples"):
        parse_examples(b'{"text": "a"}\n' * 3)


def test_too_many_bytes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("icmlora.base_models.examples.examples.MAX_BYTES", 4)
    with pytest.raises(DataError, match="more than 4 bytes"):
        parse_examples(b'{"text": "a"}')


def test_evaluation_data_is_named_by_the_digest_of_its_file() -> None:
    data = b'{"text": "one"}\n'
    assert EvaluationData.parse(data) == EvaluationData((Example("", "one"),), hashlib.sha256(data).hexdigest())
