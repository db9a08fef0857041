"""The tables of schema 1, as SQLAlchemy classes.

    base_models 1─n tasks 1─n adapters
         │            ├──n task_vectors
         │            ├──n codes n─1 generators
         │            └──n evaluations
         ├──n generators      blobs: the files that rows refer to
         └──n train_runs      documents: JSON values that many rows share, stored once

A new store gets these tables; `registry.database.MIGRATIONS` moves an older one forward to them.
"""

from __future__ import annotations

from typing import Any, ClassVar

from sqlalchemy import ForeignKey, Index, String, UniqueConstraint, text
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship

from registry.columns import Choice, Digest, Moment, Packed

_GONE_WITH_PARENT = "CASCADE"


class Base(DeclarativeBase):
    """Declarative base of all tables."""

    type_annotation_map: ClassVar[dict[Any, Any]] = {Any: Packed()}


class Blob(Base):
    """A file of the blob store that rows refer to."""

    __tablename__ = "blobs"

    id: Mapped[int] = mapped_column(primary_key=True)
    digest: Mapped[str] = mapped_column(Digest(), unique=True)
    size: Mapped[int]


class Document(Base):
    """A JSON value stored once, however many rows share it (descriptions of adapters, extractors, settings)."""

    __tablename__ = "documents"

    id: Mapped[int] = mapped_column(primary_key=True)
    digest: Mapped[str] = mapped_column(Digest(), unique=True)
    body: Mapped[Any]


class BaseModel(Base):
    """A base model, known by the label that adapters give it."""

    __tablename__ = "base_models"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(unique=True)
    fingerprint: Mapped[str | None]
    path: Mapped[str | None]
    shape: Mapped[Any | None]


class Task(Base):
    """A task: what its adapters were trained for."""

    __tablename__ = "tasks"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(collation="NOCASE"), unique=True)
    base_model_id: Mapped[int] = mapped_column(ForeignKey("base_models.id"))
    samples_id: Mapped[int | None] = mapped_column(ForeignKey("blobs.id"))
    eval_id: Mapped[int | None] = mapped_column(ForeignKey("blobs.id"))
    created_at: Mapped[str] = mapped_column(Moment())
    pinned: Mapped[bool] = mapped_column(server_default=text("0"))
    folder: Mapped[str]

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
    created_at: Mapped[str] = mapped_column(Moment())
    evicted_at: Mapped[str | None] = mapped_column(Moment())
    is_generated: Mapped[bool] = mapped_column(server_default=text("0"))

    task: Mapped[Task] = relationship(lazy="joined", innerjoin=True)
    weights: Mapped[Blob] = relationship(lazy="joined", innerjoin=True, foreign_keys=[weights_id])
    config: Mapped[Blob] = relationship(lazy="joined", innerjoin=True, foreign_keys=[config_id])
    card: Mapped[Blob | None] = relationship(lazy="joined", foreign_keys=[card_id])
    description: Mapped[Document] = relationship(lazy="joined", innerjoin=True)

    __table_args__ = (
        # A plain unique constraint would let two rows without a step pass: NULLs are distinct.
        Index("one_row_per_adapter", "task_id", "weights_id", "config_id", text("coalesce(step, -1)"), unique=True),
        Index("one_final_adapter", "task_id", unique=True, sqlite_where=text("is_final")),
    )


class TaskVector(Base):
    """One task vector: a view of one support set. The vectors of a task mostly share a file; `id` counts them all."""

    __tablename__ = "task_vectors"

    task_id: Mapped[int] = mapped_column(ForeignKey("tasks.id", ondelete=_GONE_WITH_PARENT), primary_key=True)
    view: Mapped[str] = mapped_column(Choice("adapted", "context"), primary_key=True)
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
    parent_id: Mapped[int | None] = mapped_column(ForeignKey("generators.id", ondelete="SET NULL"))
    blob_id: Mapped[int] = mapped_column(ForeignKey("blobs.id"))
    config: Mapped[Any]
    metrics: Mapped[Any]
    is_current: Mapped[bool]
    created_at: Mapped[str] = mapped_column(Moment())
    start_id: Mapped[int | None] = mapped_column(ForeignKey("blobs.id"))

    base_model: Mapped[BaseModel] = relationship(lazy="joined", innerjoin=True)
    parent: Mapped[Generator | None] = relationship(remote_side=[id])
    blob: Mapped[Blob] = relationship(lazy="joined", innerjoin=True, foreign_keys=[blob_id])
    start: Mapped[Blob | None] = relationship(lazy="joined", foreign_keys=[start_id])

    __table_args__ = (
        UniqueConstraint("base_model_id", "version"),
        Index("one_current_generator", "base_model_id", unique=True, sqlite_where=text("is_current")),
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
    created_at: Mapped[str] = mapped_column(Moment())
    updated_at: Mapped[str] = mapped_column(Moment())

    base_model: Mapped[BaseModel] = relationship(lazy="joined", innerjoin=True)
    weights: Mapped[Blob | None] = relationship(lazy="joined", foreign_keys=[weights_id])
    optimizer: Mapped[Blob | None] = relationship(lazy="joined", foreign_keys=[optimizer_id])

    __table_args__ = (
        Index("one_running_train_run", "base_model_id", unique=True, sqlite_where=text("state = 'running'")),
    )


class Code(Base):
    """The code of one adapter under one generator, with its residual and the limits that the two were made for."""

    __tablename__ = "codes"

    id: Mapped[int] = mapped_column(primary_key=True)
    task_id: Mapped[int] = mapped_column(ForeignKey("tasks.id", ondelete=_GONE_WITH_PARENT))
    generator_id: Mapped[int] = mapped_column(ForeignKey("generators.id", ondelete=_GONE_WITH_PARENT))
    adapter_id: Mapped[int] = mapped_column(ForeignKey("adapters.id", ondelete=_GONE_WITH_PARENT))
    blob_id: Mapped[int] = mapped_column(ForeignKey("blobs.id"))
    bits: Mapped[float]
    dw_error: Mapped[float | None]
    residual_id: Mapped[int | None] = mapped_column(ForeignKey("blobs.id"))
    residual_error: Mapped[float | None]
    min_gain: Mapped[float | None]
    max_error: Mapped[float | None]
    tolerance: Mapped[float | None]
    is_kept: Mapped[bool | None]
    refined: Mapped[int | None]

    task: Mapped[Task] = relationship(lazy="joined", innerjoin=True)
    blob: Mapped[Blob] = relationship(lazy="joined", innerjoin=True, foreign_keys=[blob_id])
    residual: Mapped[Blob | None] = relationship(lazy="joined", foreign_keys=[residual_id])

    __table_args__ = (UniqueConstraint("task_id", "generator_id"),)


class Evaluation(Base):
    """How well one source of one task does on some held-out texts, which need not be in the store."""

    __tablename__ = "evaluations"

    id: Mapped[int] = mapped_column(primary_key=True)
    task_id: Mapped[int] = mapped_column(ForeignKey("tasks.id", ondelete=_GONE_WITH_PARENT))
    rung: Mapped[str] = mapped_column(Choice("base", "code", "generate", "original", "residual"))
    generator_id: Mapped[int | None] = mapped_column(ForeignKey("generators.id", ondelete=_GONE_WITH_PARENT))
    data_id: Mapped[int] = mapped_column(ForeignKey("blobs.id"))
    metric: Mapped[str] = mapped_column(Choice("nll"))
    nats_per_token: Mapped[float]
    tokens: Mapped[int]
    utf8_bytes: Mapped[int]
    retained_gain: Mapped[float | None]
    dw_error: Mapped[float | None]
    settings_id: Mapped[int] = mapped_column(ForeignKey("documents.id"))
    created_at: Mapped[str] = mapped_column(Moment())

    task: Mapped[Task] = relationship(lazy="joined", innerjoin=True)
    data: Mapped[Blob] = relationship(lazy="joined", innerjoin=True)
    settings: Mapped[Document] = relationship(lazy="joined", innerjoin=True)

    __table_args__ = (
        Index(
            "one_row_per_evaluation",
            *("task_id", "rung", text("coalesce(generator_id, -1)"), "data_id", "metric"),
            unique=True,
        ),
    )
