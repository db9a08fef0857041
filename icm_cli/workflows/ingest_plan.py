"""What an ingest is asked for and what it reports."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from icm_cli.workflows.events import Event

Conflict = Literal["skip", "replace", "fail"]


@dataclass(frozen=True)
class IngestRequest:
    """What to take into the store.

    Attributes:
        paths: Folders that hold adapters at any depth.
        name: A name for the one task that is found, instead of its folder's.
        samples: Training texts for the one task that is found, instead of `samples.jsonl` beside it.
        skip_bad: Go on past what is refused.
        on_conflict: What to do with a task whose name has another adapter in the store.
        dry_run: Check everything, say what the store would make of it, and store nothing.
        restore: Bring evicted originals back; else they are known and stay evicted.
        texts: Take `samples.jsonl` and `eval.jsonl` that lie beside adapters; `samples` is taken in any case.
    """

    paths: tuple[Path, ...]
    name: str | None = None
    samples: Path | None = None
    skip_bad: bool = False
    on_conflict: Conflict = "fail"
    dry_run: bool = False
    restore: bool = False
    texts: bool = True


@dataclass(frozen=True)
class Ingested(Event):
    """A task is in the store now, or would be.

    Attributes:
        task: Its name.
        status: `added`, `updated`, `known`, `replaced` or `skipped`.
        new: Adapters that were recorded.
        known: Adapters that the store had.
        size: Bytes of all its adapters' files.
        evicted: Known adapters that stay evicted.
        restored: Known adapters that were evicted and are back.
    """

    task: str
    status: str
    new: int
    known: int
    size: int
    evicted: int = 0
    restored: int = 0


@dataclass(frozen=True)
class Refused(Event):
    """Something that is not taken.

    Attributes:
        path: The file or folder.
        kind: A short stable word for the reason.
        message: The fact.
        hint: What to do next, or None.
    """

    path: str
    kind: str
    message: str
    hint: str | None


@dataclass
class IngestReport:
    """What an ingest did.

    Attributes:
        found: Tasks that were found.
        ingested: One entry per task that was taken or already there.
        refused: One entry per refusal that was passed over.
        without_vectors: Tasks of this ingest that have no task vectors yet; a dry run does not say.
        stopped: Whether the user stopped it before the end.
    """

    found: int = 0
    ingested: list[Ingested] = field(default_factory=list)
    refused: list[Refused] = field(default_factory=list)
    without_vectors: list[str] = field(default_factory=list)
    stopped: bool = False

    @property
    def new(self) -> int:
        """Adapters that were recorded."""
        return sum(task.new for task in self.ingested)

    @property
    def known(self) -> int:
        """Adapters that the store had."""
        return sum(task.known for task in self.ingested)

    @property
    def evicted(self) -> int:
        """Known adapters that stay evicted."""
        return sum(task.evicted for task in self.ingested)

    @property
    def restored(self) -> int:
        """Known adapters that were evicted and are back."""
        return sum(task.restored for task in self.ingested)

    @property
    def size(self) -> int:
        """Bytes of all adapters that were taken or already there."""
        return sum(task.size for task in self.ingested)
