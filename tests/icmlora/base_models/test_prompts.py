"""Prompts of examples and of files, and how a language model continues them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, strategies as st

from icmlora.base_models.examples.chat_template import Rendered
from icmlora.base_models.examples.examples import Example, plain
from icmlora.base_models.examples.prompts import MAX_PROMPTS, Prompt, prompts_of, read_prompts
from icmlora.base_models.modality import BaseModel
from icmlora.base_models.reading import given_prompts
from icmlora.errors import DataError
from tests.icmlora.tiny_base import load_tiny_base

ASKED = [{"role": "user", "content": "How are you?"}]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    return load_tiny_base(tmp_path_factory.mktemp("base"))


def read(*rows: object) -> list[Any]:
    return read_prompts("".join(json.dumps(row) + "\n" for row in rows).encode(), "prompts.jsonl")


@given(st.text(min_size=2, max_size=300))
def test_a_plain_text_is_cut_into_prompt_and_what_follows(text: str) -> None:
    for prompt in prompts_of(plain([text]), 1):
        assert (prompt.text + prompt.expected)[:300] == text[: len(prompt.text) + 400]
        assert 0 < len(prompt.text) <= 100


def test_a_text_is_cut_between_words() -> None:
    (prompt,) = prompts_of(plain(["word " * 60]), 1)
    assert prompt.text.endswith("word")
    assert prompt.expected.startswith(" word")


def test_a_prompt_and_its_completion_stay_apart() -> None:
    assert prompts_of([Example("2 + 2 =", " 4")], 3) == [Prompt("2 + 2 =", " 4")]


def test_a_chat_is_cut_before_the_first_answer() -> None:
    chat = Rendered("<user>hi<bot>hello<user>bye<bot>ciao", ((13, 18), (31, 35)), 6, 35)
    assert prompts_of([chat], 1) == [Prompt("<user>hi<bot>", "hello", is_rendered=True)]


def test_prompts_are_spread_over_the_examples() -> None:
    found = prompts_of([Example(f"prompt {number}", "x") for number in range(9)], 3)
    assert [prompt.text for prompt in found] == ["prompt 0", "prompt 3", "prompt 6"]


def test_what_is_no_text_has_no_prompt() -> None:
    assert prompts_of([{"image": "cat.png"}], 3) == []


def test_a_file_of_lines_is_a_prompt_a_line() -> None:
    assert read_prompts(b"\xef\xbb\xbfOnce upon\n\n  a time\r\n", "p.txt") == [Prompt("Once upon"), Prompt("  a time")]


@pytest.mark.parametrize("inside", ["\u2028", "\x85", "\f"])
def test_only_newlines_end_a_line(inside: str) -> None:
    assert read_prompts(f"one{inside}prompt\rtwo".encode(), "p.txt") == [Prompt(f"one{inside}prompt"), Prompt("two")]


def test_a_file_of_rows_takes_prompts_texts_and_completions() -> None:
    assert read({"prompt": "a"}, {"text": "b"}, {"prompt": "c", "completion": "d"}) == [
        Prompt("a"),
        Prompt("b"),
        Prompt("c", "d"),
    ]


@pytest.mark.parametrize("turns", [ASKED, [*ASKED, {"role": "assistant", "content": "Fine."}]])
def test_a_chat_of_a_file_ends_where_the_model_has_to_answer(base: BaseModel, turns: list[dict[str, str]]) -> None:
    found = given_prompts(base, [Prompt("plain"), *read({"messages": turns}, {"prompt": turns})])
    chat = Prompt("<|im_start|>user\nHow are you?<|im_end|>\n<|im_start|>assistant\n", is_rendered=True)
    assert found == [Prompt("plain"), chat, chat]


@pytest.mark.parametrize(
    ("data", "fact"),
    [
        (b"", "contains no prompt"),
        (b"\n \n", "contains no prompt"),
        (b"\xff\xfe\xfa", "is not UTF-8"),
        (b'{"prompt": "a"}\n{"question": "b"}\n', 'line 2 has no "prompt", "text" or "messages"'),
        (b'{"prompt": "a"}\nplain\n', "line 2 is not JSON"),
        (b'{"prompt": " "}\n', "line 1 has no"),
        (b'{"messages": [{"content": "no role"}]}\n', "line 1 has a message without a role"),
        (b"line\n" * (MAX_PROMPTS + 1), "more than 100"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_with_the_place(data: bytes, fact: str) -> None:
    with pytest.raises(DataError) as caught:
        read_prompts(data, Path("p.jsonl"))
    assert fact in caught.value.message
    assert caught.value.path == "p.jsonl"


def test_an_answer_is_the_most_probable_token_again_and_again(base: BaseModel) -> None:
    ids = list(base.tokenizer("tall ships")["input_ids"])
    for _ in range(5):
        with torch.inference_mode():
            logits = base.model(input_ids=torch.tensor([ids])).logits
        ids.append(int(logits[0, -1].argmax()))
    written = base.tokenizer.decode(ids[-5:], skip_special_tokens=True)
    assert base.modality.answer(base, Prompt("tall ships"), 5) == written


def test_of_a_prompt_that_is_too_long_the_end_is_read(base: BaseModel) -> None:
    short = replace(base, positions=20)
    assert base.modality.answer(short, Prompt("x" * 500 + "tall ships at"), 7) == base.modality.answer(
        base, Prompt("tall ships at"), 7
    )


def test_an_empty_prompt_is_answered_too(base: BaseModel) -> None:
    assert isinstance(base.modality.answer(base, Prompt(""), 3), str)
