"""Manifests: immutable JSON documents, each describing one state of a task, generator, base model or training run.

    Task ──encode──▶ canonical JSON, deflated ──▶ manifests/a1/a1c7...      named by the SHA-256 of these bytes
         ◀─decode──  with the values that many tasks share from blobs/

A file reference is the text `DIGEST:SIZE`. Times are RFC 3339 in UTC, sizes are bytes, digests are lower-case SHA-256.
Keys that this version does not know are kept in `more`, so that they survive when a newer icm wrote them.
"""

from __future__ import annotations

import json
import math
import re
import types
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, dataclass, field, fields
from datetime import UTC, datetime
from typing import Any, ClassVar, Literal, Self, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from registry.errors import DamagedStore
from registry.names import LOAD_IN, NLL, UNKNOWN_BASE, LoadIn, is_bundle_source

Json = Mapping[str, object]
View = Literal["adapted", "context"]
Source = Literal["base", "original", "code", "recalled", "network"]
JoinReason = Literal["told", "fingerprint", "mirror"]

WITHOUT_BASE = "it names no base model; specify one with `icm ingest --base-model NAME`"
"""Why an adapter cannot have a code until its base model is known."""

LayoutEntry = tuple[str, int, int, int]
"""One module of an adapter: (name, rank, in features, out features)."""

MAX_MANIFEST_BYTES = 1 << 24
_FILE = re.compile(r"([0-9a-f]{64}):(0|[1-9][0-9]{0,18})")
_DIGEST = re.compile(r"[0-9a-f]{64}")
P = TypeVar("P", bound="Part")


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
class Adapter(Part):
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
    tensors_key: str | None = None  # equal for equal tensors, whatever else their file says

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
        """Whether its weights are in the store and are those of a LoRA."""
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

    def is_same(self, other: Adapter) -> bool:
        """Return whether two adapters have the same files: whatever was measured of one holds for the other."""
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

    min_gain: float | None = None  # least retained gain
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
    others: Mapping[str, float] = field(default_factory=dict)  # further figures beside the metric, by name
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
        """What is measured: a new measurement replaces an earlier one with the same subject."""
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
    final: Adapter  # the adapter that is materialized
    checkpoints: tuple[Adapter, ...] = ()  # by step
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
    def adapters(self) -> tuple[Adapter, ...]:
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
class Label(Part):
    """Another name of a base model."""

    label: str
    reason: JoinReason  # how it is known that it is the same model


@dataclass(frozen=True, kw_only=True)
class BaseModel(State):
    """A base model; fingerprint and shape are known once its weights have been seen."""

    KIND = "base"

    name: str
    fingerprint: str | None = None
    shape: Json | None = None
    labels: tuple[Label, ...] = ()  # its other names

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


KINDS: Mapping[str, type[State]] = {kind.KIND: kind for kind in (Task, Generator, BaseModel, Run, Removed)}
_FORMAT = 1


# JSON and back.


def encode(state: State) -> tuple[bytes, dict[str, bytes]]:
    """Return the bytes of a manifest, and digest -> bytes of the documents that it shares with others."""
    documents: dict[str, bytes] = {}
    body = {"type": f"{state.KIND}/{_FORMAT}", **_written(state, documents)}
    body.pop("manifest", None)
    return packed(body), documents


def packed(value: object) -> bytes:
    """Return a JSON value as canonical text, deflated."""
    return zlib.compress(json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode(), 9)


def unpacked(data: bytes, limit: int = MAX_MANIFEST_BYTES) -> Any:
    """Return the JSON value of deflated text; raise `DamagedStore` if it is none, or longer than `limit` bytes."""
    try:
        inflate = zlib.decompressobj()
        text = inflate.decompress(data, limit)
        if not inflate.eof or inflate.unused_data:
            raise ValueError("truncated, too large, or followed by other bytes")
        return json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, zlib.error, RecursionError) as error:
        raise DamagedStore(f"not a manifest: {error}") from error


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a number of JSON")


Shared = Callable[[type["Part"], "File"], Mapping[str, Any]]
"""Returns what `read_shared` returns for the document of a file, which has been verified."""


def read_shared(kind: type[Part], data: bytes) -> Mapping[str, Any]:
    """Return the values of the fields that a document has for the parts of a kind that share it."""
    known, body = _readers(kind), unpacked(data)
    return {name: known[name](value, _nothing_shared) for name, value in body.items() if name in kind.SHARED}


def _nothing_shared(kind: type[Part], file: File) -> Mapping[str, Any]:
    raise ValueError("a document refers to another one")


def decode(data: bytes, shared: Shared, digest: str | None = None) -> State:
    """Read a manifest.

    Args:
        data: Its bytes, which have been verified.
        shared: Returns the values that manifests share; see `read_shared`.
        digest: Its digest, which becomes `State.manifest`.

    Raises:
        DamagedStore: It is not a manifest of this format.
    """
    body = unpacked(data)
    try:
        kind, number = body.pop("type").split("/")
        if number != str(_FORMAT):
            raise DamagedStore(f"a manifest has format {number}; this icm reads format {_FORMAT}")
        return cast(State, _read_part(KINDS[kind], body, shared, manifest=digest))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DamagedStore(f"not a manifest: {type(error).__name__} {error}") from error


def files_of(body: Any) -> Iterator[tuple[str, File]]:
    """Yield use and file of all bytes that the JSON of a manifest needs; those of evicted weights are not needed.

    The network of a code is needed too: it has the use `generators`.
    """
    kind = body["type"].split("/")[0]
    if kind == Task.KIND:
        yield from _files_of_task(body)
    single, many = _FILES.get(kind, ((), ()))
    for use, name in single:
        if name in body:
            yield use, _file(body[name])
    for use, name in many:
        for file in body.get(name, ()):
            yield use, _file(file)


_FILES = {  # kind -> use and key of files, and of lists of files
    "task": ((("texts", "samples"), ("texts", "eval_data")), ()),
    "generator": ((("generators", "blob"), ("generators", "start")), ()),
    "run": ((("training", "weights"), ("training", "optimizer")), (("training", "codes"),)),
}


def _files_of_task(body: Any) -> Iterator[tuple[str, File]]:
    adapters = [("originals", body["final"]), *(("checkpoints", one) for one in body.get("checkpoints", ()))]
    for use, adapter in adapters:
        names = ("config", "card") if "evicted_at" in adapter else ("weights", "initial", "config", "card")
        yield from ((use, _file(adapter[name])) for name in names if name in adapter)
        yield from (("extras", _file(extra["blob"])) for extra in adapter.get("extras", ()))
        yield "manifests", _file(adapter["shared"])
    for vector in body.get("vectors", ()):
        yield "vectors", _file(vector["blob"])
        yield "manifests", _file(vector["shared"])
    if "code" in body:
        yield "codes", _file(body["code"]["blob"])
        yield "generators", _file(body["code"]["generator"])


def _file(text: str) -> File:
    match = _FILE.fullmatch(text)
    if match is None:
        raise ValueError(f"not a file reference: {text[:80]!r}")
    return File(match[1], int(match[2]))


def _written(value: Any, documents: dict[str, bytes]) -> Any:
    """Return a value as JSON, without the fields that have their default values."""
    if isinstance(value, File):
        return f"{value}:{value.size}"
    if isinstance(value, Part):
        body = {
            one.name: _written(getattr(value, one.name), documents)
            for one in fields(value)
            if one.name != "more" and getattr(value, one.name) != _default(one)
        }
        if value.SHARED:
            common = packed({name: body.pop(name) for name in value.SHARED if name in body})
            digest = _sha256(common)
            documents[digest] = common
            body["shared"] = f"{digest}:{len(common)}"
        return {**value.more, **body}
    if isinstance(value, (tuple, list)):
        return [_written(one, documents) for one in value]
    if isinstance(value, Mapping):
        return {key: _written(one, documents) for key, one in value.items()}
    return value


def written(part: Part) -> dict[str, Any]:
    """Return a part without shared fields as JSON."""
    return cast(dict[str, Any], _written(part, {}))


def read(kind: type[P], body: Json) -> P:
    """Read such a part again; raises `ValueError` or `TypeError` if the JSON does not fit."""
    return cast(P, _read_part(kind, body, _nothing_shared))


def _sha256(data: bytes) -> str:
    from hashlib import sha256

    return sha256(data).hexdigest()


def _default(one: Any) -> Any:
    """Return the default of a field; none that depends on the time counts."""
    if one.default is not MISSING:
        return one.default
    if one.default_factory in (dict, tuple):
        return one.default_factory()
    return MISSING


def _read_part(kind: type[Part], body: Any, shared: Shared, **given: Any) -> Part:
    body = dict(body)
    common = shared(kind, _file(body.pop("shared"))) if kind.SHARED else {}
    known = _readers(kind)
    values = {name: known[name](body.pop(name), shared) for name in list(body) if name in known}
    return kind(**common, **values, **given, more=body)


_Reader = Callable[[Any, Shared], Any]


_READERS: dict[type[Part], dict[str, _Reader]] = {}


def _readers(kind: type[Part]) -> dict[str, _Reader]:
    """Return what reads each field of a part from JSON, and raises `ValueError` or `TypeError` if it does not fit."""
    if kind not in _READERS:
        hints = get_type_hints(kind)
        names = {one.name for one in fields(kind)} - {"more", "manifest"}
        _READERS[kind] = {name: _reader(hints[name]) for name in names}
    return _READERS[kind]


def _reader(hint: Any) -> _Reader:
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is File:
        return lambda value, shared: _file(value)
    if isinstance(hint, type) and issubclass(hint, Part):
        return lambda value, shared: _read_part(hint, value, shared)
    if origin in (Union, types.UnionType):  # of a type and None
        (inner,) = (one for one in arguments if one is not type(None))
        read = _reader(inner)
        return lambda value, shared: None if value is None else read(value, shared)
    if origin is tuple:
        if arguments[-1] is not Ellipsis:
            readers = [_reader(one) for one in arguments]
            return lambda value, shared: tuple(read(one, shared) for read, one in zip(readers, value, strict=True))
        read_one = _reader(arguments[0])
        return lambda value, shared: tuple([read_one(one, shared) for one in _checked(value, list)])
    if origin is Literal:
        return lambda value, shared: arguments[arguments.index(value)]
    if hint is float:
        return lambda value, shared: float(_checked(value, int, float))
    if origin is not None and issubclass(origin, Mapping):
        return lambda value, shared: _checked(value, dict)
    return lambda value, shared: _checked(value, hint)


def _checked(value: Any, *kinds: type) -> Any:
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        raise TypeError(f"{str(value)[:80]!r} is not {kinds[-1].__name__}")
    return value
