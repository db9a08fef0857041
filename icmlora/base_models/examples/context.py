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
    """Samples prepended to a request."""

    text: str  # Prepended to plain text; includes the trailing separator. Empty: none.
    # Prepended to a chat's messages, with any system message first. Empty: `text` is the system message.
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
        found = {}
        for name in (CONTEXT_TEXT_NAME, CONTEXT_MESSAGES_NAME):
            data = files.get(name, b"")
            with located(name):
                if len(data) > MAX_BYTES:
                    raise DataError(f"has more than {MAX_BYTES >> 20} MiB")
                try:
                    found[name] = data.decode("utf-8")
                except UnicodeDecodeError as error:
                    raise DataError(f"is not UTF-8: {error.reason}") from None
        text, messages = found[CONTEXT_TEXT_NAME], tuple[Message, ...]()
        if CONTEXT_MESSAGES_NAME in files:
            with located(CONTEXT_MESSAGES_NAME):
                try:
                    value = json.loads(found[CONTEXT_MESSAGES_NAME])
                except (ValueError, RecursionError):
                    raise DataError("is not JSON") from None
                match value:
                    case {"messages": [_, *_] as turns}:
                        messages = tuple(message_of(turn) for turn in turns)
                    case _:
                        raise DataError('has no "messages"')
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
        content: object = asked[0].get("content")  # may be a list of parts
        if isinstance(content, list):
            content = [{"type": "text", "text": self.text}, *content]
        else:
            content = f"{self.text.rstrip()}{SEPARATOR}{content or ''}".rstrip()
        return [{**asked[0], "content": content}, *asked[1:]]


def _is_led(messages: Sequence[Message]) -> bool:
    return bool(messages) and messages[0].get("role") in _SYSTEM


def _one_chat(chats: Sequence[Chat]) -> tuple[Message, ...]:
    """Concatenate chats; keep the system message only if all of them share it."""
    systems = [chat.messages[:1] if _is_led(chat.messages) else () for chat in chats]
    turns = [turn for chat, system in zip(chats, systems, strict=True) for turn in chat.messages[len(system) :]]
    return (*systems[0], *turns) if all(system == systems[0] for system in systems) else tuple(turns)
