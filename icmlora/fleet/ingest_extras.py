"""Pack and store what codes cannot represent: heads and other tensors, tokenizers and other files next to adapters.

Packing takes many times longer than reading. So equal bytes are packed once, however many adapters have them, and
an adapter that the store knows keeps the extras of its row.
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

from icmlora.formats.discovery import FoundAdapter
from icmlora.formats.extras import pack, tensor_files
from icmlora.formats.format import AdapterSummary
from icmlora.io.files import read_regular
from icmlora.io.safetensors import raw_tensors
from registry.blobs.content import digest_of
from registry.records import Extra

if TYPE_CHECKING:
    from registry.store import Store

_COMPANION_LIMIT = 128 << 20
# Of packed extras in memory. Storing many at once takes hardly longer than one: each batch waits for the disk.
_WAITING_BYTES = 64 << 20


class ExtrasKeeper:
    """Keeps the extras of final adapters during one ingest.

    Args:
        known: A store that may know the adapters.
        store: Where extras are stored; None in a dry run.
    """

    def __init__(self, known: Store | None, store: Store | None) -> None:
        self._known, self._store = known, store
        self._packed: dict[tuple[str, int], tuple[str, int]] = {}  # what was packed, as bytes of which width -> blob
        self._waiting: list[bytes] = []

    def keep(
        self, task: str, found: FoundAdapter, config: str, weights: str, summary: AdapterSummary
    ) -> tuple[Extra, ...]:
        """Return the extras of a task's final adapter; `flush` makes them durable. A dry run reads only its files.

        Args:
            task: The name of the task.
            found: Its final adapter.
            config: Digest of the adapter's configuration.
            weights: Digest of its weights.
            summary: What its weights hold.
        """
        if not found.companions and not summary.extras:
            return ()
        recorded = self._recorded.get((task.lower(), config, weights))
        if recorded is not None and self._are_there(recorded):
            return recorded
        extras = [
            self._extra(name, read_regular(path, max_bytes=_COMPANION_LIMIT))
            for name, path in sorted(found.companions.items())
        ]
        # Evicted weights that stay evicted are not in the store; the row of their adapter has its extras already.
        if self._store is not None and summary.extras and self._store.blobs.exists(weights):
            tensors = raw_tensors(self._store.blobs.read(weights), summary.extras)
            extras += [self._extra(None, data, width) for data, width in tensor_files(tensors)]
        return tuple(extras)

    def flush(self) -> None:
        """Make all extras durable that were returned so far."""
        if self._store is not None and self._waiting:
            self._store.blobs.put_all(self._waiting)
        self._waiting.clear()

    @cached_property
    def _recorded(self) -> dict[tuple[str, str, str], tuple[Extra, ...]]:
        """The extras of all final adapters in the store, by task, configuration and weights."""
        rows = [] if self._known is None else self._known.tasks.summaries()
        return {(row.task.name.lower(), row.final.config, row.final.weights): tuple(row.final.extras) for row in rows}

    def _are_there(self, extras: tuple[Extra, ...]) -> bool:
        """Say whether the store has these extras; if it lost one, the same ingest gives it back."""
        return self._store is None or all(self._store.blobs.exists(extra.blob) for extra in extras)

    def _extra(self, file: str | None, data: bytes, width: int = 1) -> Extra:
        key = digest_of(data), width
        if key not in self._packed:
            packed = pack(data, width)
            self._packed[key] = digest_of(packed), len(packed)
            self._waiting.append(packed)
            if sum(map(len, self._waiting)) > _WAITING_BYTES:
                self.flush()
        blob, packed_size = self._packed[key]
        return Extra(blob, file, len(data), packed_size)
