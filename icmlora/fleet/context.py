"""Give every use case its store, its listener and the tasks to work on. Never imports torch.

    on_event(Progress(3, 20, "poems"))     after each unit of work
    on_event(TaskEncoded("poems", ...))    for each result

A use case calls `on_event` only when everything it has reported is durable. A listener stops it by raising `Cancelled`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Collection, Iterator, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Concatenate, ParamSpec, Protocol, TypeVar

from icmlora.errors import Cancelled, DataError, InvalidShard
from icmlora.fleet.params import params_of
from registry.errors import DamagedStore
from registry.filters import Selection
from registry.names import Address, address_of as address_of
from registry.storage.locks import Deadline

if TYPE_CHECKING:
    from icmlora.base_models.finding.lookup import FoundBase
    from icmlora.bundle.file import ReopenedBundle
    from icmlora.generator.codec.generator_file import GeneratorFile
    from registry.errors import IcmError
    from registry.manifests import Task
    from registry.store import Store


P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True)
class Event:
    """Base class of everything that a use case reports while it works."""

    TYPE: ClassVar[str] = ""  # of its JSON line, whose other fields are those of the class; empty for none


@dataclass(frozen=True)
class Progress(Event):
    """How far a use case is."""

    done: float  # finished units
    total: float | None  # all units, or None if that is unknown
    note: str = ""  # the unit in work, as untrusted text


@dataclass(frozen=True)
class Waiting(Event):
    """Another process holds a lock; told once a second, with what is waited for and who that is."""

    text: str


@dataclass(frozen=True)
class StageBegun(Event):
    """A use case that does several things begins the next of them; `report` says what was done until then."""

    label: str
    report: object


@dataclass(frozen=True)
class TaskFailed(Event):
    """A task that something is wrong with; the others go on."""

    task: str
    kind: str  # a short stable word for the reason
    message: str
    hint: str | None

    @classmethod
    def of(cls, task: str, error: IcmError) -> TaskFailed:
        """Describe the error of a task."""
        kind = getattr(error, "kind", None) or re.sub(r"(?<=[a-z])(?=[A-Z])", "_", type(error).__name__).lower()
        return cls(task, kind, error.message, error.hint)


@dataclass(frozen=True)
class TaskDamaged(Event):
    """A task whose rows in the database are damaged; what goes over many tasks goes on without it."""

    task: str
    message: str
    hint: str | None


def ignore(event: Event) -> None:
    """Do nothing with an event."""


def default_cache() -> Path:
    """Return the folder `icm` in the Hugging Face home."""
    from huggingface_hub.constants import HF_HOME

    return Path(HF_HOME) / "icm"


class GeneratorCache:
    """The generator that was opened last: opening one takes longer than decoding a small code with it."""

    def __init__(self) -> None:
        self._last: tuple[str, GeneratorFile] | None = None

    def get(self, digest: str, read: Callable[[str], bytes]) -> GeneratorFile:
        """Return the generator of a digest; `read` returns the bytes of its file."""
        last = self._last  # once: another thread may replace it
        if last is None or last[0] != digest:
            from icmlora.generator.codec.generator_file import GeneratorFile  # an original is written without

            self._last = last = digest, GeneratorFile(read(digest))
        return last[1]

    def __reduce__(self) -> tuple[type[GeneratorCache], tuple[()]]:
        """Leave the generator here when a context goes to a worker."""
        return GeneratorCache, ()


class HasContext(Protocol):
    """A `Context`, or a `Fleet`, which has one."""

    @property
    def context(self) -> Context: ...


@dataclass(frozen=True)
class Context:
    """The store to work on, how long to wait for it, and who listens."""

    address: Address
    # Folder for files that can be created again, such as base models converted from GGUF, or a function that
    # returns it. The function is called only when the folder is needed.
    cache_folder: Path | Callable[[], Path] = default_cache
    lock_timeout: float = 30.0  # seconds to wait for other processes, in one command
    command: str = "icm"
    # Called between atomic steps. It raises `Cancelled` to stop the use case.
    on_event: Callable[[Event], None] = ignore
    generator: GeneratorCache = field(default_factory=GeneratorCache, compare=False)  # for decoding again and again
    deadline: Deadline | None = field(default=None, compare=False)  # what is left of the timeout, within a command
    bundle: ReopenedBundle | None = None  # read instead of a store

    @property
    def context(self) -> Context:
        """The context itself: use cases accept a `Context` or a `Fleet`."""
        return self

    @property
    def path(self) -> Path:
        """The folder of the store; raises `DataError` if it is in a database."""
        if not isinstance(self.address, Path):
            raise DataError(f"the store {self.address} is not a folder", hint="use a store in a folder")
        return self.address

    @property
    def cache(self) -> Path:
        """The folder for files that can be created again; it need not exist."""
        return self.cache_folder if isinstance(self.cache_folder, Path) else self.cache_folder()

    def open(self, *, create: bool = False, read_only: bool = False, blobs: str | None = None) -> Store:
        """Open the store, as a context manager; see `registry.store.Store.open` for what it raises."""
        # Importing SQLAlchemy takes most of the time of a short command.
        from registry.store import Store

        return Store.open(
            self.address,
            create=create,
            read_only=read_only,
            deadline=self.deadline or self.with_deadline().deadline,
            command=self.command,
            blobs=blobs,
            cache=lambda: self.cache / "blobs",
            # Where nobody listens, a missing task would go unnoticed.
            on_damage=None if self.on_event is ignore else self._report_damage,
        )

    def with_deadline(self) -> Context:
        """Return the same for one command: its waits take no longer than the timeout, all of them together."""
        return replace(self, deadline=Deadline(self.lock_timeout, lambda text: self.on_event(Waiting(text))))

    def _report_damage(self, task: str, error: IcmError) -> None:
        self.on_event(TaskDamaged(task, error.message, error.hint))

    def progress(self, done: float, total: float | None, note: str = "") -> None:
        """Report how far the use case is."""
        self.on_event(Progress(done, total, note))

    def counting(self, done: Sized, total: int) -> Callable[[str], None]:
        """Return what reports how many of so many tasks are done, and what is being done; report that none is."""
        self.progress(0, total)
        return lambda note: self.progress(len(done), total, note)


def use_case(function: Callable[Concatenate[Context, P], R]) -> Callable[Concatenate[HasContext, P], R]:
    """Declare a function that works on a store: a method of `Fleet`, and the source of a command's options and help.

    All waits of one call for other processes share the timeout, including those of the use cases that it calls.
    Numbers outside the limits of their `Param` raise `OptionsConflict`.
    """

    @wraps(function)
    def call(source: HasContext, /, *args: P.args, **kwargs: P.kwargs) -> R:
        context = source.context
        if context.deadline is not None:
            return function(context, *args, **kwargs)
        declared = params_of(function)
        for name, value in kwargs.items():
            if name in declared:
                declared[name].check(name, value)
        return function(context.with_deadline(), *args, **kwargs)

    return call


@contextmanager
def reporting(report: object) -> Iterator[None]:
    """If the block is stopped, set `Cancelled.report` to what was done until then."""
    try:
        yield
    except Cancelled as stop:
        stop.report = report
        raise


@dataclass(frozen=True)
class Shard:
    """One of `count` parts of a fleet, numbered from 1. Which one a task is in depends on its name alone."""

    number: int
    count: int

    @classmethod
    def of(cls, text: str | None) -> Shard | None:
        """Read a shard written as `3/8`, None for the whole fleet; raises `InvalidShard`."""
        if text is None:
            return None
        match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
        number, count = (int(match[1]), int(match[2])) if match else (0, 0)
        if not 1 <= number <= count:
            raise InvalidShard(
                f"{text!r} is not a shard", hint="write 1/8 for the first of eight shards; numbers start at 1"
            )
        return cls(number, count)

    def has(self, name: str) -> bool:
        """Return whether a task is in this part."""
        digest = hashlib.sha256(name.encode()).digest()
        return int.from_bytes(digest[:8]) % self.count == self.number - 1


def select_tasks(
    store: Store, names: Sequence[str], base_model: str | None = None, shard: Shard | None = None
) -> list[Task]:
    """Return the selected tasks, each once, ordered by base model and name."""
    base_model = base_name(store, base_model)
    tasks = store.named(names) if names else list(store.tasks(Selection(base_model=base_model)))
    check_base_model(base_model, {task.base_model for task in tasks}, named=bool(names))
    chosen = {(task.base_model, task.name, task.version): task for task in tasks}
    return [
        chosen[key] for key in sorted(chosen) if base_model in (None, key[0]) and (shard is None or shard.has(key[1]))
    ]


def check_base_model(base_model: str | None, known: Collection[str], *, named: bool = False) -> None:
    """Raise `DataError` unless a task belongs to the selected base model."""
    if base_model is not None and base_model not in known:
        none = "none of these tasks" if named else "no task"
        raise DataError(f"{none} belongs to base model {base_model!r}", hint="run `icm base ls` to list them")


def locate_base(store: Store, label: str) -> FoundBase:
    """Find a base model without loading it; raises `BaseModelNotFound`."""
    base = store.base_model(label)
    from icmlora.base_models.finding.locations import find_located  # imports the kinds of base models

    return replace(find_located(base.names), task_type=_task_type(store, base.name))


def _task_type(store: Store, base_model: str) -> str | None:
    """Return PEFT's task type of the adapters of a base model, as far as one of them tells."""
    try:
        for task in store.tasks(Selection(base_model=base_model, limit=1)):
            found = json.loads(store.blobs.read(task.final.config)).get("task_type")
            return found if isinstance(found, str) else None
    except (ValueError, AttributeError, DamagedStore):  # of another format, or it is for its own task to say so
        pass
    return None


def has_loaders() -> bool:
    """Return whether a base model has a loader, which may read samples of any form."""
    from icmlora.base_models.finding.locations import locations

    return any(known.loader is not None for known in locations().values())


def base_name(store: Store, label: str | None) -> str | None:
    """Return the name of the base model that has a label, or None for None."""
    return None if label is None else store.base_name(label)
