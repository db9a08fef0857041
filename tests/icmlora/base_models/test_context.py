"""Contexts: samples that stand before a request."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, strategies as st
from torch.nn import functional

from icmlora.base_models.examples.chat_template import CHATML, ChatTemplate
from icmlora.base_models.examples.chats import Chat
from icmlora.base_models.examples.context import TaskContext
from icmlora.base_models.examples.examples import Example
from icmlora.base_models.kinds.likelihood import nll, tokenized
from icmlora.base_models.modality import BaseModel
from icmlora.errors import DataError
from tests.icmlora.tiny_base import load_tiny_base

PAIR = Example("2 + 2 = ", "four")
SYSTEM = {"role": "system", "content": "Be brief."}
ASKED, ANSWERED = {"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "four"}
CHAT = Chat((SYSTEM, ASKED, ANSWERED), (2,))
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1)


@pytest.fixture
def base(tmp_path: Path) -> BaseModel:
    return load_tiny_base(tmp_path / "base")


def roles(messages: Any) -> list[str]:
    return [message["role"] for message in messages]


def test_texts_stand_one_after_the_other() -> None:
    context = TaskContext.of([Example("", "one\n"), Example("", "two")])
    assert (context.text, context.messages) == ("one\n\ntwo\n\n", ())


def test_pairs_are_questions_and_answers_of_a_chat() -> None:
    context = TaskContext.of([PAIR, PAIR])
    assert context.text == "2 + 2 = four\n\n" * 2
    assert roles(context.messages) == ["user", "assistant"] * 2


def test_a_system_message_that_all_chats_have_stays_once() -> None:
    assert roles(TaskContext.of([CHAT, CHAT]).messages) == ["system", "user", "assistant", "user", "assistant"]
    other = Chat(({"role": "system", "content": "Be long."}, ASKED, ANSWERED), (2,))
    assert roles(TaskContext.of([CHAT, other]).messages) == ["user", "assistant"] * 2


def test_the_system_message_of_a_request_takes_the_place_of_the_contexts() -> None:
    asked = [{"role": "system", "content": "Answer in French."}, ASKED]
    messages = TaskContext.of([CHAT]).before_messages(asked)
    assert roles(messages) == ["system", "user", "assistant", "user"]
    assert messages[0] == asked[0]


def test_a_context_that_is_text_is_the_system_message_of_a_chat() -> None:
    context = TaskContext("one\n\n")
    assert context.before_messages([ASKED]) == [{"role": "system", "content": "one"}, ASKED]
    assert context.before_messages([SYSTEM, ASKED])[0]["content"] == "one\n\nBe brief."
    parts = {"role": "system", "content": [{"type": "text", "text": "Be brief."}]}
    assert [part["text"] for part in context.before_messages([parts])[0]["content"]] == ["one\n\n", "Be brief."]


@given(TEXTS, st.lists(st.tuples(TEXTS, TEXTS)))
def test_files_give_the_context_back(text: str, turns: list[tuple[str, str]]) -> None:
    messages = tuple(
        {"role": role, "content": said}
        for pair in turns
        for role, said in zip(("user", "assistant"), pair, strict=True)
    )
    context = TaskContext(text, messages)
    assert TaskContext.read(context.files) == context


@pytest.mark.one_case
@pytest.mark.parametrize(
    "files",
    [
        {"context.json": b"["},
        {"context.json": b"[" * 100_000},
        {"context.json": b'{"messages": []}'},
        {"context.json": b'{"messages": ["hello"]}'},
        {"context.json": b'{"messages": [{"content": "hello"}]}'},
        {"context.txt": b"\xff"},
    ],
)
def test_files_that_are_no_context_are_refused_by_name(files: dict[str, bytes]) -> None:
    with pytest.raises(DataError) as caught:
        TaskContext.read(files)
    assert caught.value.path == next(iter(files))


def test_no_file_is_no_context() -> None:
    assert TaskContext.read({"tokenizer.json": b"{}"}) is None


def test_the_same_tokens_are_scored_behind_a_context(base: BaseModel) -> None:
    context = TaskContext("something else\n\n")
    for example in (PAIR, Example("", "the first text")):
        (alone,), (behind,) = (tokenized(base.tokenizer, [one], 10) for one in (example, context.before(example)))
        assert (behind.count, behind.ids[behind.context :]) == (alone.count, alone.ids)


def test_a_context_that_is_read_once_gives_the_loss_of_reading_it_each_time(base: BaseModel) -> None:
    context = TaskContext("something else\n\n")
    texts = [context.before(one) for one in (Example("", "the first text"), PAIR, Example("", "третий"))]
    expected = []
    for item in tokenized(base.tokenizer, texts, 256):
        ids = torch.tensor(item.ids)
        with torch.no_grad():
            logits = base.model(ids[None]).logits[0, item.first - 1 : -1]
        expected.append(float(functional.cross_entropy(logits, ids[item.first :], reduction="sum")))
    for batch_size in (1, 3):
        found = nll(base.model, base.tokenizer, texts, batch_size=batch_size)
        assert found.value * found.count == pytest.approx(sum(expected), rel=1e-5)


def test_a_context_that_leaves_no_room_is_refused(base: BaseModel) -> None:
    with pytest.raises(DataError, match="the context has 40 tokens, but the base model reads only 40"):
        nll(base.model, base.tokenizer, [TaskContext("x" * 40).before(PAIR)], positions=40)


def test_a_chat_is_scored_alike_behind_others(base: BaseModel) -> None:
    template = ChatTemplate(CHATML, {})
    long = Chat((ASKED, ANSWERED) * 3, (1, 3, 5))
    for limit in (1000, 60):
        (alone,), (behind,) = (
            tokenized(base.tokenizer, [template.render(chat)], limit)
            for chat in (long, TaskContext.of([CHAT]).before(long))
        )
        assert behind.targets == alone.targets
        assert behind.ids[behind.context :] == alone.ids


def test_a_picture_has_no_context() -> None:
    with pytest.raises(DataError, match="a context must be text"):
        TaskContext("one").before(object())  # type: ignore[arg-type]
