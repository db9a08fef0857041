"""Questions with one exact answer each: rows to train on and rows held out, as chats in JSON lines."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.benchmarks.classification.rows import cut

HELD_OUT = 400
"""Rows of a task that no training sees."""
SAMPLES = 64
"""Rows of the training part that lie beside an adapter."""
_CLASSIFIED = 2400, HELD_OUT
Chat = dict[str, list[dict[str, str]]]


@dataclass(frozen=True)
class Row:
    """A question and its answer."""

    prompt: str
    answer: str

    @property
    def chat(self) -> Chat:
        """The row as OpenAI, TRL and `icm ingest` write one."""
        return {"messages": turns([self])}


@dataclass(frozen=True)
class Rows:
    """The data of one task; no prompt is in both parts."""

    train: tuple[Row, ...]
    held_out: tuple[Row, ...]

    def write(self, folder: Path) -> None:
        """Write samples.jsonl and eval.jsonl."""
        for name, rows in (("samples", self.train[:SAMPLES]), ("eval", self.held_out)):
            lines = "".join(json.dumps(row.chat, ensure_ascii=False) + "\n" for row in rows)
            (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")


def turns(rows: Iterable[Row], asked: str | None = None) -> list[dict[str, str]]:
    """Return rows as turns of one chat, and after them a question that is not answered yet."""
    found: list[dict[str, str]] = []
    for row in rows:
        found += [{"role": "user", "content": row.prompt}, {"role": "assistant", "content": row.answer}]
    return found if asked is None else [*found, {"role": "user", "content": asked}]


def read(path: Path) -> list[Row]:
    """Read rows that `Rows.write` wrote."""
    chats = [json.loads(line)["messages"] for line in path.read_text("utf-8").split("\n") if line]
    return [Row(asked["content"], answered["content"]) for asked, answered in chats]


def divided(rows: Iterable[Row]) -> Rows:
    """Hold out the first rows in the order of their hashes; of several answers to a prompt the first counts."""
    ordered = _ordered(rows)
    return Rows(tuple(ordered[HELD_OUT:]), tuple(ordered[:HELD_OUT]))


def classified(documents: Mapping[str, list[str]], question: str, characters: int) -> Rows:
    """Ask for the class of pieces of documents, of so many characters; a document is in one part only."""
    found = cut(documents, _CLASSIFIED, characters)
    train, held_out = (
        _ordered(Row(f"{row.text.strip()}\n\n{question}", found.classes[row.label]) for row in part)
        for part in (found.train, found.held_out)
    )
    seen = {row.prompt for row in held_out}
    return Rows(tuple(row for row in train if row.prompt not in seen), tuple(held_out))


def _ordered(rows: Iterable[Row]) -> list[Row]:
    first: dict[str, Row] = {}
    for row in rows:
        first.setdefault(row.prompt, row)
    return sorted(first.values(), key=lambda row: hashlib.sha256(row.prompt.encode()).digest())


def examples_that_fit(rows: Sequence[Row], sizes: Sequence[int], room: int) -> list[Row]:
    """Return the first rows whose sizes, in tokens, have room together."""
    kept: list[Row] = []
    for row, size in zip(rows, sizes, strict=True):
        room -= size
        if room < 0:
            break
        kept.append(row)
    return kept
