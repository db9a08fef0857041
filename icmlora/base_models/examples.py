"""Text of a task: `samples.jsonl` and `eval.jsonl`, one JSON object a line. Never imports torch.

{"text": "..."}                              all of it counts
{"prompt": "...", "completion": "..."}       only the completion is scored
"""

from __future__ import annotations

import codecs
import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from icmlora.errors import DataError

Item = TypeVar("Item")

MAX_BYTES = 256 * 2**20
MAX_EXAMPLES = 100_000
_HINT = 'every line must be {"text": "..."} or {"prompt": "...", "completion": "..."}'
_CHAT_HINT = (
    "write a line for each answer, with the chat template of the base model applied as in training: "
    '{"prompt": "<all before the answer>", "completion": "<the answer>"}'
)


@dataclass(frozen=True)
class Example:
    """One piece of text of a task; `prompt` is empty for plain text."""

    prompt: str
    completion: str

    @property
    def text(self) -> str:
        """Prompt and completion as one text."""
        return self.prompt + self.completion


def plain(texts: Iterable[str]) -> tuple[Example, ...]:
    """Return texts as examples without a prompt: all of each counts."""
    return tuple(Example("", text) for text in texts)


class ReadExamples(Protocol):
    """Reads the bytes of a file of examples, one a line."""

    def __call__(self, data: bytes, *, path: str | Path | None = None) -> tuple[Any, ...]:
        """Read them."""
        ...


@dataclass(frozen=True)
class EvaluationData:
    """Held-out examples of a task."""

    examples: tuple[Any, ...]  # in the order of the file
    digest: str  # SHA-256 of the file's bytes, which names the data in stored results

    @classmethod
    def parse(cls, data: bytes, *, path: str | Path | None = None, read: ReadExamples | None = None) -> EvaluationData:
        """Parse the bytes of an `eval.jsonl`."""
        return cls((read or parse_examples)(data, path=path), hashlib.sha256(data).hexdigest())


def spread(items: Sequence[Item], most: int) -> list[Item]:
    """Choose at most so many items, spread evenly: of a sorted file that is a fair choice."""
    count = min(most, len(items))
    return [items[position * len(items) // count] for position in range(count)]


def parse_examples(data: bytes, *, path: str | Path | None = None) -> tuple[Example, ...]:
    """Parse JSON lines of text; blank lines are skipped."""
    if len(data) > MAX_BYTES:
        raise DataError(f"more than {MAX_BYTES} bytes of text", path=path, hint="keep a sample of the task's text")
    examples = []
    for number, line in enumerate(data.removeprefix(codecs.BOM_UTF8).split(b"\n"), start=1):
        if not line.strip():
            continue
        examples.append(_example(line, number, path))
        if len(examples) > MAX_EXAMPLES:
            raise DataError(f"more than {MAX_EXAMPLES} examples", path=path, hint="keep a sample of the task's text")
    if not examples:
        raise DataError("the file holds no example", path=path, hint=_HINT)
    return tuple(examples)


def _example(line: bytes, number: int, path: str | Path | None) -> Example:
    try:
        value = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        hint = "save the file as UTF-8, one JSON object a line"
        raise DataError(f"line {number} is not UTF-8: {error.reason}", path=path, hint=hint) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"line {number} is not JSON: {error}", path=path, hint=_HINT) from error
    match value:
        case {"text": str(text)}:
            example = Example("", text)
        case {"prompt": str(prompt), "completion": str(completion)}:
            example = Example(prompt, completion)
        case {"messages": _} | {"conversations": _}:
            fact = f"line {number} is a chat: how the model would see it depends on a template that is not known here"
            raise DataError(fact, path=path, hint=_CHAT_HINT)
        case _:
            raise DataError(f"line {number} has no text", path=path, hint=_HINT)
    if not example.completion.strip():
        raise DataError(f"line {number} is empty text", path=path, hint=_HINT)
    try:
        example.text.encode("utf-8")  # as fast as a copy; a loop over the letters was half of an ingest's time
    except UnicodeEncodeError:
        fact = f"line {number} holds half a surrogate pair, which is not text"
        raise DataError(fact, path=path, hint=_HINT) from None
    return example
