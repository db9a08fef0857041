"""What the store takes (`New...`) and returns (`...Record`): frozen values, free of SQLAlchemy and open connections.

Times are RFC 3339 in UTC, sizes are bytes, digests are the lower-case SHA-256 of a blob's bytes.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from registry.names import LOAD_IN, NLL, LoadIn, is_bundle_source

Json = Mapping[str, object]
View = Literal["adapted", "context"]
Rung = Literal["base", "original", "residual", "code", "generate", "network"]
OnConflict = Literal["skip", "replace", "fail"]
JoinReason = Literal["told", "fingerprint", "mirror"]
IngestStatus = Literal["added", "updated", "known", "replaced", "skipped"]

WITHOUT_BASE = "it names no base model; specify one with `icm ingest --base-model NAME`"
"""Why there can be no code of an adapter until its base model is known."""

LayoutEntry = tuple[str, int, int, int]
"""One module of an adapter: (name, rank, in features, out features)."""


class WithRelativeError:
    """Anything that holds the square of a relative error, as the store does."""

    __slots__ = ()  # of some there are very many

    squared_error: float | None

    @property
    def relative_error(self) -> float | None:
        """||dW' - dW|| / ||dW||, as people know it; None if it was not measured."""
        return relative_error(self.squared_error)


def relative_error(squared: float | None) -> float | None:
    """Return a relative error from its square."""
    return None if squared is None else math.sqrt(squared)


class LabelRecord(NamedTuple):
    """Another name of a base model."""

    label: str
    reason: JoinReason  # how it is known that it is the same model
    path: str | None  # where the user said it is


@dataclass(frozen=True)
class BaseModelRecord:
    """A base model; fingerprint and shape are known once its weights have been seen."""

    id: int
    name: str  # the label that adapters give it
    fingerprint: str | None
    path: str | None  # where the user said it is
    shape: Json | None
    tasks: int
    labels: tuple[LabelRecord, ...] = ()  # its other names
    loader: str | None = None  # MODULE:FUNCTION of what loads it, where the user said so
    load_in: LoadIn | None = None  # the few bits that its weights are loaded in, where the user said so

    @property
    def names(self) -> tuple[str, ...]:
        """Its name and its labels."""
        return (self.name, *(label.label for label in self.labels))


@dataclass(frozen=True)
class TaskRecord:
    """A task."""

    id: int
    name: str
    base_model: str
    samples: str | None  # digest of the training samples (JSON lines)
    eval_data: str | None  # digest of the held-out texts (JSON lines)
    created_at: str
    pinned: bool  # its originals are never evicted
    tags: tuple[str, ...] = ()  # sorted
    note: str | None = None


class Extra(NamedTuple):
    """What a code of an adapter cannot represent and is kept exactly."""

    blob: str  # packed; other tasks may share it
    file: str | None  # name of a file next to the adapter; None for a blob of its tensors
    size: int  # in bytes, before packing
    packed_size: int


@dataclass(frozen=True)
class NewAdapter:
    """An adapter to be recorded; its blobs are in the store already."""

    weights: str  # digest of the safetensors file
    config: str  # digest of adapter_config.json
    card: str | None
    step: int | None  # of a checkpoint; None if the folder's name gives none
    is_final: bool  # exactly one adapter of a task is: the one that is materialized
    dtype: str
    rank_max: int
    parameters: int
    target_modules: Sequence[str]
    layout: Sequence[LayoutEntry]
    source: str  # where it came from, as a label
    is_generated: bool = False  # a generator made it from samples; nobody trained it
    format: str = "peft"
    original_only: str | None = None  # why there can be no code of it
    does_nothing: bool = False  # it leaves the base model as it is, or is not finite
    template: str = ""  # JSON: what its format needs to write a decoded adapter in its form; empty for the usual form
    extras: Sequence[Extra] = ()
    # Digest of the weights that it began with, where they were taken out of its base model (PiSSA and the like).
    initial: str | None = None
    # Equal for equal tensors, whatever else their file says, and hardly ever for others; None where nobody made it.
    tensors_key: str | None = None


@dataclass(frozen=True, kw_only=True)
class AdapterRecord(NewAdapter):
    """One adapter of a task."""

    id: int
    task: str
    original_bytes: int  # weights, configuration and card, as they were ingested
    weights_bytes: int
    initial_bytes: int
    created_at: str
    evicted_at: str | None  # when the weights were deleted; everything else stays known

    @property
    def is_evicted(self) -> bool:
        """Whether the weights were deleted."""
        return self.evicted_at is not None

    @property
    def was_never_here(self) -> bool:
        """Whether a bundle brought what is known of it, without its weights."""
        return self.is_evicted and is_bundle_source(self.source)

    @property
    def can_be_read(self) -> bool:
        """Whether its weights are in the store and are those of a LoRA."""
        return not self.is_evicted and self.original_only is None

    @property
    def evictable(self) -> Mapping[str, int]:
        """Digest -> bytes of what is deleted when it is evicted."""
        return {self.weights: self.weights_bytes} | ({self.initial: self.initial_bytes} if self.initial else {})

    @property
    def kept(self) -> list[str]:
        """Digests of what its code needs to bring it back: its configuration and its extras."""
        return [self.config, *(extra.blob for extra in self.extras)]

    @property
    def stored_bytes(self) -> int:
        """Bytes of its files that are in the store."""
        return self.original_bytes - (self.weights_bytes if self.is_evicted else 0)

    @property
    def extras_bytes(self) -> int:
        """Bytes of its extras in the store; other tasks may share some of them."""
        return sum(extra.packed_size for extra in self.extras)


@dataclass(frozen=True)
class TaskIngest:
    """A task to be recorded with all its adapters, in one transaction."""

    name: str
    base_model: str  # any label of it; a known task with the same final adapter keeps the base model that it has
    adapters: Sequence[NewAdapter]
    samples: str | None = None  # digest; None keeps what the store has
    eval_data: str | None = None
    on_conflict: OnConflict = "fail"  # if the task exists with another final adapter or base model
    restore: bool = False  # take weights of evicted adapters back; else they need not be in the store
    base_is_told: bool = False  # by the user, because the adapters name none: a known task without one gets it


@dataclass(frozen=True)
class IngestOutcome:
    """What became of a `TaskIngest`."""

    name: str  # as the store spells it
    new: int
    known: int
    status: IngestStatus
    base_model: str  # its name, whatever label was given
    evicted: int = 0  # known adapters that stay evicted
    restored: int = 0


@dataclass(frozen=True)
class TaskSummary:
    """A task with what a listing shows of it."""

    task: TaskRecord
    final: AdapterRecord
    checkpoints: int  # adapters other than the final one whose weights are in the store
    evicted_checkpoints: int
    vectors: int
    code: CodeRecord | None  # under the current generator
    gain: float | None  # retained gain of that code, with its residual if it has one
    gain_precision: str | None = None  # of the base model that it was measured on, as in `NewEvaluation.precision`


class TaskFigures(NamedTuple):
    """What a bill says of a task. A named tuple, since of all that is known of ten thousand tasks it is little."""

    id: int
    task: str
    base_model: str
    parameters: int
    stored_bytes: int  # of its final adapter: weights, configuration and card, as far as they are in the store
    is_evicted: bool
    original_only: str | None
    extras: tuple[Extra, ...]
    code_size: int | None  # under the current generator
    residual_size: int | None
    squared_error: float | None  # of the code with its residual
    effect: float | None  # of the code without its residual, as in `NewCode`
    asked: CodeLimits | None
    is_claimed: bool  # by the bundle that the code came in; nothing here has measured it
    gain: float | None  # as in `TaskSummary`
    gain_precision: str | None

    @classmethod
    def of(cls, row: TaskSummary) -> TaskFigures:
        """Return what a bill says of a task that has been read with all that a listing shows."""
        code, final = row.code, row.final
        return cls(
            row.task.id,
            row.task.name,
            row.task.base_model,
            final.parameters,
            final.stored_bytes,
            final.is_evicted,
            final.original_only,
            tuple(final.extras),
            None if code is None else code.size,
            None if code is None or code.residual is None else code.residual.size,
            None if code is None else code.best_squared_error,
            None if code is None else code.effect,
            None if code is None else code.asked,
            code is not None and code.claim is not None,
            row.gain,
            row.gain_precision,
        )


@dataclass(frozen=True)
class NewVector:
    """A task vector to be recorded."""

    task: str
    view: View  # the adapted model was read, or the base model in context
    support_set: int  # which of the disjoint support sets, from 0
    extractor: Json  # what made it, with the fingerprint of the base model
    blob: str
    dim: int


@dataclass(frozen=True)
class VectorRecord(NewVector):
    """A task vector in the store."""

    id: int


@dataclass(frozen=True)
class CodeLimits:
    """The limits that a code, with its residual, was made for."""

    min_gain: float | None = None  # least retained gain
    max_error: float | None = None  # largest relative error
    tolerance: float | None = None  # largest squared error of dW weighted by sensitivity
    is_kept: bool = True  # whether the limits are met
    refined: int = 0  # steps of refinement
    max_size: int | None = None  # bytes of the code
    keep: float | None = None  # least effect


@dataclass(frozen=True)
class NewResidual(WithRelativeError):
    """The residual of a code, to be recorded."""

    blob: str
    squared_error: float  # of what code and residual decode to


@dataclass(frozen=True)
class ResidualRecord(NewResidual):
    """A residual in the store; `size` is its file's length in bytes."""

    size: int


@dataclass(frozen=True)
class NewCode:
    """A code to be recorded."""

    adapter: AdapterRecord  # what it encodes, as it was then
    blob: str
    bits: float  # as the training loss counts them
    squared_error: float | None  # of what it decodes to, if it was measured
    asked: CodeLimits | None = None
    # The share of what its original does to the base model's predictions that it does too, on texts that nothing was
    # fitted to: 1 - KL(original || code) / KL(original || base). None if it was not measured.
    effect: float | None = None


@dataclass(frozen=True)
class Claim(WithRelativeError):
    """What a bundle says of a code that it brought. Nothing here has measured it, so it decides nothing."""

    squared_error: float | None
    measured: Json | None = None  # how well it does, in the fields of a bundle

    @property
    def retained_gain(self) -> float | None:
        """The retained gain that is claimed."""
        found = (self.measured or {}).get("retained_gain")
        return found if isinstance(found, float) else None

    @property
    def precision(self) -> str | None:
        """The precision of the base model on which that is said to be measured."""
        settings = (self.measured or {}).get("settings")
        found = settings.get("dtype") if isinstance(settings, Mapping) else None
        return found if isinstance(found, str) else None


@dataclass(frozen=True)
class CodeRecord(WithRelativeError):
    """A code in the store."""

    id: int
    task: str
    adapter_id: int
    generator_id: int
    blob: str
    size: int
    bits: float
    squared_error: float | None
    asked: CodeLimits | None
    residual: ResidualRecord | None
    claim: Claim | None = None  # of the bundle that it came in, until it is measured
    effect: float | None = None  # of the code without its residual, as in `NewCode`

    @property
    def rung(self) -> Literal["residual", "code"]:
        """The best source that the store has of the task without its original."""
        return "code" if self.residual is None else "residual"

    @property
    def best_squared_error(self) -> float | None:
        """The squared error of that source."""
        return self.squared_error if self.residual is None else self.residual.squared_error

    def digests(self) -> list[str]:
        """Return the digests of the code and of its residual."""
        return [self.blob, *([] if self.residual is None else [self.residual.blob])]


@dataclass(frozen=True)
class RunCode:
    """A code that a training run has made and not published yet."""

    adapter: int  # the row of the adapter that it encodes
    blob: str
    size: int
    generator: str  # digest of the file that the network would be published as
    squared_error: float
    initial_is_known: bool


@dataclass(frozen=True)
class NewGenerator:
    """A generator to be recorded; it becomes the current one of its base model."""

    base_model: str
    blob: str
    config: Json
    metrics: Json
    parent_id: int | None = None  # the generator it was trained on from
    codes: Sequence[NewCode] = field(default=())  # of all tasks under it, recorded in the same transaction
    train_run_id: int | None = None  # the run that ends with it
    # Evicted tasks whose codes stay where they are, under the present generator: nobody can make them again.
    stay: Collection[str] = ()


@dataclass(frozen=True)
class GeneratorRecord:
    """A generator in the store; versions of one base model count from 1."""

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
    start: str | None  # digest of its few-shot start
    start_size: int


@dataclass(frozen=True)
class TrainRunRecord:
    """A training run; one that is `running` can be resumed from its checkpoint."""

    id: int
    base_model: str
    state: Literal["running", "done"]
    config: Json
    step: int
    weights: str | None  # digest of the checkpoint's weights; None before the first one and after the run
    optimizer: str | None
    created_at: str
    updated_at: str


@dataclass(frozen=True)
class NewEvaluation(WithRelativeError):
    """A measurement to be recorded.

    It replaces the earlier one of the same task, rung, generator, data and metric. What was measured on a base model in
    few bits, and in full precision, stand side by side.
    """

    task: str
    rung: Rung
    generator_id: int | None  # None for the rungs base and original
    data: str  # digest of the held-out texts
    value: float  # the metric
    count: int  # predictions that were scored: tokens, images
    utf8_bytes: int  # length of the text that was scored
    retained_gain: float | None
    squared_error: float | None
    settings: Json  # how it was measured
    metric: str = NLL
    others: Mapping[str, float] = field(default_factory=dict)  # further figures beside the metric, by name

    @property
    def precision(self) -> str | None:
        """The precision of the base model, such as "float32" or "nf4"; None if whoever measured did not note it."""
        found = self.settings.get("dtype")
        return found if isinstance(found, str) else None

    @property
    def load_in(self) -> LoadIn | None:
        """The few bits that the base model was loaded in; None for full precision."""
        return next((few for few in LOAD_IN if few == self.precision), None)


@dataclass(frozen=True, kw_only=True)
class EvaluationRecord(NewEvaluation):
    """A measurement in the store."""

    id: int
    created_at: str


@dataclass(frozen=True)
class EvictedAdapter:
    """What an evicted adapter is recognised by."""

    task: str
    weights: str
    config: str
    step: int | None
    is_final: bool


@dataclass(frozen=True, slots=True)
class TaskOrigin:
    """What a task of the store is recognised by when its folder is met again."""

    name: str
    weights: str  # of its final adapter
    weights_size: int
    config: str
    sources: tuple[str, ...]  # labels of the places of its adapters; the final one's first
    tensors_key: str | None = None  # of its final adapter
    # Its adapters whose weights were deleted; not those that never were here, but in a bundle.
    evicted: tuple[EvictedAdapter, ...] = ()


@dataclass(frozen=True)
class Eviction:
    """Originals to be deleted, and the code that was checked to replace them."""

    task: str
    adapters: Sequence[int]  # rows of the adapters whose weights are deleted
    final: AdapterRecord  # that the code brings back
    code: CodeRecord  # as it was read and decoded
    generator: GeneratorRecord  # that decoded it
    squared_error: float  # that was measured of it
    evaluations: Sequence[NewEvaluation] = ()

    def digests(self) -> list[str]:
        """Return the digests of all that must remain: generator, code, residual, configuration and extras.

        A final adapter whose weights are not deleted with its checkpoints must remain too.
        """
        stays = not self.final.is_evicted and self.final.id not in self.adapters
        return [self.generator.blob, *self.code.digests(), *self.final.kept, *(self.final.evictable if stays else ())]


class Description(NamedTuple):
    """What similar adapters have in common, stored once as a JSON array in this order."""

    dtype: str
    rank_max: int
    parameters: int
    target_modules: Sequence[str]
    layout: Sequence[LayoutEntry]
    format: str
    original_only: str | None
    does_nothing: bool
    template: str


def description_of(new: NewAdapter) -> Description:
    """Return the description of a new adapter, in a form that can be a key."""
    modules, layout = tuple(new.target_modules), tuple(new.layout)
    shape = (new.dtype, new.rank_max, new.parameters, modules, layout, new.format)
    return Description(*shape, new.original_only, new.does_nothing, new.template)


def read_description(stored: Sequence[object]) -> Description:
    """Return a description from its JSON, with tuples where JSON has only lists: it must be a key."""
    common = Description(*stored)  # type: ignore[arg-type]  # as `description_of` made it
    layout = tuple((name, rank, inputs, outputs) for name, rank, inputs, outputs in common.layout)
    return common._replace(target_modules=tuple(common.target_modules), layout=layout)


def latest_evaluation(
    evaluations: Iterable[EvaluationRecord],
    task: TaskRecord,
    rung: Rung,
    generator: GeneratorRecord,
) -> EvaluationRecord | None:
    """Return how a source does under a generator on the task's own held-out text, else the latest on any text."""
    # The gain of an evicted original is known only in the precision that was measured before it went.
    rows = [row for row in evaluations if row.rung == rung and row.generator_id == generator.id]
    return max(rows, key=lambda row: (row.data == task.eval_data, row.retained_gain is not None, row.id), default=None)
