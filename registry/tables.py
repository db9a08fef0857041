"""The tables, the same in SQLite and PostgreSQL.

    refs       kind and name -> digest of the current manifest, and columns that listings filter and sort by
    history    kind, name and version -> digest of the manifest of that version; the current version too
    meta       one row: which store this is, where its blobs are, how often it changed

Columns of `refs` after `manifest` follow from the manifest by :func:`index_of`. They decide nothing but listings.
"""

from __future__ import annotations

import json
import struct
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from sqlalchemy import BigInteger, Boolean, Column, Double, Index, Integer, LargeBinary, MetaData, String, Table, Text
from sqlalchemy.engine import Dialect
from sqlalchemy.types import TypeDecorator

from registry.encoding import USES, files_of, written
from registry.errors import DamagedStore
from registry.manifests import State, Task
from registry.names import folder_of

_START = 8
_SHA256_BYTES, _TENSORS_KEY_BYTES = 32, 8
FORMAT = 1
"""Of the tables and the manifests. A store with another number is refused."""


REPAIR_HINT = "run `icm verify --repair` to rebuild the database from the manifests"


class UnreadableValue(DamagedStore):
    """A column has a value of another type than it was written with."""

    def __init__(self, fact: str) -> None:
        super().__init__(f"the database is damaged: {fact}", hint=REPAIR_HINT)


class Digest(TypeDecorator[str]):
    """Hexadecimal digits, of a SHA-256 or of a part of one, as bytes."""

    impl = LargeBinary
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Dialect) -> bytes | None:
        """Return the stored value (SQLAlchemy's hook)."""
        return None if value is None else bytes.fromhex(value)

    def process_result_value(self, value: bytes | None, dialect: Dialect) -> str | None:
        """Return the value (SQLAlchemy's hook)."""
        if value is None:
            return None
        if not isinstance(value, bytes) or len(value) not in (_SHA256_BYTES, _TENSORS_KEY_BYTES):
            raise UnreadableValue(f"not a digest: {str(value)[:80]!r}")
        return value.hex()


# Ordered by code points in both databases.
_KEY = Text().with_variant(Text(collation="C"), "postgresql")
_NUMBER = BigInteger().with_variant(Integer(), "sqlite")
METADATA = MetaData()


_PYTHON: Mapping[str, Any] = {"int": int, "float": float, "bool": bool, "str": str, "None": type(None)}


@dataclass(frozen=True, slots=True)
class TaskRow:
    """A task as listings show it, without reading its manifest."""

    name: str
    manifest: str
    version: int
    base: str
    rank: int
    dtype: str
    parameters: int
    targets: str  # module names with spaces between
    format: str
    original_bytes: int
    stored_bytes: int
    extras_bytes: int
    checkpoints: int  # whose weights are in the store
    evicted_checkpoints: int
    vectors: int
    vectors_bytes: int
    evicted_at: str | None
    original_only: str | None  # why it cannot have a code
    does_nothing: bool
    is_generated: bool
    pinned: bool
    code_size: int | None
    generator: str | None  # digest of the network of the code
    squared_error: float | None
    effect: float | None
    limits: str | None  # JSON of the limits that the code was made for
    gain: float | None
    gain_precision: str | None
    claim: str | None  # JSON of the quality that a bundle states
    tags: str  # with a space on either side of each
    note: str | None
    source: str
    folder: str
    weights: str
    tensors_key: str | None
    created_at: str

    @property
    def is_coded(self) -> bool:
        """Whether it has a code."""
        return self.code_size is not None

    @property
    def statuses(self) -> tuple[str, ...]:
        """The words that `status=` filters by."""
        states = {
            "evicted": self.evicted_at is not None,
            "pinned": self.pinned,
            "coded": self.is_coded,
            "original-only": self.original_only is not None,
            "does-nothing": self.does_nothing,
            "generated": self.is_generated,
        }
        return tuple(word for word, holds in states.items() if holds)

    @classmethod
    def of(cls, values: Sequence[Any]) -> TaskRow:
        """Return a row that was read; raise `UnreadableValue` if a value has another type than it was written with."""
        for value, (name, kinds) in zip(values, _TYPES, strict=True):
            if not isinstance(value, kinds):
                raise UnreadableValue(f"{name} of task {str(values[0])[:80]!r} is {str(value)[:80]!r}")
        return cls(*values)


_TYPES = tuple((one.name, tuple(_PYTHON[part] for part in str(one.type).split(" | "))) for one in fields(TaskRow))
_KINDS: Mapping[str, Any] = {"int": _NUMBER, "float": Double(), "bool": Boolean(), "str": Text()}
_DIGESTS = {"manifest", "generator", "weights", "tensors_key"}


def _column(name: str, kind: str) -> Column[Any]:
    if name in _DIGESTS:
        return Column(name, Digest())
    return Column(name, _KINDS[kind.removesuffix(" | None")])


REFS = Table(
    "refs",
    METADATA,
    Column("kind", String, primary_key=True),
    Column("key", _KEY, primary_key=True),  # the name as it is compared: of a task, in lower case
    *(_column(one.name, str(one.type)) for one in fields(TaskRow)),
    Index("refs_base", "base", "kind", "key"),
    Index("refs_weights", "weights"),
    Index("refs_tensors", "tensors_key"),
    Index("refs_folder", "folder"),
)
HISTORY = Table(
    "history",
    METADATA,
    Column("kind", String, primary_key=True),
    Column("key", _KEY, primary_key=True),
    Column("version", Integer, primary_key=True),
    Column("manifest", Digest(), nullable=False),
    Column("files", LargeBinary, nullable=False),  # of `packed_files`
    sqlite_with_rowid=False,
)
META = Table(
    "meta",
    METADATA,
    Column("store", String, primary_key=True),
    Column("format", Integer, nullable=False),
    Column("blobs", Text),  # the address of the blobs; NULL if they are in the store folder
    Column("changes", _NUMBER, nullable=False),  # transactions that wrote: who serves tasks looks at it
    Column("seq", _NUMBER, nullable=False, default=0),  # the highest `State.seq` so far
)


def key_of(kind: str, name: str) -> str:
    """Return a name as it is compared: tasks composed (NFC) and regardless of case, base models exactly."""
    if kind != Task.KIND:
        return name
    return (name if name.isascii() else unicodedata.normalize("NFC", name)).lower()


def index_of(state: State, manifest: str) -> dict[str, Any]:
    """Return the row of `refs` for a state: everything in it follows from the manifest."""
    row: dict[str, Any] = dict.fromkeys(REFS.columns.keys())
    row |= {"kind": state.KIND, "key": key_of(state.KIND, state.ref), "name": state.ref}
    row |= {"manifest": manifest, "version": state.number}
    if not isinstance(state, Task):
        return {**row, "base": state.ref}
    final, code, quality = state.final, state.code, state.quality
    evicted = sum(one.is_evicted for one in state.checkpoints)
    return row | {
        "base": state.base_model,
        "rank": final.rank_max,
        "dtype": final.dtype,
        "parameters": final.parameters,
        "targets": " ".join(final.target_modules),
        "format": final.format,
        "original_bytes": final.original_bytes,
        "stored_bytes": final.stored_bytes,
        "extras_bytes": final.extras_bytes,
        "checkpoints": len(state.checkpoints) - evicted,
        "evicted_checkpoints": evicted,
        "vectors": len(state.vectors),
        "vectors_bytes": sum({str(one.blob): one.blob.size for one in state.vectors}.values()),
        "evicted_at": final.evicted_at,
        "original_only": state.not_encodable,
        "does_nothing": final.does_nothing,
        "is_generated": final.is_generated,
        "pinned": state.pinned,
        "code_size": None if code is None else code.size,
        "generator": None if code is None else str(code.generator),
        "squared_error": None if code is None else code.squared_error,
        "effect": None if code is None else code.effect,
        "limits": None if code is None or code.asked is None else _text(code.asked),
        "gain": None if quality is None else quality.retained_gain,
        "gain_precision": None if quality is None else quality.precision,
        "claim": None if code is None or code.claim is None else _text(code.claim),
        "tags": f" {' '.join(state.tags)} " if state.tags else "",
        "note": state.note,
        "source": final.source,
        "folder": folder_of(final.source),
        "weights": str(final.weights),
        "tensors_key": final.tensors_key,
        "created_at": state.created_at,
    }


def version_of(state: State, manifest: str, body: Any) -> dict[str, Any]:
    """Return the row of `history` for a state; `body` is the JSON of its manifest."""
    row = {"kind": state.KIND, "key": key_of(state.KIND, state.ref), "version": state.number, "manifest": manifest}
    return {**row, "files": packed_files(body)}


def packed_files(body: Any) -> bytes:
    """Return the files that the JSON of a manifest needs, so that the bill reads no manifest.

    Nine bytes per file: its first use, and the start of its digest.
    """
    files = sorted(((USES.index(use), start_of(file)) for use, file in files_of(body)), reverse=True)
    first = {start: number for number, start in files}
    return b"".join(bytes([number]) + start for start, number in sorted(first.items()))


def unpacked_files(files: bytes) -> Iterator[tuple[str, bytes]]:
    """Yield use and start of the digest of each file; raise `UnreadableValue` if these are not `packed_files`."""
    try:
        for number, start in struct.iter_unpack(f"B{_START}s", files):
            yield USES[number], start
    except (IndexError, struct.error, TypeError) as error:
        raise UnreadableValue("the files of a version cannot be read") from error


def start_of(digest: str) -> bytes:
    """Return the part of a digest that `packed_files` has."""
    return bytes.fromhex(digest[: 2 * _START])


def _text(part: Any) -> str:
    return json.dumps(written(part), sort_keys=True, separators=(",", ":"))
