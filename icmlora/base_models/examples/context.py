"""The context of a task: samples prepended to a request for in-context learning (arXiv 2005.14165).

    context.txt    prepended to a plain-text prompt
    context.json   {"messages": [...]}, prepended to the messages of a chat

Both files are next to the adapter. With only the text, a chat gets it as a system message. Never imports torch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from icmlora.base_models.examples.chats import Chat, Message, message_of
from icmlora.base_models.examples.examples import Example
from icmlora.errors import DataError, located
from icmlora.formats.peft.peft import CONTEXT_MESSAGES_NAME, CONTEXT_TEXT_NAME

MAX_BYTES = 4 * 2**20
SEPARATOR = "\n\n"
_SYSTEM = ("system", "developer")


@dataclass(frozen=True)
class TaskContext:
    """Samples prepended to a request.

    Attributes:
        text: Prepended to plain text; includes the trailing separator. Empty: none.
        messages: Prepended to a chat's messages, with any system message first. Empty: `text` is the system message.
    """

    text: str
    messages: tuple[Message, ...] = ()

    @classmethod
    def of(cls, samples: Sequence[Example | Chat]) -> TaskContext:
        """Build a context from samples, in order; chats yield no text, because the template writes it later."""
        if any(isinstance(sample, Chat) for sample in samples):
            return cls("", _one_chat([sample for sample in samples if isinstance(sample, Chat)]))
        pairs = [sample for sample in samples if isinstance(sample, Example)]
        messages: list[Message] = []
        for pair in pairs if all(pair.prompt.strip() for pair in pairs) else ():
            messages.append({"role": "user", "content": pair.prompt.strip()})
            messages.append({"role": "assistant", "content": pair.completion.strip()})
        return cls("".join(pair.text.strip("\n") + SEPARATOR for pair in pairs), tuple(messages))

    @classmethod
    def read(cls, files: Mapping[str, bytes]) -> TaskContext | None:
        """Read the context from the files next to an adapter; return None if there is none.

        Raises:
            DataError: The files are not a valid context.
        """
        data, chat = files.get(CONTEXT_TEXT_NAME), files.get(CONTEXT_MESSAGES_NAME)
        text, messages = "", tuple[Message, ...]()
        if data is not None:
            with located(CONTEXT_TEXT_NAME):
                text = _decoded(data)
        if chat is not None:
            with located(CONTEXT_MESSAGES_NAME):
                messages = _messages(_decoded(chat))
        return cls(text, messages) if text or messages else None

    @property
    def files(self) -> dict[str, bytes]:
        """The files for `read`, name -> content."""
        found = {CONTEXT_TEXT_NAME: self.text.encode()} if self.text else {}
        if self.messages:
            body = json.dumps({"messages": list(self.messages)}, ensure_ascii=False, indent=1)
            found[CONTEXT_MESSAGES_NAME] = body.encode() + b"\n"
        return found

    @property
    def digest(self) -> str:
        """SHA-256 of its files."""
        return hashlib.sha256(b"\0".join(self.files.values())).hexdigest()

    def before(self, example: Example | Chat) -> Example | Chat:
        """Prepend the context to an example of the task; raise `DataError` if the example is not text."""
        match example:
            case Example():
                return replace(example, context=self.text)
            case Chat():
                messages, is_led = self.before_messages(example.messages), _is_led(example.messages)
                added = len(messages) - len(example.messages)
                scored = tuple(place + added for place in example.scored)
                plain = None if example.plain is None else (*example.plain[:2], self.text)
                place = added + is_led
                return replace(example, messages=tuple(messages), scored=scored, plain=plain, context=place)
        raise DataError("a context must be text")

    def before_messages(self, messages: Sequence[Message]) -> list[Message]:
        """Prepend the context to a chat's messages, but after the chat's own system message.

        That message replaces the context's system message. A text-only context is prepended to its content.
        """
        asked, is_led = list(messages), _is_led(messages)
        if self.messages:
            turns = list(self.messages[1:] if is_led and self.messages[0]["role"] in _SYSTEM else self.messages)
            return [*asked[:is_led], *turns, *asked[is_led:]]
        if not is_led:
            return [{"role": "system", "content": self.text.rstrip()}, *asked]
        return [{**asked[0], "content": _joined(self.text, asked[0].get("content"))}, *asked[1:]]


def _is_led(messages: Sequence[Message]) -> bool:
    """Return whether the first message is a system message."""
    return bool(messages) and messages[0].get("role") in _SYSTEM


def _one_chat(chats: Sequence[Chat]) -> tuple[Message, ...]:
    """Concatenate chats; keep the system message only if all of them share it."""
    systems = [chat.messages[0] if chat.messages[0]["role"] in _SYSTEM else None for chat in chats]
    turns = [
        message
        for chat, system in zip(chats, systems, strict=True)
        for message in chat.messages[0 if system is None else 1 :]
    ]
    first = systems[0]
    return (first, *turns) if first is not None and all(system == first for system in systems) else tuple(turns)


def _joined(text: str, content: object) -> object:
    """Prepend the text to a system message's content, which may be a list of parts."""
    if isinstance(content, list):
        return [{"type": "text", "text": text}, *content]
    return f"{text.rstrip()}{SEPARATOR}{content or ''}".rstrip()


def _decoded(data: bytes) -> str:
    if len(data) > MAX_BYTES:
        raise DataError(f"has more than {MAX_BYTES >> 20} MiB")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"is not UTF-8: {error.reason}") from None


def _messages(text: str) -> tuple[Message, ...]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        raise DataError("is not JSON") from None
    match value:
        case {"messages": [_, *_] as turns}:
            return tuple(message_of(turn) for turn in turns)
    raise DataError('has no "messages"')
