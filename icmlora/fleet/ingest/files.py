"""Read, check and store the files of found tasks, one batch at a time.

    FoundTask --check--> PreparedTask (its bytes are stored as blobs; ready to be recorded)
         `-------------> Refusal      (why a task, or a checkpoint or text of one, was refused)

Weights and texts are read once: the checked bytes are hashed and stored. Configurations and cards are small; they are
read first, because weights are checked against them, and stored from memory.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from icmlora.base_models.catalogue import check_examples
from icmlora.base_models.examples.examples import MAX_BYTES
from icmlora.base_models.examples.media_archive import has_media, read_examples
from icmlora.base_models.finding.labels import full_label
from icmlora.errors import DataError, IcmLoraError, located
from icmlora.fleet.resources.adapter_row import new_adapter
from icmlora.formats.discovery.found import FoundTask
from icmlora.formats.format import AdapterSummary, FoundAdapter
from icmlora.formats.tensor_hash import tensors_key
from icmlora.formats.weights import check_head, read_weights
from icmlora.io.files import read_regular
from icmlora.io.safetensors import TensorInfo
from registry.errors import SourceRefused
from registry.files import read_plain
from registry.manifests import File, StoredAdapter, Task
from registry.names import UNKNOWN_BASE, source_label
from registry.storage.blobs.content import PutRefusal, digest_of

if TYPE_CHECKING:
    from registry.store import Store

_CONFIG_LIMIT = 1 << 20
_CARD_LIMIT = 4 << 20
_AGAIN = "correct the file and ingest it again, or use --no-texts"
# An interrupted ingest reads at most one batch again: 256 MiB, or 256 adapters.
_BATCH_BYTES = 256 << 20
_BATCH_ADAPTERS = 256


@dataclass(frozen=True)
class Refusal:
    """A refusal of a whole task, or of a checkpoint or text of a task that is ingested without it."""

    error: Exception
    path: Path


@dataclass(frozen=True)
class TextRead:
    """Usable rows of a task's samples or held-out text."""

    kept: int
    skipped: int  # rows that cannot be used
    reason: str | None  # why the first of them cannot


@dataclass(frozen=True, kw_only=True)
class PreparedTask:
    """A checked task. Its bytes are in the store, except in a dry run; `ExtrasKeeper` adds its extras."""

    found: FoundTask
    task: Task  # as it would be if the store did not know it; any label may name its base model
    problems: tuple[Refusal, ...]  # checkpoints and texts that it is ingested without
    samples_read: TextRead | None = None
    eval_read: TextRead | None = None
    kept: tuple[TensorInfo, ...] = ()  # tensors of its final adapter that no code can represent
    base_is_named: bool = False  # the user names the base model, because the adapters name none
    base_is_guess: bool = False  # the widths of an image adapter make it likely, and nothing names it
    wrapper: str | None = None  # prefix of a wrapper in the names of its final adapter's tensors


def batches(tasks: Sequence[FoundTask]) -> Iterator[list[FoundTask]]:
    """Split tasks into batches of limited size, without splitting a task."""
    batch: list[FoundTask] = []
    size = count = 0
    for task in tasks:
        texts = (path for path in (task.samples, task.eval_data) if path is not None)
        initial = {adapter.initial for adapter in task.adapters if adapter.initial is not None}
        weight = sum(map(_size, [*(adapter.weights for adapter in task.adapters), *initial, *texts]))
        if batch and (size + weight > _BATCH_BYTES or count + len(task.adapters) > _BATCH_ADAPTERS):
            yield batch
            batch, size, count = [], 0, 0
        batch.append(task)
        size, count = size + weight, count + len(task.adapters)
    if batch:
        yield batch


def check_files(
    tasks: Sequence[FoundTask],
    store: Store | None,
    evicted: Mapping[str, Task] = MappingProxyType({}),
    refused: Mapping[Path, IcmLoraError] = MappingProxyType({}),
    *,
    any_row: bool = False,
) -> list[PreparedTask | Refusal]:
    """Check the files of some tasks and store them as blobs.

    Args:
        tasks: The tasks.
        store: Where blobs are stored; None in a dry run.
        evicted: Known tasks, by name in lower case; their evicted weights are not stored.
        refused: Refused weights, which are not opened.
        any_row: Whether samples may have any form, as the loader of a base model may read.
    """
    batch = _Batch(tasks, refused, any_row=any_row)
    batch.check_files(store, evicted)
    return [batch.combined(task) for task in tasks]


@dataclass(frozen=True)
class _SmallFiles:
    """The configuration, the card and the initial weights of an adapter, in memory."""

    config: bytes
    card: bytes | None
    initial: bytes | None

    @property
    def meaning(self) -> tuple[bytes, bytes | None]:
        """The files that its weights are read with."""
        return self.config, self.initial


class _Batch:
    """The files of some tasks, and what their checks found."""

    def __init__(self, tasks: Sequence[FoundTask], refused: Mapping[Path, IcmLoraError], *, any_row: bool) -> None:
        self._tasks, self._any_row = tasks, any_row
        self._files: dict[Path, File | Exception] = dict(refused)  # of weights and texts: the blob, or the refusal
        self._keys: dict[Path, str] = {}  # of the tensors of weights
        self._texts: dict[Path, TextRead] = {}
        # Several folders may link to one file of weights, each with a configuration of its own.
        self._users: defaultdict[Path, dict[tuple[bytes, bytes | None], FoundAdapter]] = defaultdict(dict)
        self._summaries: dict[tuple[Path, bytes, bytes | None], AdapterSummary | IcmLoraError] = {}
        self._initial: dict[Path, bytes] = {}  # read once for several adapters
        self._small: dict[Path, _SmallFiles | IcmLoraError] = {}
        for found in (adapter for task in tasks for adapter in task.adapters):
            try:
                small = self._small[found.place] = self._read_small(found)
            except IcmLoraError as error:
                self._small[found.place] = error
            else:
                self._users[found.weights].setdefault(small.meaning, found)

    def _read_small(self, found: FoundAdapter) -> _SmallFiles:
        config = b"" if found.config is None else read_regular(found.config, max_bytes=_CONFIG_LIMIT)
        card = None if found.card is None else read_regular(found.card, max_bytes=_CARD_LIMIT)
        with located(found.config):  # parsed separately, so that an error names this file and not the weights
            found.format.read_config(config)
        if found.initial is None:
            return _SmallFiles(config, card, None)
        if found.initial not in self._initial:
            self._initial[found.initial] = read_weights(found.initial, found.format)
        return _SmallFiles(config, card, self._initial[found.initial])

    def check_files(self, store: Store | None, evicted: Mapping[str, Task]) -> None:
        """Check weights and texts, and store those that pass with the small files."""
        texts = {path for task in self._tasks for path in (task.samples, task.eval_data) if path is not None}
        for path in sorted(texts):
            if _size(path) > MAX_BYTES:
                hint = f"shorten the file to a sample of the task's text; {_AGAIN}"
                self._files[path] = DataError(f"more than {MAX_BYTES} bytes of text", path=path, hint=hint)
            elif has_media(path):
                self._files[path] = self._pack(path, store)
        paths = [*(path for path in self._users if path not in self._files), *sorted(texts - self._files.keys())]
        first = {path: partial(self._check_head, path) for path in paths if path in self._users}
        if store is None:
            for path in paths:
                try:
                    data = read_plain(path, first=first.get(path))
                    self._inspect(path, data)
                    self._files[path] = _file(data)
                except (IcmLoraError, SourceRefused) as error:
                    self._files[path] = error
            return
        withheld = self._withheld(evicted)
        small = [item for item in self._small.values() if isinstance(item, _SmallFiles)]
        contents = {data for item in small for data in (item.config, item.card) if data is not None}
        # If weights stay evicted, their initial weights do too.
        adapters = (adapter for task in self._tasks for adapter in task.adapters if not withheld[adapter.weights])
        contents |= {self._initial[found.initial] for found in adapters if found.initial in self._initial}
        # The whole batch in one call: each call waits for the disk once, and that is what takes time.
        done = store.blobs.put_files(paths, self._inspect, (IcmLoraError,), sorted(contents), withheld, first)
        self._files |= {
            one.path: one.error if isinstance(one, PutRefusal) else File(one.digest, one.size) for one in done
        }

    def _check_head(self, path: Path, descriptor: int, size: int) -> None:
        found = next(iter(self._users[path].values()))
        with located(_shown(found)):
            check_head(found.format, descriptor, size)

    def _inspect(self, path: Path, data: bytes) -> None:
        """Check a text, or weights under each of their configurations; raise if they are valid under none."""
        if path not in self._users:
            self._check_text(path, data)
            return
        errors = []
        for (config, initial), found in self._users[path].items():
            try:
                summary = found.format.inspect(config, data, path=_shown(found), initial=initial)
                self._summaries[path, config, initial] = summary
            except IcmLoraError as error:
                self._summaries[path, config, initial] = error
                errors.append(error)
        if len(errors) == len(self._users[path]):
            raise errors[0]
        self._keys[path] = tensors_key(data)

    def _check_text(self, path: Path, data: bytes) -> None:
        try:
            found = check_examples(data, path=path, any_row=self._any_row)
        except DataError as error:
            error.hint = f"{error.hint}; {_AGAIN}"
            raise
        self._texts[path] = TextRead(len(found), found.skipped, found.reason)

    def _pack(self, path: Path, store: Store | None) -> File | Exception:
        """Store rows and the files that they name as one archive. One at a time: each may be as large as a batch."""
        try:
            data = bytes(read_examples(path))
            self._check_text(path, data)
            return _file(data) if store is None else File(store.blobs.put(data), len(data))
        except (IcmLoraError, OSError) as error:
            return error

    def _withheld(self, evicted: Mapping[str, Task]) -> Mapping[Path, Collection[str]]:
        """Map each file of weights to the digests of evicted weights that must not be stored again."""
        withheld: defaultdict[Path, set[str]] = defaultdict(set)
        # If another adapter needs one of these, recording raises `MissingBlob` and the batch is stored in full.
        for task in self._tasks:
            known = evicted.get(task.name.lower())
            for found in () if known is None else task.adapters:
                small = self._small[found.place]
                if known is None or isinstance(small, Exception):
                    continue
                # As in the store, a final adapter is recognised by its bytes alone, a checkpoint also by its step.
                rows = [known.final] if found.is_final else [one for one in known.checkpoints if one.step == found.step]
                config = digest_of(small.config)
                withheld[found.weights] |= {
                    str(row.weights)
                    for row in rows
                    if row.is_evicted and not row.was_never_here and row.config == config
                }
        return withheld

    def combined(self, task: FoundTask) -> PreparedTask | Refusal:
        """Combine the files of one task; refuse the task if its final adapter was refused."""
        checkpoints: list[StoredAdapter] = []
        problems: list[Refusal] = []
        final: tuple[StoredAdapter, AdapterSummary] | None = None
        for found in task.adapters:
            read = self._adapter(found)
            if isinstance(read, Exception):
                problems.append(Refusal(read, found.place))
                if found.is_final:
                    return problems[-1]
            elif found.is_final:
                final = read
            else:
                checkpoints.append(read[0])
        assert final is not None  # a task has a final adapter
        adapter, summary = final
        texts: list[File | None] = []
        for path in (task.samples, task.eval_data):
            file = None if path is None else self._files[path]
            if path is not None and isinstance(file, Exception):
                problems.append(Refusal(file, path))
            texts.append(None if isinstance(file, Exception) else file)
        samples, eval_data = texts
        label = full_label(summary.base_model, summary.revision, task.final.place, task.folder)
        return PreparedTask(
            found=task,
            task=Task(
                name=task.name,
                base_model=UNKNOWN_BASE if label is None else label,
                final=adapter,
                checkpoints=tuple(checkpoints),
                samples=samples,
                eval_data=eval_data,
            ),
            problems=tuple(problems),
            samples_read=None if samples is None or task.samples is None else self._texts[task.samples],
            eval_read=None if eval_data is None or task.eval_data is None else self._texts[task.eval_data],
            kept=summary.extras,
            base_is_guess=summary.base_is_guess,
            wrapper=summary.wrapper,
        )

    def _adapter(self, found: FoundAdapter) -> tuple[StoredAdapter, AdapterSummary] | Exception:
        """Return one adapter with its summary, or the first reason to refuse it."""
        small = self._small[found.place]
        if isinstance(small, Exception):
            return small
        weights = self._files[found.weights]
        if isinstance(weights, Exception):
            return weights
        summary = self._summaries[found.weights, small.config, small.initial]
        if isinstance(summary, Exception):
            return summary
        adapter = new_adapter(
            summary,
            weights=weights,
            config=_file(small.config),
            card=None if small.card is None else _file(small.card),
            source=source_label(found.place),
        )
        initial = None if small.initial is None else _file(small.initial)
        key = self._keys[found.weights]
        return replace(adapter, step=found.step, format=found.format.name, initial=initial, tensors_key=key), summary


def _shown(found: FoundAdapter) -> Path:
    """Return the path of weights for messages: a converted pickle is a temporary file."""
    return found.place / found.pickle if found.pickle else found.weights


def _file(data: bytes) -> File:
    return File(digest_of(data), len(data))


def _size(path: Path) -> int:
    """Return a file's size for planning; a missing file is refused when it is read."""
    try:
        return path.stat(follow_symlinks=False).st_size
    except OSError:
        return 0
