"""Examples and prompts of a task as a base model reads them. Never imports torch."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from icmlora.base_models.examples.chat_template import Rendered, Templates
from icmlora.base_models.examples.context import TaskContext
from icmlora.base_models.examples.examples import Example, Examples, nothing_usable, parse_examples, spread
from icmlora.base_models.examples.media import MEDIA_KEYS, Media
from icmlora.base_models.examples.prompts import Prompt
from icmlora.base_models.modality import BaseModel
from icmlora.errors import DataError, located
from icmlora.io.text import with_article


@dataclass(frozen=True)
class EvaluationData:
    """Held-out examples of a task."""

    examples: tuple[Any, ...]  # as the base model reads them, in the order of the file
    digest: str  # SHA-256 of the file's bytes, which names the data in stored results
    template: str | None = None  # digest of the chat template, if chats were rendered
    skipped: str | None = None  # how many rows were left out and why, in words
    note: str | None = None  # what a user should know of how they are read

    @classmethod
    def parse(
        cls,
        data: bytes,
        *,
        base: BaseModel | None = None,
        path: str | Path | None = None,
        template: Templates | None = None,
        context: TaskContext | None = None,
    ) -> EvaluationData:
        """Parse the bytes of an `eval.jsonl`; without the base model, chats are not rendered."""
        if base is None:
            found = parse_examples(data, path=path)
        else:
            found = examples_for(base, data, path=path, template=template, context=context)
        digest = hashlib.sha256(data if context is None else data + context.digest.encode()).hexdigest()
        return cls(found.items, digest, found.template, found.summary, found.note)


def examples_for(
    base: BaseModel,
    data: bytes,
    *,
    path: str | Path | None = None,
    most: int | None = None,
    template: Templates | None = None,
    context: TaskContext | None = None,
) -> Examples:
    """Read a file for a base model: its usable rows, as that model reads them.

    At most `most` are returned, spread evenly over the file. `template` is the chat template that came with the
    adapter, `context` stands before each example, and `path` is for the messages.

    Raises:
        DataError: No row can be used, or the file breaks a limit.
    """
    found = unread_examples(base, data, path=path)
    with located(path):
        if context is not None:
            found = replace(found, items=tuple(map(context.before, found.items)))
        # Rendering a chat takes longer than parsing it, and most callers need a few.
        chosen = found.items if most is None else spread(found.items, most)
        readable = base.modality.readable(base, chosen, template)
        if readable.skipped and len(chosen) < len(found):
            readable = base.modality.readable(base, found.items, template)
        if not readable.items:
            raise nothing_usable(readable.skipped, readable.reason)
    items = readable.items if most is None else tuple(spread(readable.items, most))
    return Examples(
        items,
        found.skipped + readable.skipped,
        found.reason or readable.reason,
        readable.template,
        readable.note,
        rows=len(found) + found.skipped,
    )


def unread_examples(base: BaseModel, data: bytes, *, path: str | Path | None = None) -> Examples:
    """Return the usable rows of a file as examples of a base model's kind: chats are not rendered yet."""
    return parse_examples(data, partial(_example_for, base), path=path)


def given_prompts(
    base: BaseModel, asked: Sequence[Prompt | Mapping[str, Any]], template: Templates | None = None
) -> list[Prompt]:
    """Return what `read_prompts` returned as this base model reads it; raise `DataError` if it refuses a chat."""
    chats = [base.modality.example(row) for row in asked if not isinstance(row, Prompt)]
    read = base.modality.readable(base, chats, template)
    if read.skipped:
        raise DataError(f"not every prompt can be read: {read.reason}")
    rendered = iter(read)
    return [row if isinstance(row, Prompt) else _open(next(rendered)) for row in asked]


def _example_for(base: BaseModel, row: Mapping[str, Any]) -> Any:
    """Turn a row into an example of a base model, which has to see all of it: the file of a row is most of what it is.

    Raises:
        DataError: It is not one, or names an image or a recording that the base model would not be given.
    """
    for key in set(MEDIA_KEYS).difference(base.modality.reads):
        if isinstance(row.get(key), Media | Mapping):
            what = "an image" if key == "image" else "a recording"
            raise DataError(f"has {what}, which icm does not support for {with_article(base.modality.name)}")
    return base.modality.example(row)


def _open(example: Example | Rendered) -> Prompt:
    """Return a chat up to its last answer, which `read_prompts` added."""
    if isinstance(example, Rendered):
        return Prompt(example.text[: example.scored[-1][0]], is_rendered=True)
    return Prompt(example.prompt)
