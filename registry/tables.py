"""The tables, the same in SQLite and PostgreSQL.

    refs       kind and name -> digest of the current manifest, and columns that listings filter and sort by
    history    kind, name and version -> digest of its manifest, including the current version
    meta       one row: the store's identity, the address of its blobs, the number of changes

Columns of `refs` after `manifest` are derived from the manifest by :func:`index_of`, and used only for listings.
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
FORMAT = 1
"""The version of tables and manifests. A store with another number is refused."""


REPAIR_HINT = "run `icm verify --repair` to rebuild the database from the manifests"


class UnreadableValue(DamagedStore):
    """A column has a value of the wrong type."""

    def __init__(self, fact: str) -> None:
        super().__init__(f"the database is damaged: {fact}", hint=REPAIR_HINT)


class Digest(TypeDecorator[str]):
    """A hexadecimal SHA-256, or a part of one, stored as bytes."""

    impl = LargeBinary
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Dialect) -> bytes | None:
        """Return the stored bytes (SQLAlchemy's hook)."""
        return None if value is None else bytes.fromhex(value)

    def process_result_value(self, value: bytes | None, dialect: Dialect) -> str | None:
        """Return the value (SQLAlchemy's hook)."""
        if not isinstance(value, bytes | None):
            raise UnreadableValue(f"not a digest: {str(value)[:80]!r}")
        return None if value is None else value.hex()


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
    targets: str  # module names, separated by spaces
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
    claim: str | None  # JSON of the quality that a bundle claims
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
        """Return a row from the database; raise `UnreadableValue` if a value has the wrong type."""
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
    Column("key", _KEY, primary_key=True),  # the name for comparison; of a task, in lower case
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
    Column("changes", _NUMBER, nullable=False),  # number of write transactions; servers of tasks watch it
    Column("seq", _NUMBER, nullable=False, default=0),  # the highest `State.seq` so far
)


def key_of(kind: str, name: str) -> str:
    """Return a name for comparison: tasks composed (NFC) and regardless of case, base models exactly."""
    if kind != Task.KIND:
        return name
    return (name if name.isascii() else unicodedata.normalize("NFC", name)).lower()


def index_of(state: State, manifest: str) -> dict[str, Any]:
    """Return the row of `refs` for a state, derived from its manifest."""
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


def version_of(state: State, manifest: str, files: bytes) -> dict[str, Any]:
    """Return the row of `history` for a state; `files` are the `packed_files` of its manifest."""
    key = key_of(state.KIND, state.ref)
    return {"kind": state.KIND, "key": key, "version": state.number, "manifest": manifest, "files": files}


def packed_files(body: Any) -> bytes:
    """Return the files that the JSON of a manifest needs, so that `usage` reads no manifest.

    Nine bytes per file: its use, and the start of its digest.
    """
    uses: dict[bytes, int] = {}
    for use, file in files_of(body):
        start, number = start_of(file), USES.index(use)
        uses[start] = min(number, uses.get(start, number))
    return b"".join(bytes([number]) + start for start, number in sorted(uses.items()))


def unpacked_files(files: bytes) -> Iterator[tuple[str, bytes]]:
    """Yield use and digest start of each file in `packed_files`; raise `UnreadableValue` if these are invalid."""
    try:
        for number, start in struct.iter_unpack(f"B{_START}s", files):
            yield USES[number], start
    except (IndexError, struct.error, TypeError) as error:
        raise UnreadableValue("the files of a version cannot be read") from error


def start_of(digest: str) -> bytes:
    """Return the start of a digest, as in `packed_files`."""
    return bytes.fromhex(digest[: 2 * _START])


def _text(part: Any) -> str:
    return json.dumps(written(part), sort_keys=True, separators=(",", ":"))
