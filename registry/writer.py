"""Rows that others refer to, made when they are new. One writer serves one transaction."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from datetime import UTC, datetime

from sqlalchemy import select
from sqlalchemy.orm import Session

from registry.blobs import BlobStore, Spare, no_spare
from registry.columns import compact_json
from registry.models import BaseModel, Blob, Document

MAX_VARIABLES = 500  # SQLite's own limit on `IN (...)` was 999 for long


class RowWriter:
    """Finds or makes the rows of blobs and base models in an open transaction."""

    def __init__(self, session: Session, blobs: BlobStore, spare: Spare = no_spare) -> None:
        """Begin to write.

        Args:
            session: with the write lock.
            blobs: the files.
            spare: where the bytes are of files that are gone when their rows are to be made.
        """
        self.session = session
        self.now = utc_now()
        self._files, self._spare = blobs, spare
        self._blobs: dict[str, Blob | None] = {}  # None: looked for, has no row yet
        self._base_models: dict[str, BaseModel] = {}

    def blob(self, digest: str) -> Blob:
        """Return the row of a blob.

        The file is looked for under the write lock, so no row is ever committed whose bytes another process has
        removed. It may have had the very same bytes, and dropped them since they were put; then they are put again,
        where they are spare. While this holds the lock nobody drops them.

        Raises:
            MissingBlob: there is no such file, and no spare.
            StoreFull: no space left for them.
        """
        if not self._files.exists(digest) and (data := self._spare(digest)) is not None:
            self._files.put([data])
        row = self.absent_blob(digest, size := self._files.size(digest))
        row.size = size  # a bundle may have said something else of bytes that were not here
        return row

    def absent_blob(self, digest: str, size: int) -> Blob:
        """Return the row of a blob that this store need not hold, because only evicted adapters refer to it."""
        if digest not in self._blobs:
            self.load_blobs([digest])
        row = self._blobs[digest]
        if row is None:
            row = self._blobs[digest] = Blob(digest=digest, size=size)
            self.session.add(row)
        return row

    def load_blobs(self, digests: Iterable[str]) -> None:
        """Fetch the rows of many blobs in few queries, before :meth:`blob` is called for each."""
        wanted = sorted(set(digests) - self._blobs.keys())
        for at in range(0, len(wanted), MAX_VARIABLES):
            some = wanted[at : at + MAX_VARIABLES]
            self._blobs |= dict.fromkeys(some)
            query = select(Blob).where(Blob.digest.in_(some))
            self._blobs |= {row.digest: row for row in self.session.scalars(query)}

    def base_model(self, name: str) -> BaseModel:
        """Return the row of a base model."""
        if name not in self._base_models:
            row = self.session.scalar(select(BaseModel).where(BaseModel.name == name))
            self._base_models[name] = row or BaseModel(name=name)
            self.session.add(self._base_models[name])
        return self._base_models[name]


def named_blob(session: Session, digest: str) -> Blob:
    """Find or make the row of a blob that is only named, in an open transaction: its length is not known here."""
    row = session.scalar(select(Blob).where(Blob.digest == digest))
    if row is None:
        row = Blob(digest=digest, size=0)
        session.add(row)
        session.flush()
    return row


def document_row(session: Session, body: object) -> Document:
    """Find or make the row of a JSON value in an open transaction."""
    digest = document_digest(body)
    row = session.scalar(select(Document).where(Document.digest == digest))
    if row is None:
        row = Document(digest=digest, body=body)
        session.add(row)
        session.flush()
    return row


def document_digest(body: object) -> str:
    """Return what a JSON value is known by."""
    return hashlib.sha256(compact_json(body).encode()).hexdigest()


def utc_now() -> str:
    """Return the present time as RFC 3339 in UTC, to the second."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
