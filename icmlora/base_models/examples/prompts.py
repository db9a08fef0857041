"""Prompts that a language model continues, of a task's own examples or from a file. Never imports torch.

{"text": "..."}                            the beginning of it, and what really follows
{"prompt": "...", "completion": "..."}     the prompt; of a file from the user, the completion may be missing
a chat                                     everything before the assistant's first turn
any other line of a file                   a prompt as it is
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

from icmlora.base_models.examples.chat_template import Rendered
from icmlora.base_models.examples.chats import chat_of
from icmlora.base_models.examples.examples import Example, spread
from icmlora.base_models.examples.rows import BadRow, read_rows
from icmlora.errors import DataError, located

MAX_PROMPTS = 100
_BEGINNING = 80  # characters of a plain text that a model is given, up to the end of the word
_WORD = 20  # characters within which a word has to end: not every language writes spaces
_SHOWN = 400  # characters of what really follows


@dataclass(frozen=True)
class Prompt:
    """What a model is given to continue.

    Attributes:
        text: As the model reads it.
        expected: What follows in the text that it was taken from; empty where nothing is known.
        is_rendered: Whether a chat template made it, so that its special tokens are spelled out in it.
    """

    text: str
    expected: str = ""
    is_rendered: bool = False


def prompts_of(examples: Sequence[Any], most: int) -> list[Prompt]:
    """Return the prompts of some examples of a task, spread evenly; those without text have none."""
    found = [prompt for prompt in map(_prompt_of, spread(examples, most)) if prompt is not None]
    return [prompt for prompt in found if prompt.text]


def read_prompts(data: bytes, path: str | Path) -> list[Prompt | Mapping[str, Any]]:
    """Read a file of prompts: rows, or one prompt a line.

    Returns:
        Prompts, and the rows of chats, which become prompts once there is a chat template.

    Raises:
        DataError: A row is no prompt, there is none, or there are more than `MAX_PROMPTS`.
    """
    with located(path):
        found: list[Prompt | Mapping[str, Any]]
        if data.lstrip()[:1] in (b"{", b"["):
            rows = read_rows(data)
            found = [_asked(row, f"{rows.unit} {number}") for number, row in rows.values]
        else:
            try:
                # Not `str.splitlines`, for which form feeds and Unicode's line separators end a line too.
                lines = list(StringIO(data.decode("utf-8-sig"), newline=None))
            except UnicodeDecodeError as error:
                raise DataError(f"is not UTF-8: {error.reason}") from None
            found = [Prompt(line.removesuffix("\n")) for line in lines if line.strip()]
        if not found:
            raise DataError("contains no prompt", hint='write one prompt per line, as text or {"prompt": "..."}')
        if len(found) > MAX_PROMPTS:
            raise DataError(f"holds {len(found)} prompts, more than {MAX_PROMPTS}", hint="choose fewer prompts")
    return found


def _asked(row: Any, where: str) -> Prompt | Mapping[str, Any]:
    """Read a row of a file of prompts; a chat that waits for an answer gets one, so that templates show its place."""
    if isinstance(row, BadRow):
        raise DataError(f"{where} {row.reason}")
    match row:
        case {"prompt": str(text), "completion": str(expected)} if text.strip():
            return Prompt(text, expected[:_SHOWN])
        case {"prompt": str(text)} | {"text": str(text)} if text.strip():
            return Prompt(text)
        case {"messages": [_, *_] as turns} | {"prompt": [_, *_] as turns}:
            is_answered = isinstance(turns[-1], dict) and turns[-1].get("role") == "assistant"
            asked = [*turns[: len(turns) - is_answered], {"role": "assistant", "content": "..."}]
            try:
                chat_of(row | {"messages": asked})
            except DataError as error:
                raise DataError(f"{where} {error.message}") from None
            return {**row, "messages": asked}
    raise DataError(f'{where} has no "prompt", "text" or "messages"')


def _prompt_of(example: Any) -> Prompt | None:
    match example:
        case Rendered():
            first, end = example.scored[0]
            return Prompt(example.text[:first], example.text[first : min(end, first + _SHOWN)], is_rendered=True)
        case Example(prompt="", completion=text):
            place = _beginning(text)
            return Prompt(text[:place], text[place : place + _SHOWN])
        case Example():
            return Prompt(example.prompt, example.completion[:_SHOWN])
    return None  # an image, a recording


def _beginning(text: str) -> int:
    """Return where to cut a text: near its 80th character or its middle, at the end of a word if one is near."""
    wanted = min(_BEGINNING, len(text) // 2)
    near = text[wanted : wanted + _WORD]
    return wanted + next((place for place, letter in enumerate(near) if letter.isspace()), 0)
