"""Pack and store what codes cannot represent: heads and other tensors, tokenizers and other files next to adapters.

Packing takes many times longer than reading. So equal bytes are packed once for all adapters, and an adapter that the
store knows keeps its extras and gets later files. Tensors that equal tensors of the base model are not packed: a record
of a few bytes refers to them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from icmlora.base_models.examples.context import TaskContext
from icmlora.base_models.finding.tensors import BaseTensors
from icmlora.errors import DataError, IcmLoraError
from icmlora.fleet.bases.joins import KnownBases
from icmlora.fleet.ingest.files import PreparedTask, Refusal
from icmlora.formats.base_references import pack_references, reference_to
from icmlora.formats.extras import pack, tensor_files
from icmlora.formats.peft.peft import CONTEXT_NAMES
from icmlora.io.files import read_regular
from icmlora.io.safetensors import RawTensor, raw_tensors
from registry.errors import SourceRefused
from registry.manifests import Extra, File, Task
from registry.names import UNKNOWN_BASE
from registry.storage.blobs.content import digest_of

if TYPE_CHECKING:
    from icmlora.formats.base_references import Reference
    from registry.store import Store

_MAX_COMPANION = 128 << 20
_MIN_REFERRED = 1024  # bytes of a tensor that a record refers to; its entry in the record takes about 200
# Of packed extras in memory. Storing many at once takes hardly longer than one: each batch waits for the disk.
_WAITING_BYTES = 64 << 20


class ExtrasKeeper:
    """Keeps the extras of final adapters during one ingest.

    Args:
        bases: The base models, whose labels are joined before.
        store: Where extras are stored; None in a dry run.
    """

    def __init__(self, bases: KnownBases, store: Store | None) -> None:
        self._bases, self._store = bases, store
        self._packed: dict[tuple[str, int], File] = {}  # digest and width of the bytes that were packed -> blob
        self._waiting: list[bytes] = []

    def keep(self, tasks: Sequence[PreparedTask | Refusal], known: Mapping[str, Task]) -> list[PreparedTask | Refusal]:
        """Return tasks with their extras, which are durable then, or why these cannot be read.

        Args:
            tasks: The tasks.
            known: Those that the store has, by name in lower case.
        """
        kept: list[PreparedTask | Refusal] = []
        for task in tasks:
            if isinstance(task, Refusal) or not (task.found.final.companions or task.kept):
                kept.append(task)
                continue
            problems = list(task.problems)
            try:
                extras = self._extras(task, known.get(task.task.name.lower()), problems)
            except (IcmLoraError, SourceRefused) as error:
                kept.append(Refusal(error, task.found.final.place))
            else:
                with_extras = replace(task.task, final=replace(task.task.final, extras=extras))
                kept.append(replace(task, task=with_extras, problems=tuple(problems)))
        self._flush()
        return kept

    def _flush(self) -> None:
        if self._store is not None and self._waiting:
            self._store.blobs.put_all(self._waiting)
        self._waiting.clear()

    def _extras(self, task: PreparedTask, known: Task | None, problems: list[Refusal]) -> tuple[Extra, ...]:
        companions, final = task.found.final.companions, task.task.final
        if known is not None and (known.final.weights, known.final.config) == (final.weights, final.config):
            own = known.final.extras
            # An extra that the store lost is packed again.
            if own and (self._store is None or all(self._store.blobs.exists(extra.blob) for extra in own)):
                # Files of a context belong together: a known one may be newer than the folder.
                files = {extra.file for extra in own}
                files = files if CONTEXT_NAMES.isdisjoint(files) else files | CONTEXT_NAMES
                later = {name: path for name, path in companions.items() if name not in files}
                return (*own, *self._files(later, problems))
        extras = self._files(companions, problems)
        # Weights that stay evicted are not in the store; their adapter has its extras already.
        if self._store is not None and task.kept and self._store.blobs.exists(final.weights):
            tensors = raw_tensors(self._store.blobs.read(final.weights), task.kept)
            if equal := self._equal(tensors, task.task.base_model):
                record, size = pack_references(equal), sum(len(tensors.pop(name).data) for name in equal)
                self._waiting.append(record)
                extras.append(Extra(blob=File(digest_of(record), len(record)), size=size))
            extras += [self._extra(None, data, width) for data, width in tensor_files(tensors)]
        return tuple(extras)

    def _files(self, companions: Mapping[str, Path], problems: list[Refusal]) -> list[Extra]:
        found = sorted(_with_usable_context(companions, problems).items())
        return [self._extra(name, read_regular(path, max_bytes=_MAX_COMPANION)) for name, path in found]

    def _equal(self, tensors: Mapping[str, RawTensor], base_model: str) -> dict[str, Reference]:
        """Find the tensors that the base model has too, if it is on this machine."""
        large = {name: tensor for name, tensor in tensors.items() if len(tensor.data) >= _MIN_REFERRED}
        if not large or base_model == UNKNOWN_BASE:
            return {}
        found = self._bases.copy_of(base_model)
        if found is None:
            return {}

        try:
            base = BaseTensors(found)
            places = {name: base.counterpart(name, tensor.shape) for name, tensor in large.items()}
            pairs = ((name, reference_to(place, base, large[name])) for name, place in places.items() if place)
            return {name: reference for name, reference in pairs if reference is not None}
        except (IcmLoraError, OSError):  # a base model that cannot be read costs bytes, not the adapter
            return {}

    def _extra(self, file: str | None, data: bytes, width: int = 1) -> Extra:
        key = digest_of(data), width
        if key not in self._packed:
            packed = pack(data, width)
            self._packed[key] = File(digest_of(packed), len(packed))
            self._waiting.append(packed)
            if sum(map(len, self._waiting)) > _WAITING_BYTES:
                self._flush()
        return Extra(blob=self._packed[key], file=file, size=len(data))


def _with_usable_context(companions: Mapping[str, Path], problems: list[Refusal]) -> Mapping[str, Path]:
    """Return the files, without the files of a malformed context, which is noted."""
    files = {name: companions[name] for name in CONTEXT_NAMES & companions.keys()}
    if not files:
        return companions

    try:
        TaskContext.read({name: read_regular(path, max_bytes=_MAX_COMPANION) for name, path in files.items()})
    except DataError as error:
        path = companions[str(error.path)]
        error.path, error.hint = str(path), "correct or delete the file, then ingest the folder again"
        problems.append(Refusal(error, path))
        return {name: path for name, path in companions.items() if name not in CONTEXT_NAMES}
    return companions
