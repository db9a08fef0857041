"""The tables, as SQLAlchemy classes. These are those of schema 10.

    base_models 1─n tasks 1─n adapters 1─n extras
         ├──n base_labels
         │            ├──n task_vectors
         │            ├──n codes n─1 generators
         │            └──n evaluations
         ├──n generators      blobs: the files that rows refer to
         └──n train_runs      documents: JSON values that many rows share, stored once
                 └──n run_codes

A new store gets these tables. A change of them is a new schema: `registry.storage.migrations` moves older stores
forward to it. Each table ends with a check of the row: see `registry.row_checks`.

Every task pays for its rows, so values are stored small. PostgreSQL has the same columns with the same values:

    in Python                   in SQLite
    64 hexadecimal digits       DIGEST   32 bytes; also of a part of a digest
    RFC 3339, UTC, seconds      MOMENT   seconds since 1970
    one of a few words          choice   its place among them
    words without spaces        WORDS    the words with a space between two; none of them is NULL
    a measured number           figure   itself, or nothing if it is out of its range
    a JSON value                PACKED   its text, deflated: a layout names every module of a model
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, ClassVar

from sqlalchemy import (
    BigInteger,
    ColumnClause,
    ColumnElement,
    Double,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    String,
    UniqueConstraint,
    and_,
    case,
    column,
    false,
    func,
    literal_column,
    text,
)
from sqlalchemy import cast as sql_cast
from sqlalchemy.engine import Dialect
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.orm import DeclarativeBase, Mapped, declared_attr, mapped_column, relationship
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.functions import FunctionElement, GenericFunction
from sqlalchemy.types import TypeDecorator, TypeEngine

from registry import values
from registry.names import LOAD_IN, folded
from registry.row_checks import COLUMN, Value, checked, is_known_by_a_number, passed
from registry.values import Form


class Stored(TypeDecorator[Any]):
    """A column that stores a value in another form.

    Args:
        form: Value -> what is stored, and back.
        kind: What that is in SQLite.
    """

    impl: TypeEngine[Any] | type[TypeEngine[Any]] = LargeBinary
    cache_ok = True

    def __init__(self, form: Form, kind: TypeEngine[Any]) -> None:
        super().__init__()
        self.impl = kind
        # Under their own names: SQLAlchemy tells columns apart by them.
        self.form, self.kind = form, kind

    def process_bind_param(self, value: Any, dialect: Dialect) -> Any:
        """Turn a value into what is stored (SQLAlchemy's hook)."""
        return None if value is None else self.form.pack(value)

    def process_result_value(self, value: Any, dialect: Dialect) -> Any:
        """Turn what is stored into the value (SQLAlchemy's hook)."""
        return self.form.read(value)


class NoCase(TypeDecorator[str]):
    """A text that is compared without regard to the case of ASCII letters."""

    impl: TypeEngine[Any] | type[TypeEngine[Any]] = String
    cache_ok = True

    def __init__(self, kind: TypeEngine[Any]) -> None:
        super().__init__()
        self.impl = self.kind = kind

    class Comparator(TypeDecorator.Comparator[str]):
        """Compares what `in_any_case` makes of the column (SQLAlchemy's hook)."""

        def operate(self, op: Any, *other: Any, **options: Any) -> Any:
            """Compare."""
            return op(in_any_case(self.expr), *other, **options)

    comparator_factory = Comparator


class _Folded(TypeDecorator[str]):
    """What a text without case is compared with."""

    impl = String
    cache_ok = True

    def bind_processor(self, dialect: Dialect) -> Callable[[str | None], str | None] | None:
        """Fold the case of ASCII letters, which SQLite does by itself (SQLAlchemy's hook)."""
        return None if dialect.name == "sqlite" else lambda text_: text_ and folded(text_)


class in_any_case(FunctionElement[str]):  # noqa: N801  # as SQLAlchemy's functions are named
    """A text as it is compared, and ordered by: in SQLite the column itself, whose collation does it."""

    inherit_cache = True
    type = _Folded()


@compiles(in_any_case)
def _itself(function: in_any_case, compiler: SQLCompiler, **options: Any) -> str:
    return compiler.process(function.clauses, **options)


@compiles(in_any_case, "postgresql")
def _lower(function: in_any_case, compiler: SQLCompiler, **options: Any) -> str:
    """Fold: the collation of the column knows ASCII letters only."""
    return f"lower({compiler.process(function.clauses, **options)})"


class RowCheck(TypeDecorator[int]):
    """The column of the check value. Selecting it checks the row: one that fails raises `WrongRow`."""

    impl = Integer
    cache_ok = True

    def __init__(self, table: str) -> None:
        """Name the table that the column is in."""
        super().__init__()
        self.table = table

    def column_expression(self, column: ColumnElement[int]) -> ColumnElement[int]:
        """Select what the check says instead of the value (SQLAlchemy's hook)."""
        owner: Any = column.table
        others = [other for other in owner.c if other.name != COLUMN]
        said = func.icm_checked(column, literal_column(f"'{self.table}'"), *others, type_=self)
        if not is_known_by_a_number(self.table):
            return said
        # Most outer joins find no row. A number that is the key is the row's place: no flip makes it NULL.
        return case((owner.c.id.is_(None), None), else_=said)

    def result_processor(self, dialect: Dialect, coltype: object) -> Callable[[Any], int | None]:
        """Raise if the row failed (SQLAlchemy's hook that costs least: it is called for every row)."""
        return passed if dialect.name == "sqlite" else _passed_as_texts


class icm_checked(GenericFunction[Any]):  # noqa: N801  # SQLite's function has this name
    """The check of a row: SQLite calls `registry.row_checks` for it, from others the row comes as texts."""

    inherit_cache = True


@compiles(icm_checked, "postgresql")
def _as_texts(function: icm_checked, compiler: SQLCompiler, **options: Any) -> str:
    """Select all values of a row, for `_passed_as_texts`; a row of this transaction may be without a check yet."""
    from sqlalchemy.dialects.postgresql import array  # takes time, and SQLite needs none of it

    check, table, *others = function.clauses
    written_by: ColumnClause[Any] = column("xmin")
    written_by.table = others[0].table
    is_new = and_(check.is_(None), written_by == text("pg_current_xact_id_if_assigned()::xid"))
    known = case((is_new, NEW_ROW), else_=sql_cast(check, String))
    whole: Any = array([known, table, *map(as_text, others)])
    return compiler.process(whole, **options)


def as_text(value: ColumnElement[Any]) -> ColumnElement[str]:
    """Return a value of PostgreSQL as text, from which `value_of` reads what SQLite would store."""
    kind = stored_as(value.type)
    if kind is bytes:
        return func.encode(value, "hex", type_=String)
    return sql_cast(sql_cast(value, Integer) if kind is bool else value, String)


def value_of(text_: str | None, kind: type) -> Value:
    """Return what SQLite stores for a value that `as_text` has made."""
    if text_ is None:
        return None
    return bytes.fromhex(text_) if kind is bytes else (int if kind is bool else kind)(text_)


def stored_as(kind: TypeEngine[Any]) -> type:
    """Return the Python type of what a column stores."""
    return (kind.kind if isinstance(kind, (Stored, NoCase)) else kind).python_type


NEW_ROW = "new"
"""Stands for the check of a row that was written in this transaction, and gets it before the commit."""


@lru_cache
def _kinds_of(table: str) -> tuple[type, ...]:
    return tuple(stored_as(other.type) for other in Base.metadata.tables[table].c if other.name != COLUMN)


def row_of(texts: Sequence[str | None]) -> tuple[str, list[Value]]:
    """Return the table and the values of a row that comes as texts: its check, its table, and all other columns."""
    table = str(texts[1])
    return table, list(map(value_of, texts[2:], _kinds_of(table)))


def _passed_as_texts(texts: Sequence[str | None] | None) -> int | None:
    """Return the check of a row that comes as texts, or None if it has none yet; raise `WrongRow` if it fails."""
    if texts is None or texts[0] == NEW_ROW:
        return None
    table, row = row_of(texts)
    return passed(checked(None if texts[0] is None else int(texts[0]), table, *row))


def choice(*words: str) -> Stored:
    """Return a column of one of a few words; their order is part of the schema."""
    return Stored(values.choice(*words), Integer())


def _where(condition: str) -> dict[str, Any]:
    """Return the options of an index that has only the rows for which a condition holds."""
    return {"sqlite_where": text(condition), "postgresql_where": text(condition)}


# SQLite's integers have as many bytes as they need.
NUMBER = BigInteger().with_variant(Integer(), "sqlite")
_NAME = NoCase(String(collation="NOCASE").with_variant(String(collation="C"), "postgresql"))
DIGEST = Stored(values.DIGEST, LargeBinary())
MOMENT = Stored(values.MOMENT, NUMBER)
PACKED = Stored(values.PACKED, LargeBinary())
WORDS = Stored(values.WORDS, String())
SQUARED_ERROR = Stored(values.SQUARED_ERROR, Double())
SHARE = Stored(values.SHARE, Double())
_GONE_WITH_PARENT = "CASCADE"
_LAST = 1000  # among the columns of a table


class Base(DeclarativeBase):
    """Declarative base of all tables."""

    type_annotation_map: ClassVar[dict[Any, Any]] = {Any: PACKED, int: NUMBER}

    @declared_attr
    def crc(cls) -> Mapped[int | None]:  # noqa: N805  # SQLAlchemy hands it the class
        """The check of the row, which triggers write; to load a row is to check it."""
        return mapped_column(RowCheck(cls.__tablename__), sort_order=_LAST)


class Blob(Base):
    """A file of the blob store that rows refer to."""

    __tablename__ = "blobs"

    id: Mapped[int] = mapped_column(primary_key=True)
    digest: Mapped[str] = mapped_column(DIGEST, unique=True)
    size: Mapped[int]


class Document(Base):
    """A JSON value stored once, however many rows share it (descriptions of adapters, extractors, settings)."""

    __tablename__ = "documents"

    id: Mapped[int] = mapped_column(primary_key=True)
    digest: Mapped[str] = mapped_column(DIGEST, unique=True)
    body: Mapped[Any]


class BaseModel(Base):
    """A base model, known by the label that adapters give it."""

    __tablename__ = "base_models"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(unique=True)
    fingerprint: Mapped[str | None]
    path: Mapped[str | None]
    shape: Mapped[Any | None]
    # MODULE:FUNCTION of what loads the files at `path`, where icm cannot by itself.
    loader: Mapped[str | None]
    # The few bits that its weights are loaded in; NULL for what the device suits.
    load_in: Mapped[str | None] = mapped_column(choice(*LOAD_IN))


class BaseLabel(Base):
    """Another name of a base model: a mirror, a local path, a revision."""

    __tablename__ = "base_labels"

    id: Mapped[int] = mapped_column(primary_key=True)
    label: Mapped[str] = mapped_column(unique=True)
    base_model_id: Mapped[int] = mapped_column(ForeignKey("base_models.id"))
    reason: Mapped[str] = mapped_column(choice("told", "fingerprint", "mirror"))
    path: Mapped[str | None]  # that `icm base add` had set when the label was a base model of its own

    base_model: Mapped[BaseModel] = relationship(lazy="joined", innerjoin=True)


class Task(Base):
    """A task: what its adapters were trained for."""

    __tablename__ = "tasks"

    id: Mapped[int] = mapped_column(primary_key=True)
    # Files of tasks must not collide where file systems ignore case.
    name: Mapped[str] = mapped_column(_NAME, unique=True)
    base_model_id: Mapped[int] = mapped_column(ForeignKey("base_models.id"))
    samples_id: Mapped[int | None] = mapped_column(ForeignKey("blobs.id"))
    eval_id: Mapped[int | None] = mapped_column(ForeignKey("blobs.id"))
    created_at: Mapped[str] = mapped_column(MOMENT)
    pinned: Mapped[bool] = mapped_column(server_default=false())
    folder: Mapped[str]
    note: Mapped[str | None]
    tags: Mapped[tuple[str, ...]] = mapped_column(WORDS, nullable=True)
    # The label by which its adapters name the base model; NULL for the base model's own name.
    label_id: Mapped[int | None] = mapped_column(ForeignKey("base_labels.id"))

    # SQLite compares the column without case.
    __table_args__ = (Index("one_task_per_name", text("lower(name)"), unique=True).ddl_if(dialect="postgresql"),)

    base_model: Mapped[BaseModel] = relationship(lazy="joined", innerjoin=True)
    samples: Mapped[Blob | None] = relationship(lazy="joined", foreign_keys=[samples_id])
    eval_data: Mapped[Blob | None] = relationship(lazy="joined", foreign_keys=[eval_id])


class Adapter(Base):
    """One adapter of a task: the final one or a training checkpoint. An evicted one has a row but no weights file."""

    __tablename__ = "adapters"

    id: Mapped[int] = mapped_column(primary_key=True)
    task_id: Mapped[int] = mapped_column(ForeignKey("tasks.id", ondelete=_GONE_WITH_PARENT))
    step: Mapped[int | None]
    is_final: Mapped[bool]
    weights_id: Mapped[int] = mapped_column(ForeignKey("blobs.id"))
    config_id: Mapped[int] = mapped_column(ForeignKey("blobs.id"))
    card_id: Mapped[int | None] = mapped_column(ForeignKey("blobs.id"))
    description_id: Mapped[int] = mapped_column(ForeignKey("documents.id"))
    source: Mapped[str | None]
    created_at: Mapped[str] = mapped_column(MOMENT)
    evicted_at: Mapped[str | None] = mapped_column(MOMENT)
    is_generated: Mapped[bool] = mapped_column(server_default=false())
    initial_id: Mapped[int | None] = mapped_column(ForeignKey("blobs.id"))
    # A hash of its tensors, whatever else their file says; NULL for one that came in a bundle.
    tensors_key: Mapped[str | None] = mapped_column(DIGEST)
    # Kept by a trigger: an extra that got lost, or came from another adapter, is seen.
    extra_count: Mapped[int] = mapped_column(server_default=text("0"))

    task: Mapped[Task] = relationship(lazy="joined", innerjoin=True)
    extras: Mapped[list[Extra]] = relationship(lazy="selectin")
    weights: Mapped[Blob] = relationship(lazy="joined", innerjoin=True, foreign_keys=[weights_id])
    config: Mapped[Blob] = relationship(lazy="joined", innerjoin=True, foreign_keys=[config_id])
    card: Mapped[Blob | None] = relationship(lazy="joined", foreign_keys=[card_id])
    initial: Mapped[Blob | None] = relationship(lazy="joined", foreign_keys=[initial_id])
    description: Mapped[Document] = relationship(lazy="joined", innerjoin=True)

    __table_args__ = (
        # A plain unique constraint would let two rows without a step pass: NULLs are distinct.
        Index("one_row_per_adapter", "task_id", "weights_id", "config_id", text("coalesce(step, -1)"), unique=True),
        Index("one_final_adapter", "task_id", unique=True, **_where("is_final")),
    )


class Extra(Base):
    """What a code of an adapter cannot represent and is kept as it is: a file next to it, or some of its tensors."""

    __tablename__ = "extras"

    adapter_id: Mapped[int] = mapped_column(ForeignKey("adapters.id", ondelete=_GONE_WITH_PARENT), primary_key=True)
    file: Mapped[str] = mapped_column(primary_key=True)  # its name; empty for tensors, which name themselves
    blob_id: Mapped[int] = mapped_column(ForeignKey("blobs.id"), primary_key=True)
    size: Mapped[int]  # before packing

    blob: Mapped[Blob] = relationship(lazy="joined", innerjoin=True)

    __table_args__ = ({"sqlite_with_rowid": False},)


class TaskVector(Base):
    """One task vector: a view of one support set. The vectors of a task mostly share a file; `id` counts them all."""

    __tablename__ = "task_vectors"

    task_id: Mapped[int] = mapped_column(ForeignKey("tasks.id", ondelete=_GONE_WITH_PARENT), primary_key=True)
    view: Mapped[str] = mapped_column(choice(*values.VIEWS), primary_key=True)
    support_set: Mapped[int] = mapped_column(primary_key=True)
    extractor_id: Mapped[int] = mapped_column(ForeignKey("documents.id"), primary_key=True)
    id: Mapped[int]
    blob_id: Mapped[int] = mapped_column(ForeignKey("blobs.id"))
    dim: Mapped[int]

    task: Mapped[Task] = relationship(lazy="joined", innerjoin=True)
    extractor: Mapped[Document] = relationship(lazy="joined", innerjoin=True)
    blob: Mapped[Blob] = relationship(lazy="joined", innerjoin=True)

    # The key is most of the row: with rowids, an index would hold all of it once more.
    __table_args__ = ({"sqlite_with_rowid": False},)


class Generator(Base):
    """One version of a base model's generator."""

    __tablename__ = "generators"

    id: Mapped[int] = mapped_column(primary_key=True)
    base_model_id: Mapped[int] = mapped_column(ForeignKey("base_models.id"))
    version: Mapped[int]
    # A forgotten parent leaves its successors as they are.
    parent_id: Mapped[int | None] = mapped_column(ForeignKey("generators.id", ondelete="SET NULL"))
    blob_id: Mapped[int] = mapped_column(ForeignKey("blobs.id"))
    config: Mapped[Any]
    metrics: Mapped[Any]
    is_current: Mapped[bool]
    created_at: Mapped[str] = mapped_column(MOMENT)
    start_id: Mapped[int | None] = mapped_column(ForeignKey("blobs.id"))

    base_model: Mapped[BaseModel] = relationship(lazy="joined", innerjoin=True)
    parent: Mapped[Generator | None] = relationship(remote_side=[id])
    blob: Mapped[Blob] = relationship(lazy="joined", innerjoin=True, foreign_keys=[blob_id])
    start: Mapped[Blob | None] = relationship(lazy="joined", foreign_keys=[start_id])

    __table_args__ = (
        UniqueConstraint("base_model_id", "version"),
        Index("one_current_generator", "base_model_id", unique=True, **_where("is_current")),
    )


class TrainRun(Base):
    """A training run with its latest checkpoint."""

    __tablename__ = "train_runs"

    id: Mapped[int] = mapped_column(primary_key=True)
    base_model_id: Mapped[int] = mapped_column(ForeignKey("base_models.id"))
    state: Mapped[str]
    config: Mapped[Any]
    step: Mapped[int]
    weights_id: Mapped[int | None] = mapped_column(ForeignKey("blobs.id"))
    optimizer_id: Mapped[int | None] = mapped_column(ForeignKey("blobs.id"))
    created_at: Mapped[str] = mapped_column(MOMENT)
    updated_at: Mapped[str] = mapped_column(MOMENT)

    base_model: Mapped[BaseModel] = relationship(lazy="joined", innerjoin=True)
    weights: Mapped[Blob | None] = relationship(lazy="joined", foreign_keys=[weights_id])
    optimizer: Mapped[Blob | None] = relationship(lazy="joined", foreign_keys=[optimizer_id])

    __table_args__ = (Index("one_running_train_run", "base_model_id", unique=True, **_where("state = 'running'")),)


class RunCode(Base):
    """A code of the network that a run has trained, while the run is not done: a stop loses none that is recorded."""

    __tablename__ = "run_codes"

    run_id: Mapped[int] = mapped_column(ForeignKey("train_runs.id", ondelete=_GONE_WITH_PARENT), primary_key=True)
    adapter_id: Mapped[int] = mapped_column(ForeignKey("adapters.id", ondelete=_GONE_WITH_PARENT), primary_key=True)
    blob_id: Mapped[int] = mapped_column(ForeignKey("blobs.id"))
    generator: Mapped[str] = mapped_column(DIGEST)  # of the file that the network would be published as
    squared_error: Mapped[float]
    initial_is_known: Mapped[bool]

    blob: Mapped[Blob] = relationship(lazy="joined", innerjoin=True)


class Code(Base):
    """The code of one adapter under one generator, with its residual and the limits that the two were made for."""

    __tablename__ = "codes"

    id: Mapped[int] = mapped_column(primary_key=True)
    task_id: Mapped[int] = mapped_column(ForeignKey("tasks.id", ondelete=_GONE_WITH_PARENT))
    generator_id: Mapped[int] = mapped_column(ForeignKey("generators.id", ondelete=_GONE_WITH_PARENT))
    adapter_id: Mapped[int] = mapped_column(ForeignKey("adapters.id", ondelete=_GONE_WITH_PARENT))
    blob_id: Mapped[int] = mapped_column(ForeignKey("blobs.id"))
    bits: Mapped[float]
    squared_error: Mapped[float | None] = mapped_column("dw_error", SQUARED_ERROR)
    residual_id: Mapped[int | None] = mapped_column(ForeignKey("blobs.id"))
    residual_squared_error: Mapped[float | None] = mapped_column("residual_error", SQUARED_ERROR)
    min_gain: Mapped[float | None]
    max_squared_error: Mapped[float | None] = mapped_column("max_error")
    tolerance: Mapped[float | None]
    is_kept: Mapped[bool | None]
    refined: Mapped[int | None]
    max_size: Mapped[int | None]
    # What the bundle that it came in says of it; NULL for a code that was made here.
    claim: Mapped[Any] = mapped_column(PACKED, nullable=True)
    keep: Mapped[float | None]
    # Measured when the code was made, without its residual.
    effect: Mapped[float | None] = mapped_column(SHARE)

    task: Mapped[Task] = relationship(lazy="joined", innerjoin=True)
    blob: Mapped[Blob] = relationship(lazy="joined", innerjoin=True, foreign_keys=[blob_id])
    residual: Mapped[Blob | None] = relationship(lazy="joined", foreign_keys=[residual_id])

    __table_args__ = (UniqueConstraint("task_id", "generator_id"),)


class Evaluation(Base):
    """How well one source of one task does on some held-out texts, which need not be in the store."""

    __tablename__ = "evaluations"

    id: Mapped[int] = mapped_column(primary_key=True)
    task_id: Mapped[int] = mapped_column(ForeignKey("tasks.id", ondelete=_GONE_WITH_PARENT))
    rung: Mapped[str] = mapped_column(choice(*values.RUNGS))
    generator_id: Mapped[int | None] = mapped_column(ForeignKey("generators.id", ondelete=_GONE_WITH_PARENT))
    data_id: Mapped[int] = mapped_column(ForeignKey("blobs.id"))
    # Metrics other than the loss are named in `score`.
    kind: Mapped[str] = mapped_column("metric", choice("nll", "other"))
    value: Mapped[float] = mapped_column("nats_per_token")
    count: Mapped[int] = mapped_column("tokens")
    utf8_bytes: Mapped[int]
    retained_gain: Mapped[float | None] = mapped_column(SHARE)
    squared_error: Mapped[float | None] = mapped_column("dw_error", SQUARED_ERROR)
    settings_id: Mapped[int] = mapped_column(ForeignKey("documents.id"))
    created_at: Mapped[str] = mapped_column(MOMENT)
    # The metric's name and further figures; NULL for the loss of a language model.
    score: Mapped[Any] = mapped_column(PACKED, nullable=True)
    # The few bits that the base model was loaded in, as `settings` has it too; NULL for full precision.
    load_in: Mapped[str | None] = mapped_column(choice(*LOAD_IN))

    task: Mapped[Task] = relationship(lazy="joined", innerjoin=True)
    data: Mapped[Blob] = relationship(lazy="joined", innerjoin=True)
    settings: Mapped[Document] = relationship(lazy="joined", innerjoin=True)

    __table_args__ = (
        Index(
            "one_row_per_evaluation",
            *("task_id", "rung", text("coalesce(generator_id, -1)"), "data_id", "metric"),
            text("coalesce(load_in, -1)"),
            unique=True,
        ),
    )
