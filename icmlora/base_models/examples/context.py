"""The context of a task: samples that stand before a request, as in-context learning does (arXiv 2005.14165).

    context.txt    before a prompt that is plain text
    context.json   {"messages": [...]}, before the messages of a chat

Both lie next to the adapter. Where there is only the text, a chat gets it as a system message. Never imports torch.
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
    """What stands before a request.

    Attributes:
        text: Before plain text; it ends with what separates it from that. Empty: nothing does.
        messages: Before the messages of a chat, a system message first if there is one. Empty: `text` is one.
    """

    text: str
    messages: tuple[Message, ...] = ()

    @classmethod
    def of(cls, samples: Sequence[Example | Chat]) -> TaskContext:
        """Make the context of some samples, in their order; of chats there is no text yet, for a template writes it."""
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
        """Read the context from the files next to an adapter; None if it has none.

        Raises:
            DataError: The files cannot be read as a context.
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
        """The files that `read` reads, name -> content."""
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
        """Put it before an example of the task; raise `DataError` if that is not text."""
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
        """Put it before the messages of a chat, behind a system message that they begin with.

        Such a message takes the place of the context's own; of a context that is only text it takes that in.
        """
        asked, is_led = list(messages), _is_led(messages)
        if self.messages:
            turns = list(self.messages[1:] if is_led and self.messages[0]["role"] in _SYSTEM else self.messages)
            return [*asked[:is_led], *turns, *asked[is_led:]]
        if not is_led:
            return [{"role": "system", "content": self.text.rstrip()}, *asked]
        return [{**asked[0], "content": _joined(self.text, asked[0].get("content"))}, *asked[1:]]


def _is_led(messages: Sequence[Message]) -> bool:
    """Say whether messages begin with one of the system."""
    return bool(messages) and messages[0].get("role") in _SYSTEM


def _one_chat(chats: Sequence[Chat]) -> tuple[Message, ...]:
    """Put chats one after the other; a system message stays only if it is that of all of them."""
    systems = [chat.messages[0] if chat.messages[0]["role"] in _SYSTEM else None for chat in chats]
    turns = [
        message
        for chat, system in zip(chats, systems, strict=True)
        for message in chat.messages[0 if system is None else 1 :]
    ]
    first = systems[0]
    return (first, *turns) if first is not None and all(system == first for system in systems) else tuple(turns)


def _joined(text: str, content: object) -> object:
    """Put the text before the content of a system message, which may come in parts."""
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
