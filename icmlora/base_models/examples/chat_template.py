"""Render chats with a base model's chat template, and locate the text that the adapter was trained to write.

    Chat --template--> "<user> 2 + 2? <end> <assistant> 4 <end>"
                                                        `scored'

The scored text is located as trainers do it. Some templates mark it with `{% generation %}`. For the others, a turn is
the difference between the chat rendered up to this turn and the chat before it with its generation prompt.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from icmlora.base_models.examples.chats import Chat
from icmlora.errors import DataError

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{{ message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""Trainers' default for base models without a template."""
MAX_TEMPLATE = 2**18
_MAX_TEXT = 2**24
Templates = str | Mapping[str, str]
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
# Some templates write today's date into the text, but the same samples must yield the same vectors every day.
_DATE = "26 Jul 2024"
_FIXED_DATE = "{%- macro strftime_now(format) -%}" + _DATE + "{%- endmacro -%}"


@dataclass(frozen=True)
class Rendered:
    """A chat as the model reads it."""

    text: str  # all of it, with its special tokens spelled out
    scored: tuple[tuple[int, int], ...]  # character spans of the text that count towards the loss, as (start, end)
    start: int  # start of the first message's content
    stop: int  # end of the last scored turn's content
    context: int = 0  # number of leading characters that precede the chat itself


class ChatTemplate:
    """A chat template and the special tokens that it may use.

    Args:
        templates: Its text, or several by name: transformers uses "default", and "tool_use" for chats with tools.
            None, or a missing "default", means ChatML.
        special_tokens: Special tokens by name, such as "bos_token".
    """

    def __init__(self, templates: Templates | None, special_tokens: Mapping[str, Any]) -> None:
        found = templates if isinstance(templates, Mapping) else {"default": templates}
        self.is_own = isinstance(found.get("default"), str)
        self.templates: Mapping[str, Any] = found if self.is_own else {"default": CHATML}
        self.special_tokens = special_tokens

    @classmethod
    def of(cls, tokenizer: Any, templates: Templates | None = None) -> ChatTemplate:
        """Return a tokenizer's template, or `templates` with the tokenizer's special tokens."""
        own = getattr(tokenizer, "chat_template", None) if templates is None else templates
        return cls(own, tokenizer.special_tokens_map)

    @property
    def digest(self) -> str:
        """SHA-256 of the template's text."""
        return hashlib.sha256(str(self.templates["default"]).encode("utf-8", "surrogatepass")).hexdigest()

    def render_all(self, chats: Iterable[Chat]) -> list[Rendered | DataError]:
        """Render chats; return the error in place of a chat that cannot be rendered."""
        found: list[Rendered | DataError] = []
        for chat in chats:
            try:
                found.append(self.render(chat))
            except DataError as error:
                found.append(error)
        return found

    def render(self, chat: Chat) -> Rendered:
        """Render a chat; raise `DataError` if the template rejects it or leaves nothing to score."""
        template = str(self.templates["tool_use" if chat.tools and "tool_use" in self.templates else "default"])
        if len(template) > MAX_TEMPLATE:
            raise DataError(f"needs a chat template of more than {MAX_TEMPLATE >> 10} KiB")
        if "strftime_now" in template:
            template = _FIXED_DATE + template
        text = self._text(template, chat)
        scored: list[tuple[int, int]] = []
        answers = tuple(number for number, message in enumerate(chat.messages) if message["role"] == "assistant")
        if answers == chat.scored and _GENERATION.search(template):
            marks = self._applied(template, chat, return_assistant_tokens_mask=True, add_generation_prompt=False)[1]
            scored = [(start, end) for start, end in marks if start < end]
        for number in () if scored else chat.scored:
            least = scored[-1][1] if scored else 0
            span = self._difference(template, chat, text, number)
            if span is None:  # search for the content
                content = chat.messages[number]["content"].strip()
                place = text.find(content, least) if content else -1
                span = (place, place + len(content))
            if least <= span[0] < span[1]:
                scored.append(span)
        if not scored:
            raise DataError("has no assistant turn that the chat template renders")
        start = max(0, text.find(chat.messages[0]["content"].strip()))
        content = chat.messages[chat.scored[-1]]["content"].strip()
        found = text.rfind(content, *scored[-1]) if content else -1
        stop = scored[-1][1] if found < 0 else found + len(content)
        context = _shared(self._text(template, chat, chat.context), text) if chat.context else 0
        return Rendered(text, tuple(scored), start, stop, context)

    def _text(self, template: str, chat: Chat, upto: int | None = None, *, prompt: bool = False) -> str:
        return self._applied(template, chat, upto, add_generation_prompt=prompt)[0]

    def _applied(
        self, template: str, chat: Chat, upto: int | None = None, **options: bool
    ) -> tuple[str, list[tuple[int, int]]]:
        """Return the text, and the spans that the template marks as generated if the options request them."""
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            rendered: Any = render_jinja_template(
                conversations=[list(chat.messages[:upto])],
                tools=list(chat.tools) or None,
                chat_template=template,
                **{**self.special_tokens, "date_string": _DATE, **options},
            )
        except MemoryError:
            raise DataError("needs too much memory for its chat template") from None
        except Exception as error:  # a template is a program and may raise anything
            raise DataError(f"was rejected by the chat template: {str(error)[:200]}") from error
        (text,), marks = rendered
        if len(text) > _MAX_TEXT:
            raise DataError(f"renders to more than {_MAX_TEXT >> 20} MiB of text")
        return str(text), marks[0] if marks else []

    def _difference(self, template: str, chat: Chat, text: str, number: int) -> tuple[int, int] | None:
        """Return a turn's span in the text; None if the template does not write chats from left to right."""
        if number == 0:
            return None
        try:
            before = self._text(template, chat, number, prompt=True)
            last = number == len(chat.messages) - 1
            after = text if last else self._text(template, chat, number + 1)
            start = _shared(before, text)
            if start < len(before):
                # A generation prompt may open a block that the turn itself lacks, such as an empty thinking block.
                earlier = self._text(template, chat, number)
                start = max(start, len(earlier)) if text.startswith(earlier) else len(text)
        except DataError:  # some templates accept only certain last turns
            return None
        return (start, len(after)) if text.startswith(after) and start < len(after) else None


def _shared(first: str, second: str) -> int:
    """Return the length of the common prefix of two texts."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((place for place, (one, other) in pairs if one != other), min(len(first), len(second)))


def scored_tokens(rendered: Rendered, offsets: Sequence[tuple[int, int]]) -> list[bool]:
    """Return a mask of the scored tokens: tokens whose offsets overlap a scored span."""
    marks, spans, current = [], rendered.scored, 0
    for start, end in offsets:
        while current < len(spans) and start >= spans[current][1]:
            current += 1
        marks.append(current < len(spans) and end > spans[current][0])
    return marks
