"""What the store takes (`New...`) and returns (`...Record`): frozen values, free of SQLAlchemy and open connections.

Times are RFC 3339 in UTC, sizes are bytes, digests are the lower-case SHA-256 of a blob's bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

Json = Mapping[str, object]
View = Literal["adapted", "context"]
Rung = Literal["base", "original", "residual", "code", "generate"]
OnConflict = Literal["skip", "replace", "fail"]
IngestStatus = Literal["added", "updated", "known", "replaced", "skipped"]

LayoutEntry = tuple[str, int, int, int]
"""One module of an adapter: (name, rank, in features, out features)."""


@dataclass(frozen=True)
class BaseModelRecord:
    """A base model.

    Attributes:
        name: the label that adapters give it.
        fingerprint: what its weights are, and `shape` its sizes, once they have been seen.
        path: where the user said it is.
        tasks: the number of tasks that need it.
    """

    id: int
    name: str
    fingerprint: str | None
    path: str | None
    shape: Json | None
    tasks: int


@dataclass(frozen=True)
class TaskRecord:
    """A task.

    Attributes:
        samples: digest of its training samples (JSON lines), if any.
        eval_data: digest of its held-out texts (JSON lines), if any.
        pinned: whether its originals are never evicted.
    """

    id: int
    name: str
    base_model: str
    samples: str | None
    eval_data: str | None
    created_at: str
    pinned: bool


@dataclass(frozen=True)
class NewAdapter:
    """An adapter to be recorded; its blobs are in the store already.

    Attributes:
        weights: digest of the safetensors file.
        config: digest of `adapter_config.json`.
        card: digest of the model card, if any.
        step: the training step of a checkpoint, None where the folder's name gives none.
        is_final: True for exactly one adapter of the task: the one that is materialized.
        layout: its modules, in order.
        source: where it came from, as a label.
        is_generated: a generator made it from samples of the task; nobody trained it.
        format: name of the format of its files.
    """

    weights: str
    config: str
    card: str | None
    step: int | None
    is_final: bool
    dtype: str
    rank_max: int
    parameters: int
    target_modules: Sequence[str]
    layout: Sequence[LayoutEntry]
    source: str
    is_generated: bool = False
    format: str = "peft"


@dataclass(frozen=True, kw_only=True)
class AdapterRecord(NewAdapter):
    """One adapter of a task.

    Attributes:
        original_bytes: weights, config and card together, as they were ingested.
        weights_bytes: the weights alone.
        evicted_at: when the weights were deleted, None while the store has them; everything else stays known.
    """

    id: int
    task: str
    original_bytes: int
    weights_bytes: int
    created_at: str
    evicted_at: str | None

    @property
    def is_evicted(self) -> bool:
        """Whether the weights were deleted."""
        return self.evicted_at is not None

    @property
    def stored_bytes(self) -> int:
        """Bytes of its files that are in the store."""
        return self.original_bytes - (self.weights_bytes if self.is_evicted else 0)


@dataclass(frozen=True)
class TaskIngest:
    """A task to be recorded with all its adapters, in one transaction.

    Attributes:
        adapters: exactly one has `is_final`.
        samples: digest, as `eval_data` is; None keeps what the store has.
        on_conflict: what to do where the task exists with another final adapter or base model: leave it as it is,
            replace it with everything derived from it, or fail.
        restore: take the weights of evicted adapters back; else they stay evicted, and need not be in the store.
    """

    name: str
    base_model: str
    adapters: Sequence[NewAdapter]
    samples: str | None = None
    eval_data: str | None = None
    on_conflict: OnConflict = "fail"
    restore: bool = False


@dataclass(frozen=True)
class IngestOutcome:
    """What became of a :class:`TaskIngest`.

    Attributes:
        name: the task's name as the store spells it.
        new: adapters recorded now.
        known: adapters that were recorded before.
        status: `added` (new task), `updated` (more checkpoints, other samples or held-out texts, restored originals),
            `known` (nothing to do), `replaced` or `skipped` (a conflict, decided by `on_conflict`).
        evicted: those of the known ones that stay evicted; `restored`: those that were and are back.
    """

    name: str
    new: int
    known: int
    status: IngestStatus
    evicted: int = 0
    restored: int = 0


@dataclass(frozen=True)
class TaskSummary:
    """A task with what a listing shows of it.

    Attributes:
        final: its final adapter.
        checkpoints: the number of its other adapters whose weights the store has; `evicted_checkpoints`: of the others.
        vectors: the number of its task vectors.
        code: its code under the current generator, if any.
    """

    task: TaskRecord
    final: AdapterRecord
    checkpoints: int
    evicted_checkpoints: int
    vectors: int
    code: CodeRecord | None


@dataclass(frozen=True)
class NewVector:
    """A task vector to be recorded.

    Attributes:
        view: what was read: the adapted model, or the base model in context.
        support_set: which of the disjoint support sets, from 0.
        extractor: what made it, with the fingerprint of the base model.
        blob: digest of the safetensors file.
        dim: its length.
    """

    task: str
    view: View
    support_set: int
    extractor: Json
    blob: str
    dim: int


@dataclass(frozen=True)
class VectorRecord(NewVector):
    """A task vector in the store."""

    id: int


@dataclass(frozen=True)
class Asked:
    """The limits that a code, with its residual, was last made for; None where there is none.

    Attributes:
        min_gain: smallest retained gain.
        max_error: largest relative squared error of dW; `tolerance`: the same of dW weighted by sensitivity.
        is_kept: whether it meets them, after `refined` steps of refinement.
    """

    min_gain: float | None = None
    max_error: float | None = None
    tolerance: float | None = None
    is_kept: bool = True
    refined: int = 0


@dataclass(frozen=True)
class NewResidual:
    """The residual of a code, to be recorded.

    Attributes:
        blob: digest of the residual's file.
        dw_error: relative squared error of dW, decoded from code and residual.
    """

    blob: str
    dw_error: float


@dataclass(frozen=True)
class ResidualRecord(NewResidual):
    """A residual in the store; `size` is its file's length in bytes."""

    size: int


@dataclass(frozen=True)
class NewCode:
    """A code to be recorded.

    Attributes:
        adapter: the adapter it encodes, as it was then.
        blob: digest of the code's file.
        bits: its length in bits, as the training loss counts it.
        dw_error: relative squared error of the decoded dW, if it was measured.
        asked: the limits that it was made for, if there are any.
    """

    adapter: AdapterRecord
    blob: str
    bits: float
    dw_error: float | None
    asked: Asked | None = None


@dataclass(frozen=True)
class CodeRecord:
    """A code in the store.

    Attributes:
        adapter_id: the adapter it encodes.
        blob: digest of its file, of `size` bytes; `bits`, `dw_error` and `asked` as for :class:`NewCode`.
        residual: its residual, if it has one.
    """

    id: int
    task: str
    adapter_id: int
    generator_id: int
    blob: str
    size: int
    bits: float
    dw_error: float | None
    asked: Asked | None
    residual: ResidualRecord | None

    @property
    def rung(self) -> Literal["residual", "code"]:
        """The best source that the store has of the task without its original."""
        return "code" if self.residual is None else "residual"

    @property
    def best_error(self) -> float | None:
        """The relative dW error of that source."""
        return self.dw_error if self.residual is None else self.residual.dw_error

    def digests(self) -> list[str]:
        """Return the digests of the code and of its residual."""
        return [self.blob, *([] if self.residual is None else [self.residual.blob])]


@dataclass(frozen=True)
class NewGenerator:
    """A generator to be recorded; it becomes the current one of its base model.

    Attributes:
        blob: digest of the generator's file.
        parent_id: the generator it was trained on from, if any.
        codes: the codes of all tasks under it, recorded in the same transaction.
        train_run_id: the run that is done with it, if it had checkpoints.
    """

    base_model: str
    blob: str
    config: Json
    metrics: Json
    parent_id: int | None = None
    codes: Sequence[NewCode] = field(default=())
    train_run_id: int | None = None


@dataclass(frozen=True)
class GeneratorRecord:
    """A generator in the store; versions of one base model count from 1.

    Attributes:
        start: digest of its few-shot start, of `start_size` bytes, if one was learned.
    """

    id: int
    base_model: str
    version: int
    parent_id: int | None
    blob: str
    size: int
    config: Json
    metrics: Json
    is_current: bool
    created_at: str
    start: str | None
    start_size: int


@dataclass(frozen=True)
class TrainRunRecord:
    """A training run; one that is `running` can be resumed from its checkpoint.

    Attributes:
        weights: digest of the checkpoint's weights, at `step`, and `optimizer` that of the optimizer's state; None
            before the first one and after the run.
    """

    id: int
    base_model: str
    state: Literal["running", "done"]
    config: Json
    step: int
    weights: str | None
    optimizer: str | None
    created_at: str
    updated_at: str


@dataclass(frozen=True)
class NewEvaluation:
    """A measurement to be recorded; it replaces the earlier one of the same task, rung, generator, data and metric.

    Attributes:
        generator_id: the generator of the rungs `residual`, `code` and `generate`, None for the others.
        data: digest of the held-out texts.
        nats_per_token: mean negative log-likelihood.
        tokens: the number of predicted tokens.
        utf8_bytes: the length of the text that was scored.
        settings: how it was measured.
    """

    task: str
    rung: Rung
    generator_id: int | None
    data: str
    nats_per_token: float
    tokens: int
    utf8_bytes: int
    retained_gain: float | None
    dw_error: float | None
    settings: Json
    metric: str = "nll"


@dataclass(frozen=True, kw_only=True)
class EvaluationRecord(NewEvaluation):
    """A measurement in the store."""

    id: int
    created_at: str


@dataclass(frozen=True)
class EvictedAdapter:
    """What an evicted adapter is recognised by; attributes as in :class:`AdapterRecord`."""

    task: str
    weights: str
    config: str
    step: int | None
    is_final: bool


@dataclass(frozen=True)
class Eviction:
    """Originals to be deleted, and the code that was checked to replace them.

    Attributes:
        task: the task.
        adapters: numbers of its adapters whose weights are deleted.
        code: the code, with its residual if it has one, as they were read and decoded.
        generator: the generator that decoded it.
        dw_error: relative squared error of dW that was measured on what they decode to.
        evaluations: what else was measured.
    """

    task: str
    adapters: Sequence[int]
    code: CodeRecord
    generator: GeneratorRecord
    dw_error: float
    evaluations: Sequence[NewEvaluation] = ()

    def digests(self) -> list[str]:
        """Return the digests of generator, code and residual."""
        return [self.generator.blob, *self.code.digests()]


class Description(NamedTuple):
    """What similar adapters have in common, stored once; attributes as in :class:`NewAdapter`.

    As JSON it is an array, in this order.
    """

    dtype: str
    rank_max: int
    parameters: int
    target_modules: Sequence[str]
    layout: Sequence[LayoutEntry]
    format: str


def description_of(new: NewAdapter) -> Description:
    """Return the description of a new adapter, in a form that can be a key."""
    modules, layout = tuple(new.target_modules), tuple(new.layout)
    return Description(new.dtype, new.rank_max, new.parameters, modules, layout, new.format)
