"""Read, check and store the files of found tasks, one batch at a time.

    FoundTask --check--> PreparedTask (its bytes are stored as blobs; ready to be recorded)
         `-------------> Refusal      (why a task, or a checkpoint or text of one, was refused)

Weights and texts are read once: the checked bytes are hashed and stored. Configurations and cards are small; they are
read first, because weights are checked against them, and stored from memory.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
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
from icmlora.fleet.ingest.record import Offer
from icmlora.fleet.resources.adapter_row import new_adapter
from icmlora.formats.discovery.found import FoundTask
from icmlora.formats.format import AdapterFormat, AdapterSummary, FoundAdapter
from icmlora.formats.tensor_hash import tensors_key
from icmlora.formats.weights import check_head, read_weights
from icmlora.io.files import read_regular
from icmlora.io.safetensors import TensorInfo
from registry.errors import SourceRefused
from registry.files import CheckFirst, read_plain
from registry.manifests import Adapter, File, Task
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
class PreparedTask(Offer):
    """A checked task. Its bytes are in the store, except in a dry run; `ExtrasKeeper` adds its extras."""

    found: FoundTask
    size: int  # bytes of all its adapters' files
    problems: tuple[Refusal, ...]
    samples_read: TextRead | None = None
    eval_read: TextRead | None = None
    kept: tuple[TensorInfo, ...] = ()  # tensors of its final adapter that no code can represent
    base_is_guess: bool = False  # the widths of an image adapter make it likely, and nothing names it
    wrapper: str | None = None  # prefix of a wrapper in the names of its final adapter's tensors


@dataclass(frozen=True)
class _Small:
    """The small files of one adapter, in memory."""

    config: bytes
    card: bytes | None
    initial: bytes | None  # initial weights

    @property
    def meaning(self) -> _Meaning:
        """The files that its weights are read with."""
        return self.config, self.initial


@dataclass(frozen=True)
class _Checked:
    """A file that passed its checks; it is in the store, except in a dry run."""

    file: File
    content: _Weights | TextRead


_Meaning = tuple[bytes, bytes | None]


@dataclass(frozen=True)
class _Weights:
    """The content of a file of weights; several folders may link to it, each with a configuration of its own."""

    summaries: Mapping[_Meaning, AdapterSummary | IcmLoraError]
    tensors_key: str


_Checks = dict[Path, Callable[[bytes | memoryview], _Weights | TextRead]]
_Outcomes = dict[Path, _Checked | Exception]


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


def prepare(
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
    adapters = [adapter for task in tasks for adapter in task.adapters]
    initial: dict[Path, bytes] = {}
    small = {adapter.place: _read_small(adapter, initial) for adapter in adapters}
    good = {folder: item for folder, item in small.items() if isinstance(item, _Small)}
    formats = {adapter.weights: adapter.format for adapter in adapters}
    shown = {item.weights: item.place / item.pickle if item.pickle else item.weights for item in adapters}
    meanings: defaultdict[Path, dict[_Meaning, None]] = defaultdict(dict)
    for adapter in adapters:
        if adapter.place in good:
            meanings[adapter.weights][good[adapter.place].meaning] = None
    checks: _Checks = {
        path: partial(_inspect, formats[path], list(some), path=shown[path])
        for path, some in meanings.items()
        if path not in refused
    }
    texts = {path for task in tasks for path in (task.samples, task.eval_data) if path is not None}
    check = partial(_check_text, any_row=any_row)
    packed = {
        path: _packed(path, store, check) for path in sorted(texts) if _size(path) <= MAX_BYTES and has_media(path)
    }
    plain = sorted(path for path in texts - packed.keys() if _size(path) <= MAX_BYTES)
    checks |= {path: partial(check, path=path) for path in plain}
    first = {path: partial(_check_head, formats[path], path=shown[path]) for path in meanings}
    if store is None:
        outcomes = _check_only(checks, first)
    else:
        withheld = _withheld(tasks, good, evicted)
        contents = {data for item in good.values() for data in (item.config, item.card) if data is not None}
        # If weights stay evicted, their initial weights do too.
        back = (item.initial for item in adapters if not withheld[item.weights])
        contents |= {initial[path] for path in back if path in initial}
        outcomes = _check_and_store(checks, first, sorted(contents), store, withheld)
    hint = f"shorten the file to a sample of the task's text; {_AGAIN}"
    for path in texts - checks.keys() - packed.keys():
        outcomes[path] = DataError(f"more than {MAX_BYTES} bytes of text", path=path, hint=hint)
    outcomes |= dict(refused) | packed
    return [_prepared(task, small, outcomes) for task in tasks]


def _read_small(found: FoundAdapter, initial: dict[Path, bytes]) -> _Small | IcmLoraError:
    """Read the small files of an adapter; the initial weights of several adapters are read once."""
    try:
        config = b"" if found.config is None else read_regular(found.config, max_bytes=_CONFIG_LIMIT)
        card = None if found.card is None else read_regular(found.card, max_bytes=_CARD_LIMIT)
        with located(found.config):  # parsed separately, so that an error names this file and not the weights
            found.format.read_config(config)
        if found.initial is not None and found.initial not in initial:
            initial[found.initial] = read_weights(found.initial, found.format)
    except IcmLoraError as error:
        return error
    return _Small(config, card, None if found.initial is None else initial[found.initial])


def _check_head(known: AdapterFormat, descriptor: int, size: int, *, path: Path) -> None:
    with located(path):
        check_head(known, descriptor, size)


def _inspect(
    adapter_format: AdapterFormat, meanings: Sequence[_Meaning], data: bytes | memoryview, *, path: Path
) -> _Weights:
    """Check weights under each of their configurations; raise if they are valid under none."""
    found: dict[_Meaning, AdapterSummary | IcmLoraError] = {}
    for config, initial in meanings:
        try:
            found[config, initial] = adapter_format.inspect(config, data, path=path, initial=initial)
        except IcmLoraError as error:
            found[config, initial] = error
    errors = [item for item in found.values() if isinstance(item, IcmLoraError)]
    if len(errors) == len(found):
        raise errors[0]
    return _Weights(found, tensors_key(data))


def _check_text(data: bytes | memoryview, *, path: Path, any_row: bool) -> TextRead:
    try:
        found = check_examples(bytes(data), path=path, any_row=any_row)
    except DataError as error:
        error.hint = f"{error.hint}; {_AGAIN}"
        raise
    return TextRead(len(found), found.skipped, found.reason)


def _packed(path: Path, store: Store | None, check: Callable[..., TextRead]) -> _Checked | Exception:
    """Store rows with the files that they name as one archive; each may be as large as a batch, so one at a time."""
    try:
        data = read_examples(path)
        found = check(data, path=path)
        digest = digest_of(data) if store is None else store.blobs.put(data)
    except (IcmLoraError, OSError) as error:
        return error
    return _Checked(File(digest, len(data)), found)


def _withheld(
    tasks: Sequence[FoundTask], small: Mapping[Path, _Small], evicted: Mapping[str, Task]
) -> defaultdict[Path, set[str]]:
    """Map each weights file to the digests of evicted weights that must not be stored again."""
    withheld: defaultdict[Path, set[str]] = defaultdict(set)
    # If another adapter needs one of these, recording raises `MissingBlob` and the batch is stored in full.
    for task in tasks:
        known = evicted.get(task.name.lower())
        for found in () if known is None else task.adapters:
            if known is None or found.place not in small:
                continue
            # As in the store, a final adapter is recognised by its bytes alone, a checkpoint also by its step.
            rows = [known.final] if found.is_final else [one for one in known.checkpoints if one.step == found.step]
            config = digest_of(small[found.place].config)
            withheld[found.weights] |= {
                str(one.weights) for one in rows if one.is_evicted and not one.was_never_here and one.config == config
            }
    return withheld


def _check_and_store(
    checks: _Checks,
    first: Mapping[Path, CheckFirst],
    contents: Sequence[bytes],
    store: Store,
    withheld: Mapping[Path, Collection[str]],
) -> _Outcomes:
    """Store the files that pass their checks, and other contents."""

    def inspect(path: Path, data: bytes) -> _Weights | TextRead:
        return checks[path](data)

    # The whole batch in one call: each call waits for the disk once, and that is what takes time.
    done = store.blobs.put_files(list(checks), inspect, (IcmLoraError,), contents, withheld, first)
    return {
        one.path: one.error if isinstance(one, PutRefusal) else _Checked(File(one.digest, one.size), one.inspected)
        for one in done
    }


def _check_only(checks: _Checks, first: Mapping[Path, CheckFirst]) -> _Outcomes:
    """Read and refuse files as the store would."""
    outcomes: _Outcomes = {}
    for path, check in checks.items():
        try:
            data = read_plain(path, first=first.get(path))
            outcomes[path] = _Checked(_file(data), check(data))
        except (IcmLoraError, SourceRefused) as error:
            outcomes[path] = error
    return outcomes


def _prepared(
    task: FoundTask, small: Mapping[Path, _Small | IcmLoraError], outcomes: _Outcomes
) -> PreparedTask | Refusal:
    """Combine the files of one task; refuse the task if its final adapter was refused."""
    checkpoints: list[Adapter] = []
    problems: list[Refusal] = []
    size, final = 0, None
    for found in task.adapters:
        match _read_of(found, small, outcomes):
            case Exception() as error:
                problems.append(Refusal(error, found.place))
                if found.is_final:
                    return problems[-1]
            case files, weights, summary, key:
                adapter = _adapter(found, files, weights, summary, key)
                size += adapter.original_bytes
                if found.is_final:
                    final = adapter, summary
                else:
                    checkpoints.append(adapter)
    assert final is not None  # a task has a final adapter
    adapter, summary = final
    label = full_label(summary.base_model, summary.revision, task.final.place, task.folder)
    (samples, samples_read), (eval_data, eval_read) = (
        _text(path, outcomes, problems) for path in (task.samples, task.eval_data)
    )
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
        size=size,
        problems=tuple(problems),
        samples_read=samples_read,
        eval_read=eval_read,
        kept=summary.extras,
        base_is_guess=summary.base_is_guess,
        wrapper=summary.wrapper,
    )


def _read_of(
    found: FoundAdapter, small: Mapping[Path, _Small | IcmLoraError], outcomes: _Outcomes
) -> tuple[_Small, File, AdapterSummary, str] | Exception:
    """Return the files of one adapter with their summary and key, or the first reason to refuse it."""
    files = small[found.place]
    if isinstance(files, Exception):
        return files
    checked = outcomes[found.weights]
    if isinstance(checked, Exception):
        return checked
    assert not isinstance(checked.content, TextRead)
    summary = checked.content.summaries[files.meaning]
    return summary if isinstance(summary, Exception) else (files, checked.file, summary, checked.content.tensors_key)


def _text(path: Path | None, outcomes: _Outcomes, problems: list[Refusal]) -> tuple[File, TextRead] | tuple[None, None]:
    """Return a text and its usable rows, or note why it cannot be used."""
    if path is None:
        return None, None
    match outcomes[path]:
        case _Checked(file=file, content=TextRead() as read):
            return file, read
        case Exception() as error:
            problems.append(Refusal(error, path))
    return None, None


def _adapter(found: FoundAdapter, files: _Small, weights: File, summary: AdapterSummary, tensors_key: str) -> Adapter:
    adapter = new_adapter(
        summary,
        weights=weights,
        config=_file(files.config),
        card=None if files.card is None else _file(files.card),
        source=source_label(found.place),
    )
    initial = None if files.initial is None else _file(files.initial)
    return replace(adapter, step=found.step, format=found.format.name, initial=initial, tensors_key=tensors_key)


def _file(data: bytes) -> File:
    return File(digest_of(data), len(data))


def _size(path: Path) -> int:
    """Return a file's size for planning; a missing file is refused when it is read."""
    try:
        return path.stat(follow_symlinks=False).st_size
    except OSError:
        return 0
