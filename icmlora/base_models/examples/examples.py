"""Examples of a task: `samples.jsonl` and `eval.jsonl`, also as JSON or Parquet. Never imports torch.

    bytes --rows.py--> rows --example of the modality--> examples --readable of the modality--> what the model reads

Empty, malformed or unsupported rows are skipped and counted. For a language model, a row is one of

    {"text": "..."}                              all of it is scored
    {"prompt": "...", "completion": "..."}       only the completion is scored
    a chat; see `chats.py`                       only the assistant's turns are scored
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from icmlora.base_models.examples.chats import Chat, chat_of
from icmlora.base_models.examples.media import Resolver, with_media
from icmlora.base_models.examples.media_archive import is_archive, open_archive
from icmlora.base_models.examples.rows import BadRow, read_rows
from icmlora.errors import DataError, located

Item = TypeVar("Item")

MAX_BYTES = 256 * 2**20
MAX_EXAMPLES = 100_000
_HINT = (
    'a row is {"text": "..."}, {"prompt": "...", "completion": "..."}, {"messages": [...]}, {"conversations": [...]} '
    'or {"instruction": "...", "output": "..."}'
)


@dataclass(frozen=True)
class Example:
    """One piece of text of a task."""

    prompt: str  # text that is read but not scored; empty for plain text
    completion: str  # text that is scored
    context: str = ""  # text before both, not counted towards the token limit; see `context.py`

    @property
    def text(self) -> str:
        return self.prompt + self.completion


def plain(texts: Iterable[str]) -> tuple[Example, ...]:
    """Return texts as examples without a prompt; all of each is scored."""
    return tuple(Example("", text) for text in texts)


@dataclass(frozen=True)
class Examples(Sequence[Any]):
    """The usable examples of a file, as a sequence."""

    items: tuple[Any, ...]  # the examples, in file order
    skipped: int = 0  # number of skipped rows
    reason: str | None = None  # why the first row was skipped: "line 3 is not JSON: ..."
    template: str | None = None  # digest of the chat template used for rendering; None if there were no chats to render
    note: str | None = None  # note for the user about how the examples are read, or None
    rows: int | None = None  # number of rows in the file, if only some of its examples were chosen

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, place: Any) -> Any:
        return self.items[place]

    @property
    def summary(self) -> str | None:
        """Number of skipped rows and the first reason; None if all rows are used."""
        if not self.skipped:
            return None
        rows = self.rows or len(self.items) + self.skipped
        return f"skipped {self.skipped:,} of {rows:,} rows; the first: {self.reason}"


def spread(items: Sequence[Item], most: int) -> list[Item]:
    """Choose at most `most` items, evenly spaced, which is fair even for a sorted file."""
    count = min(most, len(items))
    return [items[position * len(items) // count] for position in range(count)]


def parse_examples(
    data: bytes,
    example: Callable[[Mapping[str, Any]], Any] | None = None,
    *,
    path: str | Path | None = None,
) -> Examples:
    """Read the usable rows of a file, by default as text; raise `DataError` if there are none or too many."""
    (found,) = parse_for([example or text_example], data, path=path)
    if not found.items:
        with located(path):
            raise nothing_usable(found)
    return found


def parse_for(
    readers: Sequence[Callable[[Mapping[str, Any]], Any]], data: bytes, *, path: str | Path | None = None
) -> list[Examples]:
    """Read a file once; return the rows that each reader can use. Raise `DataError` if the file exceeds a limit."""
    if len(data) > MAX_BYTES:
        raise DataError(f"more than {MAX_BYTES} bytes of text", path=path, hint="keep a sample of the task's text")
    kept, reasons, count = [list[Any]() for _ in readers], dict[int, str](), 0
    media: Resolver | None = None
    with located(path):
        if is_archive(data):
            data, media = open_archive(data)
        rows = read_rows(data)
        for number, row in rows.values:
            count += 1
            if count > MAX_EXAMPLES:
                raise DataError(f"more than {MAX_EXAMPLES} examples", hint="keep a sample of the task's text")
            for place, read in enumerate(readers):
                try:
                    if isinstance(row, BadRow):
                        raise DataError(row.reason)
                    if not isinstance(row, dict):
                        raise DataError("is not a JSON object")
                    kept[place].append(read(with_media(row, media)))
                except DataError as error:
                    reasons.setdefault(place, f"{rows.unit} {number} {error.message}")
    return [Examples(tuple(items), count - len(items), reasons.get(place)) for place, items in enumerate(kept)]


def text_example(row: Mapping[str, Any]) -> Example | Chat:
    """Convert a row to text or a chat; raise `DataError`, with a fact about the row, if it is neither."""
    match row:
        case {"text": str(text)}:
            example = Example("", text)
        case {"prompt": str(prompt), "completion": str(completion)}:
            example = Example(prompt, completion)
        case _:
            if (chat := chat_of(row)) is None:
                raise DataError("has no text")
            return chat
    if not example.completion.strip():
        raise DataError("is empty text")
    try:
        example.text.encode("utf-8")  # as fast as a copy; a loop over the characters took half the ingest time
    except UnicodeEncodeError:
        raise DataError("contains a lone surrogate, which is not valid text") from None
    return example


def nothing_usable(found: Examples) -> DataError:
    """Return the error for a file without a usable row."""
    if found.reason is None:
        return DataError("the file holds no example", hint=_HINT)
    several = f"none of its {found.skipped} rows is usable; the first: {found.reason}"
    return DataError(found.reason if found.skipped == 1 else several, hint=_HINT)
