"""Manifests: immutable documents, each describing one state of a task, generator, base model or training run.

They are the records of the registry. Times are RFC 3339 in UTC, sizes are bytes, digests are lower-case SHA-256.
`registry/encoding.py` writes them as JSON.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import ClassVar, Literal, Self

from registry.names import LOAD_IN, NLL, UNKNOWN_BASE, LoadIn, is_bundle_source

Json = Mapping[str, object]
View = Literal["adapted", "context"]
Source = Literal["base", "original", "code", "recalled", "network"]
JoinReason = Literal["told", "fingerprint", "mirror"]

WITHOUT_BASE = "it names no base model; specify one with `icm ingest --base-model NAME`"
"""Why an adapter cannot have a code until its base model is known."""

LayoutEntry = tuple[str, int, int, int]
"""One module of an adapter: (name, rank, in features, out features)."""

_DIGEST = re.compile(r"[0-9a-f]{64}")


def now() -> str:
    """Return the present time as manifests store it."""
    return datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def is_digest(text: str) -> bool:
    """Return whether a text is a SHA-256 in the form that the store uses."""
    return _DIGEST.fullmatch(text) is not None


class File(str):
    """The digest of a blob, which also knows its size: `File("3f9a...", 1200) == "3f9a..."`."""

    __slots__ = ("size",)
    size: int

    def __new__(cls, digest: str, size: int) -> Self:
        """Make a reference to `size` bytes with a digest."""
        made = super().__new__(cls, digest)
        made.size = size
        return made

    def __reduce__(self) -> tuple[type[Self], tuple[str, int]]:
        """Return what pickle and copy call."""
        return type(self), (str.__str__(self), self.size)


class WithRelativeError:
    """Anything that holds the square of a relative error."""

    squared_error: float | None

    @property
    def relative_error(self) -> float | None:
        """||dW' - dW|| / ||dW||; None if it was not measured."""
        return relative_error(self.squared_error)


def relative_error(squared: float | None) -> float | None:
    """Return a relative error from its square."""
    return None if squared is None else math.sqrt(squared)


@dataclass(frozen=True, kw_only=True)
class Part:
    """A part of a manifest; the fields in `SHARED` are the same for many tasks, and stored once as a blob."""

    SHARED: ClassVar[tuple[str, ...]] = ()

    more: Json = field(default_factory=dict)  # keys of a newer icm


@dataclass(frozen=True, kw_only=True)
class Extra(Part):
    """A file or tensors of an adapter that a code cannot represent, kept exactly."""

    blob: File  # packed; other tasks may share it
    file: str | None = None  # name of a file next to the adapter; None for tensors
    size: int  # in bytes, before packing

    @property
    def packed_size(self) -> int:
        """Bytes in the store."""
        return self.blob.size


@dataclass(frozen=True, kw_only=True)
class StoredAdapter(Part):
    """One adapter of a task."""

    SHARED = (
        *("dtype", "rank_max", "parameters", "target_modules", "layout"),
        *("format", "original_only", "does_nothing", "template"),
    )

    weights: File  # the safetensors file
    config: File  # adapter_config.json
    card: File | None = None
    initial: File | None = None  # weights it started from, if extracted from its base model (PiSSA and similar)
    extras: tuple[Extra, ...] = ()
    step: int | None = None  # of a checkpoint; None if the name of its folder gives none
    source: str  # where it came from, as a label
    created_at: str = field(default_factory=now)
    evicted_at: str | None = None  # when the weights were deleted; everything else stays known
    is_generated: bool = False  # a generator made it from samples
    tensors_key: str | None = None  # equal for equal tensors, regardless of metadata

    dtype: str
    rank_max: int
    parameters: int
    target_modules: tuple[str, ...]
    layout: tuple[LayoutEntry, ...]
    format: str = "peft"
    original_only: str | None = None  # why it cannot have a code
    does_nothing: bool = False  # it leaves the base model as it is, or is not finite
    template: str = ""  # JSON: what its format needs to write a decoded adapter; empty for the usual form

    @property
    def is_evicted(self) -> bool:
        """Whether the weights were deleted."""
        return self.evicted_at is not None

    @property
    def was_never_here(self) -> bool:
        """Whether a bundle brought the code of the adapter without its weights."""
        return self.is_evicted and is_bundle_source(self.source)

    @property
    def can_be_read(self) -> bool:
        """Whether its weights are in the store and form a LoRA."""
        return not self.is_evicted and self.original_only is None

    @property
    def evictable(self) -> tuple[File, ...]:
        """The files that are deleted when it is evicted."""
        return (self.weights,) if self.initial is None else (self.weights, self.initial)

    @property
    def kept(self) -> tuple[File, ...]:
        """The files that its code needs to restore it: its configuration and its extras."""
        return (self.config, *(extra.blob for extra in self.extras))

    @property
    def original_bytes(self) -> int:
        """Bytes of weights, configuration and card, as they were ingested."""
        return self.weights.size + self.config.size + (0 if self.card is None else self.card.size)

    @property
    def stored_bytes(self) -> int:
        """Bytes of its files that are in the store."""
        return self.original_bytes - (self.weights.size if self.is_evicted else 0)

    @property
    def extras_bytes(self) -> int:
        """Bytes of its extras in the store; other tasks may share some of them."""
        return sum(extra.blob.size for extra in self.extras)

    def is_same(self, other: StoredAdapter) -> bool:
        """Return whether two adapters have the same files, so that measurements of one hold for the other."""
        return (self.weights, self.initial, self.config) == (other.weights, other.initial, other.config)


@dataclass(frozen=True, kw_only=True)
class Vector(Part):
    """A task vector."""

    SHARED = ("extractor",)

    view: View  # the adapted model was read, or the base model in context
    support_set: int  # which of the disjoint support sets, from 0
    blob: File
    dim: int
    extractor: Json  # how it was made, with the fingerprint of the base model


@dataclass(frozen=True, kw_only=True)
class CodeLimits(Part):
    """The limits that a code was made for."""

    max_error: float | None = None  # largest relative error
    tolerance: float | None = None  # largest squared error of dW weighted by sensitivity
    is_kept: bool = True  # whether the limits are met
    refined: int = 0  # steps of refinement
    max_size: int | None = None  # bytes of the code
    keep: float | None = None  # least effect


@dataclass(frozen=True, kw_only=True)
class Claim(Part, WithRelativeError):
    """The quality that a bundle states for a code. Nothing here has measured it, so it decides nothing."""

    squared_error: float | None = None
    measured: Json | None = None  # in the fields of a bundle

    @property
    def retained_gain(self) -> float | None:
        """The retained gain that is claimed."""
        gain = (self.measured or {}).get("retained_gain")
        return gain if isinstance(gain, float) else None

    @property
    def precision(self) -> str | None:
        """The precision of the base model on which that was measured."""
        settings = (self.measured or {}).get("settings")
        precision = settings.get("dtype") if isinstance(settings, Mapping) else None
        return precision if isinstance(precision, str) else None


@dataclass(frozen=True, kw_only=True)
class Code(Part, WithRelativeError):
    """The code of the final adapter of a task."""

    blob: File
    generator: File  # the network that decodes it
    squared_error: float | None = None  # of the adapter that it decodes to, if measured
    # 1 - KL(original || code) / KL(original || base), on texts that nothing was fitted to; None if not measured.
    effect: float | None = None
    asked: CodeLimits | None = None
    claim: Claim | None = None  # of the bundle that it came in, until it is measured

    @property
    def size(self) -> int:
        """Bytes of the code."""
        return self.blob.size


@dataclass(frozen=True, kw_only=True)
class Measurement(Part, WithRelativeError):
    """A measurement of one source of a task on one held-out text."""

    source: Source
    generator: str | None = None  # digest of the network; None for `base` and `original`
    data: str  # digest of the held-out texts, which need not be in the store
    value: float  # the metric
    count: int  # predictions that were scored: tokens, images
    utf8_bytes: int  # length of the text that was scored
    retained_gain: float | None = None
    squared_error: float | None = None
    settings: Json  # how it was measured
    metric: str = NLL
    others: Mapping[str, float] = field(default_factory=dict)  # further figures besides the metric, by name
    created_at: str = field(default_factory=now)

    @property
    def precision(self) -> str | None:
        """The precision of the base model, such as "float32" or "nf4"; None if it was not noted."""
        precision = self.settings.get("dtype")
        return precision if isinstance(precision, str) else None

    @property
    def load_in(self) -> LoadIn | None:
        """The few bits that the base model was loaded in; None for full precision."""
        return next((few for few in LOAD_IN if few == self.precision), None)

    @property
    def subject(self) -> tuple[object, ...]:
        """Key of the measurement: a new one replaces an earlier one with the same key."""
        return self.source, self.generator, self.data, self.metric, self.load_in


@dataclass(frozen=True, kw_only=True)
class State(Part):
    """A state that a ref can point to.

    `manifest` is the digest of the manifest that it was read from, and the state that `Store.publish` replaces; None
    for a new one. `seq` grows with every state of a name; it decides which one is newest if the database is lost.
    """

    KIND: ClassVar[str]

    seq: int = 0
    parent: str | None = None  # the manifest that this state replaced
    manifest: str | None = field(default=None, compare=False)

    @property
    def ref(self) -> str:
        """The name of its ref."""
        raise NotImplementedError

    @property
    def number(self) -> int:
        """The version of a task, or the number of a generator."""
        return 1


@dataclass(frozen=True, kw_only=True)
class Task(State):
    """One state of one version of a task."""

    KIND = "task"

    name: str
    version: int = 1
    base_model: str
    label: str | None = None  # how its adapters name the base model, if differently
    final: StoredAdapter  # the adapter that is materialized
    checkpoints: tuple[StoredAdapter, ...] = ()  # by step
    samples: File | None = None  # training samples (JSON lines)
    eval_data: File | None = None  # held-out texts (JSON lines)
    vectors: tuple[Vector, ...] = ()
    code: Code | None = None
    measured: tuple[Measurement, ...] = ()
    tags: tuple[str, ...] = ()  # sorted
    note: str | None = None
    pinned: bool = False  # its originals are never evicted
    aliases: Mapping[str, int] = field(default_factory=dict)  # alias -> version
    created_at: str = field(default_factory=now)

    @property
    def ref(self) -> str:
        """Its name."""
        return self.name

    @property
    def number(self) -> int:
        """Its version."""
        return self.version

    @property
    def not_encodable(self) -> str | None:
        """Why its final adapter cannot have a code; None if it can."""
        return self.final.original_only or (WITHOUT_BASE if self.base_model == UNKNOWN_BASE else None)

    @property
    def adapters(self) -> tuple[StoredAdapter, ...]:
        """All its adapters: checkpoints by step, the final one last."""
        return (*self.checkpoints, self.final)

    def code_under(self, generator: Generator | None) -> Code | None:
        """Return its code if the given generator decodes it."""
        return self.code if generator is not None and self.code is not None and is_of(self.code, generator) else None

    def with_measured(self, *new: Measurement) -> tuple[Measurement, ...]:
        """Return its measurements with new ones, each in place of an earlier one of the same subject."""
        replaced = {one.subject for one in new}
        return (*(one for one in self.measured if one.subject not in replaced), *new)

    def latest(self, source: Source, generator: str | None) -> Measurement | None:
        """Return the measurement of a source under a generator: on the task's own held-out text, else the latest."""
        found = [one for one in self.measured if one.source == source and one.generator == generator]
        order = [(one.data == self.eval_data, one.retained_gain is not None, place) for place, one in enumerate(found)]
        return found[max(order)[2]] if found else None

    @property
    def quality(self) -> Measurement | None:
        """The measurement of its code that a listing shows."""
        return None if self.code is None else self.latest("code", self.code.generator)


def is_of(code: Code, generator: Generator) -> bool:
    """Return whether a generator decodes a code."""
    return code.generator == generator.blob


@dataclass(frozen=True, kw_only=True)
class Generator(State):
    """One version of the generator of a base model."""

    KIND = "generator"

    base_model: str
    version: int = 1
    blob: File  # the network
    start: File | None = None  # few-shot start
    trained_from: str | None = None  # digest of the network whose training it continued
    config: Json
    metrics: Json
    created_at: str = field(default_factory=now)

    @property
    def ref(self) -> str:
        """The base model."""
        return self.base_model

    @property
    def number(self) -> int:
        """Its version."""
        return self.version

    @property
    def size(self) -> int:
        """Bytes of the network."""
        return self.blob.size

    @property
    def start_size(self) -> int:
        """Bytes of the few-shot start."""
        return 0 if self.start is None else self.start.size


@dataclass(frozen=True, kw_only=True)
class BaseLabel(Part):
    """Another name of a base model."""

    label: str
    reason: JoinReason  # how it is known that it is the same model


@dataclass(frozen=True, kw_only=True)
class BaseRecord(State):
    """A base model; fingerprint and shape are known once its weights have been seen."""

    KIND = "base"

    name: str
    fingerprint: str | None = None
    shape: Json | None = None
    labels: tuple[BaseLabel, ...] = ()  # its other names

    @property
    def ref(self) -> str:
        """Its name."""
        return self.name

    @property
    def names(self) -> tuple[str, ...]:
        """Its name and its labels."""
        return (self.name, *(label.label for label in self.labels))


@dataclass(frozen=True, kw_only=True)
class Run(State):
    """A training run that can be resumed; its ref is removed when it ends."""

    KIND = "run"

    base_model: str
    config: Json
    step: int = 0
    weights: File | None = None  # checkpoint of the network
    optimizer: File | None = None
    codes: tuple[File, ...] = ()  # batches of codes that were made and are not published yet
    created_at: str = field(default_factory=now)
    updated_at: str = field(default_factory=now)

    @property
    def ref(self) -> str:
        """The base model."""
        return self.base_model

    @property
    def files(self) -> frozenset[File]:
        """The blobs that the run owns."""
        return frozenset((*filter(None, (self.weights, self.optimizer)), *self.codes))


@dataclass(frozen=True, kw_only=True)
class Removed(State):
    """The last state of a name that was removed.

    It keeps earlier states from coming back with a lost database. `prune` deletes it after them.
    """

    KIND = "removed"

    of: str  # the kind of the ref
    name: str

    @property
    def ref(self) -> str:
        """The kind and the key of the ref that was removed."""
        return f"{self.of}/{self.name.lower() if self.of == Task.KIND else self.name}"


KINDS: Mapping[str, type[State]] = {kind.KIND: kind for kind in (Task, Generator, BaseRecord, Run, Removed)}
