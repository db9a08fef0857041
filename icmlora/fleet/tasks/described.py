"""Find tasks by a sentence: by the words of their names, notes, tags and cards. Imports neither torch nor numpy.

A task is a document for SQLite's full-text index, which is made for the search, in memory, and ranks documents by BM25.
"""

from __future__ import annotations

import re
import sqlite3
from dataclasses import dataclass
from typing import TYPE_CHECKING

from icmlora.errors import DataError
from icmlora.fleet.context import Context, use_case
from icmlora.fleet.tasks.listing import of_base_model
from registry.errors import DamagedStore
from registry.filters import Selection

if TYPE_CHECKING:
    from registry.manifests import Task
    from registry.store import Store

_MIN_SHARE = 0.01  # of the best score: words such as "the" are in most cards
_MAX_CARD = 16_384  # characters of a card that are read
# The weight of a word in each column. Cards share much of their text.
_WEIGHTS = {"name": 8.0, "note": 6.0, "tags": 6.0, "card": 1.0}
# Words with the same stem are the same; without accents.
_TOKENS = "porter unicode61 remove_diacritics 2"
_FRONT = re.compile(r"\A---\n.*?\n---\n", re.DOTALL)
_COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class DescribedTask:
    """A task that a description fits, and how well: BM25, more is better."""

    task: str
    score: float


@use_case
def find_described(
    context: Context, description: str, *, base_model: str | None = None, limit: int | None = 20
) -> list[DescribedTask]:
    """Rank tasks by a description: by the words that it shares with their names, notes, tags and cards.

    Args:
        context: The store.
        description: A sentence, or a few words. Rare words count more than frequent ones.
        base_model: Only tasks of this base model.
        limit: Maximum number of tasks.

    Raises:
        DataError: The description has no word, or no task belongs to the base model.
    """
    words = list(dict.fromkeys(word.lower() for word in _WORD.findall(description)))
    if not words:
        raise DataError("the description contains no word", hint="describe the task in a few words")
    with context.open(read_only=True) as store:
        selection = of_base_model(store, Selection(base_model))
        found = sqlite3.connect(":memory:")
        try:
            found.execute(f"CREATE VIRTUAL TABLE tasks USING fts5({', '.join(_WEIGHTS)}, tokenize='{_TOKENS}')")
            found.executemany(
                "INSERT INTO tasks VALUES (?, ?, ?, ?)",
                (
                    (task.name, task.note or "", " ".join(task.tags), _card(store, task))
                    for task in store.tasks(selection)
                ),
            )
            asked = [word for word in words if _distinguishes(found, word)]
            rank = f"bm25(tasks, {', '.join(map(str, _WEIGHTS.values()))})"
            query = f"SELECT name, {rank} FROM tasks WHERE tasks MATCH ? ORDER BY 2, 1 LIMIT ?"  # noqa: S608
            match = " OR ".join(f'"{word}"' for word in asked)
            rows = found.execute(query, (match, -1 if limit is None else limit)).fetchall() if asked else []
        finally:
            found.close()
    least = _MIN_SHARE * max((-score for _, score in rows), default=0.0)
    return [DescribedTask(name, -score) for name, score in rows if -score > least]


def _distinguishes(found: sqlite3.Connection, word: str) -> bool:
    """Return whether some tasks have a word and others do not, or the only task has it."""
    (every,) = found.execute("SELECT count(*) FROM tasks").fetchone()
    (having,) = found.execute("SELECT count(*) FROM tasks WHERE tasks MATCH ?", (f'"{word}"',)).fetchone()
    return bool(0 < having < every or having == every == 1)


def _card(store: Store, task: Task) -> str:
    """Return the text that people wrote into a card, without front matter and the comments of a template."""
    if task.final.card is None:
        return ""
    try:
        text = store.blobs.read(task.final.card)[:_MAX_CARD].decode("utf-8", "replace")
    except DamagedStore:  # the other columns are searched
        return ""
    return _COMMENT.sub("", _FRONT.sub("", text))
