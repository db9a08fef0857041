"""A second blob backend: it shows that a new kind of place is one small file."""

from __future__ import annotations

import io
import math
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import BinaryIO
from uuid import uuid4

from registry.files import Bytes
from registry.manifests import is_digest
from registry.storage.blobs.backend import BlobInfo, Leftover


class MemoryBatch:
    """Bytes that are kept once the batch ends."""

    def __init__(self, kept: dict[str, bytes]) -> None:
        self._kept = kept
        self.new: dict[str, bytes] = {}

    def put(self, digest: str, data: Bytes) -> bool:
        if self.new.get(digest, self._kept.get(digest)) == data:
            return False
        self.new[digest] = bytes(data)
        return True


class MemoryBackend:
    """Blobs in a dictionary."""

    is_remote = False
    home = "memory"
    grace = 3600.0

    def __init__(self) -> None:
        self.kept: dict[str, bytes] = {}
        self.damaged: dict[str, bytes] = {}
        self._modified: dict[str, float] = {}

    def now(self) -> float:
        return time.time()

    @contextmanager
    def batch(self) -> Iterator[MemoryBatch]:
        batch = MemoryBatch(self.kept)
        yield batch
        self._modified |= dict.fromkeys(batch.new, time.time())
        self.kept |= batch.new

    def get(self, digest: str) -> BinaryIO:
        data = self.kept.get(self._known(digest))
        if data is None:
            raise FileNotFoundError(digest)
        return io.BytesIO(data)

    def exists(self, digest: str) -> bool:
        return self._known(digest) in self.kept

    @staticmethod
    def _known(digest: str) -> str:
        if not is_digest(digest):
            raise ValueError(f"not a digest: {digest!r}")
        return digest

    def size(self, digest: str) -> int:
        with self.get(digest) as file:
            return len(file.read())

    def all(self) -> Iterator[BlobInfo]:
        for digest, data in sorted(self.kept.items()):
            yield BlobInfo(digest, len(data), self._modified[digest])

    def delete(self, digest: str, *, newest: float = math.inf) -> int:
        return 0 if self._modified.get(self._known(digest), 0) > newest else len(self.kept.pop(digest, b""))

    def leftovers(self, *, aside: bool = False) -> Iterator[Leftover]:
        for place, data in list(self.damaged.items()) if aside else ():
            yield Leftover(place, len(data), self._modified[place[:64]], partial(self.damaged.pop, place, None))

    def sync_deletions(self, digests: Iterable[str]) -> None:
        pass

    def quarantine(self, digest: str) -> str:
        place = f"{digest}.{uuid4().hex[:8]}"
        self.damaged[place] = self.kept.pop(digest)
        return place

    def place(self, digest: str) -> str:
        return f"memory:{digest}"
