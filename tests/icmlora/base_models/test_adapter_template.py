"""The chat template that came with an adapter is found where transformers looks, and is stopped at its limits."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from icmlora.base_models.examples.adapter_template import LIMITS, render_in_child, template_of
from icmlora.base_models.examples.chat_template import ChatTemplate
from icmlora.base_models.examples.chats import Chat, chat_of
from icmlora.errors import DataError
from tests.icmlora.base_models.chat_templates import GEMMA, MARKED, MISTRAL, QWEN, chat_tokenizer

FEW = replace(LIMITS, memory=64 << 20, seconds=1)
TURNS = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "It is 4."}]


def chat(*messages: dict[str, Any]) -> Chat:
    found = chat_of({"messages": list(messages)})
    assert found is not None
    return found


@pytest.mark.one_case
@pytest.mark.parametrize("template", [QWEN, MARKED, {"default": QWEN, "tool_use": MISTRAL}])
def test_the_process_renders_what_this_one_renders(template: Any) -> None:
    chosen = ChatTemplate.of(chat_tokenizer(MISTRAL), template)
    chats = [chat(*TURNS[:1], {"role": "assistant", "content": f"é料 {number}"}) for number in range(3)]
    assert render_in_child(chosen, chats) == chosen.render_all(chats)


@pytest.mark.slow
def test_a_chat_that_the_template_refuses_is_named_and_the_others_are_rendered() -> None:
    odd = chat({"role": "system", "content": "Be brief."}, TURNS[0], {"role": "assistant", "content": "4"})
    fine = chat(TURNS[0], {"role": "assistant", "content": "4"})
    refused, rendered = render_in_child(ChatTemplate.of(chat_tokenizer(None), GEMMA), [odd, fine])
    assert isinstance(refused, DataError)
    assert "System role not supported" in refused.message
    assert not isinstance(rendered, DataError)


@pytest.mark.slow
def test_a_template_that_never_ends_is_stopped() -> None:
    loop = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    with pytest.raises(DataError, match="takes more than 1 s") as caught:
        render_in_child(ChatTemplate(loop, {}), [chat(TURNS[0], {"role": "assistant", "content": "4"})], FEW)
    assert "remove the chat template" in str(caught.value.hint)


@pytest.mark.slow
def test_a_template_cannot_fill_the_memory() -> None:
    fine = chat(TURNS[0], {"role": "assistant", "content": "4"})
    (refused,) = render_in_child(ChatTemplate("{{ 'a' * 10**10 }}", {}), [fine], FEW)
    assert isinstance(refused, DataError)
    assert "too much memory" in refused.message


def test_a_template_is_found_where_transformers_saves_it() -> None:
    several = [{"name": "default", "template": "a"}, {"name": "tool_use", "template": "b"}]
    assert template_of({"chat_template.jinja": b"a", "tokenizer_config.json": b'{"chat_template": "b"}'}) == "a"
    assert template_of({"tokenizer_config.json": b'{"chat_template": "b"}'}) == "b"
    assert template_of({"tokenizer_config.json": json.dumps({"chat_template": several}).encode()}) == {
        "default": "a",
        "tool_use": "b",
    }


@pytest.mark.parametrize(
    "config", [b"{}", b"[", b"[" * 100_000, b'{"chat_template": 1}', b'{"chat_template": [1]}', b"\xff"]
)
def test_a_configuration_without_a_template_has_none(config: bytes) -> None:
    assert template_of({"tokenizer_config.json": config}) is None
