"""Prompts for a language model, from a task's own examples or from a file. Never imports torch.

{"text": "..."}                            its beginning; the rest is the expected continuation
{"prompt": "...", "completion": "..."}     the prompt; the completion is optional in the user's file
a chat                                     everything before the assistant's first turn
any other line of a file                   the line itself
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
_BEGINNING = 80  # characters of a plain text used as the prompt, up to the end of the word
_WORD = 20  # characters within which a word must end, because not every language writes spaces
_SHOWN = 400  # characters of the expected continuation


@dataclass(frozen=True)
class Prompt:
    """Text for a model to continue."""

    text: str  # the prompt as the model reads it
    expected: str = ""  # the continuation in the source text; empty if unknown
    is_rendered: bool = False  # whether it comes from a chat template and so already contains the special tokens


def prompts_of(examples: Sequence[Any], most: int) -> list[Prompt]:
    """Return prompts from at most `most` examples, evenly spaced; examples without text yield none."""
    found: list[Prompt] = []
    for example in spread(examples, most):
        match example:  # an image or a recording has no prompt
            case Rendered():
                first, end = example.scored[0]
                shown = example.text[first : min(end, first + _SHOWN)]
                found.append(Prompt(example.text[:first], shown, is_rendered=True))
            case Example(prompt="", completion=text):
                # Cut near the 80th character or the middle, at the end of a word if possible.
                wanted = min(_BEGINNING, len(text) // 2)
                near = text[wanted : wanted + _WORD]
                place = wanted + next((at for at, letter in enumerate(near) if letter.isspace()), 0)
                found.append(Prompt(text[:place], text[place : place + _SHOWN]))
            case Example():
                found.append(Prompt(example.prompt, example.completion[:_SHOWN]))
    return [prompt for prompt in found if prompt.text]


def read_prompts(data: bytes, path: str | Path) -> list[Prompt | Mapping[str, Any]]:
    """Read a file of prompts: rows, or one prompt per line.

    Returns:
        Prompts, and chats as rows, which become prompts once a chat template is available.

    Raises:
        DataError: A row is not a prompt, or there are no prompts or more than `MAX_PROMPTS`.
    """
    with located(path):
        found: list[Prompt | Mapping[str, Any]]
        if data.lstrip()[:1] in (b"{", b"["):
            rows = read_rows(data)
            found = [_asked(row, f"{rows.unit} {number}") for number, row in rows.values]
        else:
            try:
                # Not `str.splitlines`, which also splits at form feeds and Unicode line separators.
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
    """Read a row of a prompt file; end a chat with a placeholder answer, because templates must render its position."""
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
