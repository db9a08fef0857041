"""Chats in the forms that people keep them in."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import pytest
from hypothesis import given, strategies as st

from icmlora.base_models.examples.chats import Chat, chat_of
from icmlora.base_models.examples.examples import Example, text_example
from icmlora.errors import DataError

USER, ASSISTANT = {"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}
PLAIN = (USER, ASSISTANT)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["role", "from", "content", "value", "type", "text", "tool_calls", "function", "arguments"]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)
KEYS = st.sampled_from(
    [
        "messages",
        "conversations",
        "prompt",
        "completion",
        "instruction",
        "input",
        "output",
        "system",
        "tools",
        "history",
    ]
)


def messages_of(row: dict[str, Any]) -> tuple[dict[str, Any], ...]:
    found = chat_of(row)
    assert found is not None
    return found.messages


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [USER, ASSISTANT]},
        {"conversations": [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4"}]},
        {"conversations": [USER, ASSISTANT]},
        {"messages": [{"from": "user", "value": "2 + 2?"}, {"from": "model", "value": "4"}]},
        {"prompt": [USER], "completion": [ASSISTANT]},
        {"prompt": [USER], "completion": "4"},
        {"prompt": "2 + 2?", "completion": [ASSISTANT]},
        {"instruction": "2 + 2?", "output": "4"},
        {"instruction": "2 + 2?", "input": "", "output": "4"},
        {"prompt": "2 + 2?", "prompt_id": "a1", "messages": [USER, ASSISTANT]},
        {"text": None, "messages": [USER, ASSISTANT]},
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "2 + "}, {"type": "text", "text": "2?"}]},
                ASSISTANT,
            ]
        },
    ],
)
def test_all_forms_give_the_same_messages(row: dict[str, Any]) -> None:
    assert messages_of(row) == PLAIN


def test_every_turn_of_the_assistant_is_scored() -> None:
    found = chat_of({"messages": [USER, ASSISTANT, USER, ASSISTANT]})
    assert found is not None
    assert found.scored == (1, 3)


@pytest.mark.parametrize("mark", [{"weight": 0}, {"train": False}])
def test_a_turn_that_was_not_trained_on_is_not_scored(mark: dict[str, Any]) -> None:
    found = chat_of({"messages": [USER, ASSISTANT | mark, USER, ASSISTANT]})
    assert found is not None
    assert found.scored == (3,)


def test_an_answer_in_the_prompt_is_not_scored() -> None:
    found = chat_of({"prompt": [USER, ASSISTANT, USER], "completion": [ASSISTANT]})
    assert found is not None
    assert found.scored == (3,)


def test_the_input_of_an_instruction_follows_it() -> None:
    row = {"instruction": "Translate.", "input": "Hund", "output": "dog"}
    assert messages_of(row)[0]["content"] == "Translate.\nHund"


def test_an_instruction_has_alpacas_prompt_as_its_plain_form() -> None:
    found = chat_of({"instruction": "Translate.", "input": "Hund", "output": "dog"})
    assert found is not None
    assert found.plain is not None
    prompt, completion = found.plain
    assert prompt.startswith("Below is an instruction that describes a task, paired with an input")
    assert prompt.endswith("### Instruction:\nTranslate.\n\n### Input:\nHund\n\n### Response:\n")
    assert completion == "dog"


def test_earlier_turns_of_an_instruction_are_its_history() -> None:
    row = {"instruction": "3 + 3?", "output": "6", "history": [["2 + 2?", "4"]], "system": "Be brief."}
    found = chat_of(row)
    assert found is not None
    assert [message["role"] for message in found.messages] == ["system", "user", "assistant", "user", "assistant"]
    assert (found.scored, found.plain) == ((4,), None)


def test_a_system_prompt_beside_a_conversation_comes_first_once() -> None:
    system = {"role": "system", "content": "Be brief."}
    row = {"conversations": [USER, ASSISTANT], "system": "Be brief."}
    assert messages_of(row) == (system, *PLAIN)
    assert messages_of(row | {"conversations": [system, *PLAIN]}) == (system, *PLAIN)


def test_calls_of_tools_are_kept_with_their_arguments_as_objects() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 2}'}}
    turns = [USER, {"role": "assistant", "content": None, "tool_calls": [call]}, {"role": "tool", "content": "4"}]
    found = chat_of({"messages": turns})
    assert found is not None
    assert found.scored == (1,)
    assert found.messages[1]["content"] == ""
    assert found.messages[1]["tool_calls"][0]["function"] == {"name": "add", "arguments": {"a": 2}}


def test_calls_and_observations_of_sharegpt_are_turns_of_assistant_and_tool() -> None:
    turns = [
        {"from": "human", "value": "?"},
        {"from": "function_call", "value": "{}"},
        {"from": "observation", "value": "4"},
    ]
    assert [message["role"] for message in messages_of({"conversations": turns})] == ["user", "assistant", "tool"]


@pytest.mark.parametrize("tools", [[{"name": "add"}], '[{"name": "add"}]'])
def test_tools_are_read_as_a_list_or_as_its_json(tools: Any) -> None:
    found = chat_of({"messages": [USER, ASSISTANT], "tools": tools})
    assert found is not None
    assert found.tools == ({"name": "add"},)


@pytest.mark.parametrize("tools", ["not json", [1, 2], {"name": "add"}, 7])
def test_tools_of_another_shape_are_left_out(tools: Any) -> None:
    found = chat_of({"messages": [USER, ASSISTANT], "tools": tools})
    assert found is not None
    assert found.tools == ()


@pytest.mark.parametrize(
    ("turns", "fact"),
    [
        ([USER], "no assistant turn"),
        ([USER, {"role": "assistant", "content": " "}], "no assistant turn"),
        ([USER, {"role": "assistant"}], "no assistant turn"),
        (["hello"], "not an object"),
        ([{"content": "hello"}], "without a role"),
        ([{"role": "user", "content": 3}, ASSISTANT], "not text"),
        (
            [{"role": "user", "content": [{"type": "image", "image": "a.png"}]}, ASSISTANT],
            "part that is not text: 'image'",
        ),
        ([{"role": "user", "content": [3]}, ASSISTANT], "not text"),
        ([{"role": "user", "content": "a \ud800"}, ASSISTANT], "surrogate"),
    ],
)
def test_a_chat_that_cannot_be_used_is_refused_with_the_reason(turns: list[Any], fact: str) -> None:
    with pytest.raises(DataError, match=fact):
        chat_of({"messages": turns})


@pytest.mark.parametrize("row", [{}, {"messages": []}, {"messages": "hello"}, {"prompt": "a"}, {"instruction": "a"}])
def test_a_row_without_a_chat_is_none(row: dict[str, Any]) -> None:
    assert chat_of(row) is None


@pytest.mark.slow
@given(st.dictionaries(KEYS, VALUES, max_size=4))
def test_any_row_is_an_example_or_refused_with_a_fact(row: dict[str, Any]) -> None:
    with contextlib.suppress(DataError):
        found = text_example(row)
        assert isinstance(found, Example | Chat)
        if isinstance(found, Chat):
            assert found.scored
            assert all(isinstance(message["content"], str) for message in found.messages)
            json.dumps(found.messages)
