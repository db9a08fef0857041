"""Laws of files of text: what is a line, what is an example, and which examples are chosen."""

from __future__ import annotations

import codecs
import json
from itertools import pairwise

import pytest
from hypothesis import given, strategies as st

from icmlora.base_models.examples.examples import Example, parse_examples, plain, spread
from icmlora.base_models.reading import EvaluationData
from icmlora.errors import DataError

WORDS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20).filter(lambda text: text.strip())
EXAMPLES = st.builds(Example, st.just("") | WORDS, WORDS)
FILES = st.lists(EXAMPLES, min_size=1, max_size=6)


def line(example: Example) -> str:
    if example.prompt:
        return json.dumps({"prompt": example.prompt, "completion": example.completion})
    return json.dumps({"text": example.completion})


def written(examples: list[Example], end: str = "\n") -> bytes:
    return "".join(line(example) + end for example in examples).encode()


@pytest.mark.slow
@given(FILES, FILES)
def test_two_files_one_after_the_other_are_the_examples_of_both(first: list[Example], second: list[Example]) -> None:
    assert parse_examples(written(first) + written(second)).items == (*first, *second)


@given(FILES, st.sampled_from(["\n", "\r\n", "\n\n", " \n", "\n \t\n"]))
def test_how_lines_end_and_whether_the_last_one_does_changes_nothing(examples: list[Example], end: str) -> None:
    assert parse_examples(written(examples, end)).items == tuple(examples)
    assert parse_examples(written(examples, end).rstrip()).items == tuple(examples)


@given(FILES)
def test_a_byte_order_mark_is_allowed_only_at_the_beginning(examples: list[Example]) -> None:
    assert parse_examples(codecs.BOM_UTF8 + written(examples)).items == tuple(examples)
    found = parse_examples(written(examples) + codecs.BOM_UTF8 + written(examples))
    assert (found.items, found.skipped) == ((*examples, *examples[1:]), 1)
    assert f"line {len(examples) + 1} is not JSON" in str(found.reason)


@given(FILES, st.integers(0, 5), st.sampled_from([b"{", b"null", b'"text"', b'{"text": null}', b'{"prompt": "a"}']))
def test_one_bad_line_is_skipped_and_named(examples: list[Example], place: int, bad: bytes) -> None:
    lines = written(examples).splitlines()
    at = min(place, len(lines))
    found = parse_examples(b"\n".join([*lines[:at], bad, *lines[at:]]), path="samples.jsonl")
    assert (found.items, found.skipped) == (tuple(examples), 1)
    assert f"line {at + 1} " in str(found.reason)


@given(st.sampled_from([b"{", b"null", b'"text"', b'{"text": null}', b'{"prompt": "a"}']))
def test_a_file_of_nothing_but_a_bad_line_is_refused_and_the_line_is_named(bad: bytes) -> None:
    with pytest.raises(DataError, match="line 1 ") as caught:
        parse_examples(bad, path="samples.jsonl")
    assert caught.value.path == "samples.jsonl"
    assert caught.value.hint


@given(EXAMPLES)
def test_the_text_of_an_example_is_its_prompt_and_then_its_completion(example: Example) -> None:
    assert example.text.startswith(example.prompt)
    assert example.text.endswith(example.completion)
    assert len(example.text) == len(example.prompt) + len(example.completion)


@given(st.lists(WORDS, max_size=5))
def test_plain_texts_are_completions_alone(texts: list[str]) -> None:
    assert [(example.prompt, example.completion) for example in plain(texts)] == [("", text) for text in texts]


@given(st.lists(st.integers(), max_size=60), st.integers(0, 80))
def test_a_choice_has_as_many_items_as_there_are_or_were_asked_for(items: list[int], most: int) -> None:
    chosen = spread(items, most)
    assert len(chosen) == min(most, len(items))
    if most >= len(items):
        assert chosen == items


@given(st.integers(1, 200), st.integers(1, 50))
def test_chosen_items_are_in_order_and_evenly_apart(count: int, most: int) -> None:
    chosen = spread(range(count), most)
    gaps = [later - earlier for earlier, later in pairwise(chosen)]
    assert chosen[0] == 0
    assert all(gap >= 1 for gap in gaps)
    assert not gaps or max(gaps) - min(gaps) <= 1


@given(FILES, FILES)
def test_evaluation_data_of_other_bytes_has_another_name(first: list[Example], second: list[Example]) -> None:
    one, other = (EvaluationData.parse(written(examples)) for examples in (first, second))
    assert (one.digest == other.digest) == (written(first) == written(second))
    assert one.examples == tuple(first)


@given(FILES)
def test_evaluation_data_says_what_of_it_was_skipped(examples: list[Example]) -> None:
    whole, odd = EvaluationData.parse(written(examples)), EvaluationData.parse(written(examples) + b"{\n")
    assert (whole.skipped, odd.examples) == (None, whole.examples)
    assert f"skipped 1 of {len(examples) + 1:,} rows" in str(odd.skipped)


@pytest.mark.parametrize("key", ["Text", "content", "input", "instruction", "TEXT", " text"])
def test_a_text_under_another_key_is_no_text(key: str) -> None:
    with pytest.raises(DataError, match="line 1 has no text") as caught:
        parse_examples(json.dumps({key: "hello"}).encode())
    assert '{"text": "..."}' in str(caught.value.hint)


@pytest.mark.parametrize("blank", ["", " ", "\\n", "\\t \\u00a0", "\\u2003"])
def test_text_of_nothing_but_space_is_refused(blank: str) -> None:
    with pytest.raises(DataError, match="is empty text"):
        parse_examples(f'{{"text": "{blank}"}}'.encode())


def test_text_of_a_line_wins_over_prompt_and_completion() -> None:
    both = json.dumps({"prompt": "a", "completion": "b", "text": "c"}).encode()
    assert parse_examples(both).items == (Example("", "c"),)
