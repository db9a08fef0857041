"""Chats are rendered as the base model's trainer did, and only the assistant's turns are scored."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
from hypothesis import given, strategies as st

from icmlora.base_models.examples.chat_template import CHATML, MAX_TEMPLATE, ChatTemplate, Rendered, scored_tokens
from icmlora.base_models.examples.chats import Chat, chat_of
from icmlora.base_models.kinds.likelihood import tokenized
from icmlora.errors import DataError
from tests.icmlora.base_models.chat_templates import ALL, DATED, GEMMA, LLAMA_3, MISTRAL, QWEN, TOOLS, chat_tokenizer

QUESTIONS = [
    {"role": "user", "content": "2 + 2?"},
    {"role": "assistant", "content": "It is 4."},
    {"role": "user", "content": "3 + 3?"},
    {"role": "assistant", "content": "It is 6."},
]
LETTERS = st.text(alphabet="abc é料", min_size=1, max_size=12).filter(lambda text: bool(text.strip()))


def chat(*messages: dict[str, Any], **more: Any) -> Chat:
    found = chat_of({"messages": list(messages), **more})
    assert found is not None
    return found


def render(template: str | dict[str, str] | None, *messages: dict[str, Any], **more: Any) -> Rendered:
    return ChatTemplate.of(chat_tokenizer(template)).render(chat(*messages, **more))


def scored_texts(rendered: Rendered) -> list[str]:
    return [rendered.text[start:end] for start, end in rendered.scored]


@pytest.mark.parametrize("name", ALL)
def test_the_text_is_what_transformers_renders(name: str) -> None:
    tokenizer = chat_tokenizer(ALL[name])
    whole = tokenizer.apply_chat_template(QUESTIONS, tokenize=False, date_string="26 Jul 2024")
    assert render(ALL[name], *QUESTIONS).text == whole


@pytest.mark.parametrize("name", ALL)
def test_both_answers_are_scored_and_no_question_is(name: str) -> None:
    first, second = scored_texts(render(ALL[name], *QUESTIONS))
    assert "It is 4." in first
    assert "It is 6." in second
    assert not any("?" in text or "user" in text or "INST" in text for text in (first, second))


@pytest.mark.parametrize("name", sorted(ALL))
@given(turns=st.lists(st.tuples(LETTERS, LETTERS), min_size=1, max_size=3))
def test_every_answer_is_scored_once_whatever_is_said(name: str, turns: list[tuple[str, str]]) -> None:
    messages = []
    for asked, answered in turns:
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": f"[{answered}]"}]
    texts = scored_texts(render(ALL[name], *messages))
    assert len(texts) == len(turns)
    assert all(f"[{answered}]" in text for text, (_, answered) in zip(texts, turns, strict=True))


@pytest.mark.parametrize(("template", "end"), [(QWEN, "<|im_end|>\n"), (LLAMA_3, "<|eot_id|>"), (MISTRAL, "</s>")])
def test_the_end_of_a_turn_is_scored_too_for_the_adapter_was_trained_to_stop(template: str, end: str) -> None:
    assert scored_texts(render(template, *QUESTIONS))[1].endswith("It is 6." + end)


def test_a_template_that_marks_what_is_generated_decides_itself() -> None:
    assert scored_texts(render(ALL["marked"], *QUESTIONS)) == ["It is 4.<|im_end|>", "It is 6.<|im_end|>"]


def test_of_a_marked_template_a_turn_without_weight_is_not_scored() -> None:
    unweighted = [QUESTIONS[0], QUESTIONS[1] | {"weight": 0}, *QUESTIONS[2:]]
    assert ["It is 6." in text for text in scored_texts(render(ALL["marked"], *unweighted))] == [True]


def test_only_the_completion_of_a_prompt_of_messages_is_scored() -> None:
    found = chat_of({"prompt": QUESTIONS[:3], "completion": QUESTIONS[3:]})
    assert found is not None
    assert scored_texts(ChatTemplate.of(chat_tokenizer(QWEN)).render(found)) == ["It is 6.<|im_end|>\n"]


def test_a_system_prompt_is_part_of_the_text() -> None:
    rendered = render(QWEN, {"role": "system", "content": "Be brief."}, *QUESTIONS)
    assert rendered.text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n")


def test_a_task_vector_reads_to_the_end_of_the_last_answer_and_skips_what_every_task_has() -> None:
    rendered = render(QWEN, *QUESTIONS)
    assert rendered.text[: rendered.stop].endswith("It is 6.")
    assert rendered.text[rendered.start :].startswith("2 + 2?")


@pytest.mark.parametrize("template", [DATED, LLAMA_3.replace("not date_string is defined", "true")])
def test_no_text_depends_on_the_day_it_is_rendered(template: str) -> None:
    assert "26 Jul 2024" in render(template, *QUESTIONS).text


def test_tools_are_shown_to_a_template_that_takes_them() -> None:
    tools = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
    assert '"name": "add"' in render(TOOLS, *QUESTIONS, tools=tools).text
    assert '"name": "add"' not in render(QWEN, *QUESTIONS, tools=tools).text


def test_of_several_templates_the_one_for_tools_is_used_for_chats_with_tools() -> None:
    templates = {"default": QWEN, "tool_use": TOOLS}
    assert render(templates, *QUESTIONS).text == render(QWEN, *QUESTIONS).text
    assert render(templates, *QUESTIONS, tools=[{"name": "add"}]).text.startswith("Tools: ")


@pytest.mark.parametrize(
    ("template", "messages", "fact"),
    [
        (GEMMA, [{"role": "system", "content": "Be brief."}, *QUESTIONS], "System role not supported"),
        (MISTRAL, QUESTIONS[1:], "roles must alternate"),
        ("{{ nothing.at.all }}", QUESTIONS, "rejected by the chat template"),
        ("{% for", QUESTIONS, "rejected by the chat template"),
        ("{{ ''.__class__.__mro__ }}", QUESTIONS, "rejected by the chat template"),
        ("only this", QUESTIONS, "no assistant turn that the chat template renders"),
        ("x" * (MAX_TEMPLATE + 1), QUESTIONS, "256 KiB"),
    ],
)
def test_what_a_template_does_not_take_is_refused_with_its_words(
    template: str, messages: list[dict[str, Any]], fact: str
) -> None:
    with pytest.raises(DataError, match=fact):
        render(template, *messages)


def test_a_chat_that_begins_with_the_assistant_is_scored_from_its_content() -> None:
    assert scored_texts(render(QWEN, *QUESTIONS[1:]))[0].startswith("It is 4.")


def test_a_base_model_without_a_template_reads_chatml() -> None:
    template = ChatTemplate.of(chat_tokenizer(None))
    assert (template.is_own, ChatTemplate.of(chat_tokenizer(QWEN)).is_own) == (False, True)
    assert template.render(chat(*QUESTIONS[:2])).text == (
        "<|im_start|>user\n2 + 2?<|im_end|>\n<|im_start|>assistant\nIt is 4.<|im_end|>\n"
    )


def test_a_template_is_named_by_the_digest_of_its_text() -> None:
    assert ChatTemplate.of(chat_tokenizer(QWEN)).digest == hashlib.sha256(QWEN.encode()).hexdigest()
    assert ChatTemplate.of(chat_tokenizer(QWEN), CHATML).digest == hashlib.sha256(CHATML.encode()).hexdigest()


def test_a_template_of_the_adapter_takes_the_place_of_the_base_models() -> None:
    template = ChatTemplate.of(chat_tokenizer(QWEN), MISTRAL)
    assert template.render(chat(*QUESTIONS[:2])).text == "<s> [INST] 2 + 2? [/INST] It is 4.</s>"


class TestTokens:
    """What is scored of a chat, in tokens: each is one byte here, but for those that are special."""

    def test_tokens_that_reach_into_a_span_are_scored(self) -> None:
        rendered = Rendered("abcdef", ((2, 4),), 0, 4)
        assert scored_tokens(rendered, [(0, 1), (1, 3), (3, 4), (4, 6)]) == [False, True, True, False]

    def test_the_scored_tokens_spell_the_scored_text(self) -> None:
        tokenizer, rendered = chat_tokenizer(QWEN), render(QWEN, *QUESTIONS)
        (item,) = tokenized(tokenizer, [rendered], 1000)
        scored = [token for token in item.targets if token >= 0]
        assert tokenizer.decode(scored) == "".join(scored_texts(rendered))
        assert item.count == len(scored)

    def test_no_special_token_is_added_to_those_of_the_template(self) -> None:
        tokenizer = chat_tokenizer(MISTRAL)
        (item,) = tokenized(tokenizer, [render(MISTRAL, *QUESTIONS)], 1000)
        assert item.ids.count(tokenizer.bos_token_id) == 1

    def test_read_as_a_whole_everything_is_scored(self) -> None:
        (item,) = tokenized(chat_tokenizer(QWEN), [render(QWEN, *QUESTIONS)], 50, whole=True)
        assert (item.size, item.count) == (50, 49)

    def test_read_as_a_whole_it_says_which_tokens_answer(self) -> None:
        tokenizer, rendered = chat_tokenizer(QWEN), render(QWEN, *QUESTIONS)
        (item,) = tokenized(tokenizer, [rendered], 1000, whole=True)
        answered = [item.ids[place] for place in sorted(item.answers)]
        assert tokenizer.decode(answered) == "".join(scored_texts(rendered))

    @pytest.mark.parametrize("limit", [2, 3, 8, 30])
    def test_a_limit_cuts_what_is_far_from_the_first_answer(self, limit: int) -> None:
        rendered = render(QWEN, {"role": "user", "content": "x" * 200}, {"role": "assistant", "content": "y" * 200})
        (item,) = tokenized(chat_tokenizer(QWEN), [rendered], limit)
        assert (item.size, item.count >= 1) == (limit, True)

    def test_a_short_answer_keeps_as_much_of_its_prompt_as_fits(self) -> None:
        rendered = render(QWEN, {"role": "user", "content": "x" * 200}, {"role": "assistant", "content": "y"})
        tokenizer = chat_tokenizer(QWEN)
        (item,) = tokenized(tokenizer, [rendered], 40)
        assert tokenizer.decode(item.ids) == rendered.text[-40:]

    def test_of_a_long_chat_that_is_read_as_a_whole_the_text_around_its_answer_is_read(self) -> None:
        rendered = render(QWEN, {"role": "user", "content": "x" * 200}, {"role": "assistant", "content": "y" * 200})
        tokenizer = chat_tokenizer(QWEN)
        (item,) = tokenized(tokenizer, [rendered], 80, whole=True)
        text, answer = tokenizer.decode(item.ids), rendered.scored[0][0]
        assert text == rendered.text[answer - 40 : answer + 40]
        assert item.count == 79

    def test_a_tokenizer_without_offsets_scores_the_same(self, monkeypatch: pytest.MonkeyPatch) -> None:
        tokenizer, rendered = chat_tokenizer(QWEN), render(QWEN, *QUESTIONS)
        fast = tokenized(tokenizer, [rendered], 1000)
        monkeypatch.setattr(type(tokenizer), "is_fast", False)
        assert tokenized(tokenizer, [rendered], 1000) == fast
