"""Flip one bit in every blob of a store at once, many times: `icm verify --read-data` has to name each of them."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy import select

from registry.schema import Blob
from registry.storage.blobs.content import Blobs
from registry.storage.prune import BLOB_COLUMNS
from tests.cli.tiny_fleet import icm_quietly
from tests.faults.file_flips import build
from tests.faults.flips import Tally
from tests.faults.pairs import Pair


class BlobFlips:
    """A trained store on a pair."""

    def __init__(self, pair: Pair, root: Path) -> None:
        self._pair = pair
        local = build(root / "built")
        pair.make()
        icm_quietly(local, "copy", local, pair.address)
        self.kinds: defaultdict[str, list[str]] = defaultdict(list)
        with pair.open() as store, store._db.read() as session:
            for column in BLOB_COLUMNS:  # so a new kind of blob is flipped as soon as there is one
                digests = session.scalars(select(Blob.digest).where(Blob.id.in_(select(column))).order_by(Blob.digest))
                self.kinds[str(column)] += [digest for digest in digests if store.blobs.exists(digest)]
        self._bytes = {digest: pair.bytes_of(digest) for digests in self.kinds.values() for digest in digests}

    def study(self, *, each: int, draw: random.Random) -> dict[str, Tally]:
        """Flip at least `each` bits of blobs of each kind."""
        tallies = {kind: Tally() for kind, digests in self.kinds.items() if digests}
        while any(tally.flips < each for tally in tallies.values()):
            wanted = {
                digest
                for kind, tally in tallies.items()
                if tally.flips < each
                for digest in self.kinds[kind]
                if self._bytes[digest]
            }
            for digest in wanted:
                self._pair.set_bytes(digest, _flipped(self._bytes[digest], draw))
            with self._pair.open() as store:
                found = {finding.digest for finding in store.verify(read_data=True) if finding.is_problem}
            for digest in wanted:
                self._pair.set_bytes(digest, self._bytes[digest])
            for kind, tally in tallies.items():
                flipped = wanted & set(self.kinds[kind])
                tally.flips += len(flipped)
                tally.noticed += len(flipped & found)
                tally.unnoticed += len(flipped - found)
        return tallies


def _flipped(data: bytes, draw: random.Random) -> bytes:
    changed = bytearray(data)
    changed[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    return bytes(changed)


@contextmanager
def believing() -> Iterator[None]:
    """Believe the bytes of all blobs: the control, which has to be caught."""
    is_intact = Blobs.is_intact
    Blobs.is_intact = lambda self, digest: True  # type: ignore[method-assign]
    try:
        yield
    finally:
        Blobs.is_intact = is_intact  # type: ignore[method-assign]
