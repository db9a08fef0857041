"""Examples and prompts of a task as a base model reads them. Never imports torch."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from icmlora.base_models.examples.chat_template import Rendered, Templates
from icmlora.base_models.examples.context import TaskContext
from icmlora.base_models.examples.examples import Examples, nothing_usable, parse_examples, spread
from icmlora.base_models.examples.media import MEDIA_KEYS, Media
from icmlora.base_models.examples.prompts import Prompt
from icmlora.base_models.modality import BaseModel
from icmlora.errors import DataError, located
from icmlora.io.text import with_article


@dataclass(frozen=True)
class EvaluationData:
    """Held-out examples of a task."""

    examples: tuple[Any, ...]  # as the base model reads them, in file order
    digest: str  # SHA-256 of the file's bytes (and the context's digest); identifies the data in stored results
    template: str | None = None  # digest of the chat template, if chats were rendered
    skipped: str | None = None  # number of skipped rows and the reason, in words
    note: str | None = None  # note for the user about how the examples are read

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
        """Parse the bytes of an `eval.jsonl`; chats are rendered only if the base model is given."""
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
    """Return the usable rows of a file, as a base model reads them.

    At most `most` are returned, spread evenly over the file. `template` is the adapter's own chat template, `context`
    is prepended to each example, and `path` is for messages.

    Raises:
        DataError: No row is usable, or the file exceeds a limit.
    """
    found = unread_examples(base, data, path=path)
    with located(path):
        if context is not None:
            found = replace(found, items=tuple(map(context.before, found.items)))
        # Rendering a chat takes longer than parsing it, and most callers need only a few.
        chosen = found.items if most is None else spread(found.items, most)
        readable = base.modality.readable(base, chosen, template)
        if readable.skipped and len(chosen) < len(found):
            readable = base.modality.readable(base, found.items, template)
        if not readable.items:
            raise nothing_usable(readable)
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
    """Return the usable rows of a file as examples for a base model, with chats not rendered yet."""

    def example(row: Mapping[str, Any]) -> Any:
        for key in set(MEDIA_KEYS).difference(base.modality.reads):
            if isinstance(row.get(key), Media | Mapping):
                what = "an image" if key == "image" else "a recording"
                raise DataError(f"has {what}, which icm does not support for {with_article(base.modality.name)}")
        return base.modality.example(row)

    return parse_examples(data, example, path=path)


def given_prompts(
    base: BaseModel, asked: Sequence[Prompt | Mapping[str, Any]], template: Templates | None = None
) -> list[Prompt]:
    """Render the chats that `read_prompts` returned for a base model; raise `DataError` if one is rejected."""
    chats = [base.modality.example(row) for row in asked if not isinstance(row, Prompt)]
    read = base.modality.readable(base, chats, template)
    if read.skipped:
        raise DataError(f"not every prompt can be read: {read.reason}")
    rendered, prompts = iter(read), list[Prompt]()
    for row in asked:
        if isinstance(row, Prompt):
            prompts.append(row)
        elif isinstance(example := next(rendered), Rendered):  # up to the placeholder answer from `read_prompts`
            prompts.append(Prompt(example.text[: example.scored[-1][0]], is_rendered=True))
        else:
            prompts.append(Prompt(example.prompt))
    return prompts
