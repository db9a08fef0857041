"""The index of a bundle: its generator, its tasks, and the parts that follow in the file; as records and as JSON.

    BundleIndex
    |-- generator   BundledGenerator
    |-- tasks       BundledTask, by name
    `-- parts       BundlePart (digest, size), in the order of the file; the others refer to them by digest

A part has no offset of its own: it begins where the one before it ends, so parts cannot overlap or leave holes. Tasks
that share a layout, as most of a fleet do, refer to it by number. What follows from a layout (rank, parameters, target
modules) is not written, so it cannot contradict it. Equal indexes give equal bytes; reading treats them as hostile.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

from icmlora.adapter.layout import ModuleShape, target_modules
from icmlora.bundle.fields import Fields, as_count, as_digest, as_number, as_row, wrong
from icmlora.errors import AdapterRefused, BundleError, UnsafeInput
from icmlora.formats.peft.config import MAX_CONFIG_BYTES, MAX_LABEL, MAX_RANK
from icmlora.io.safetensors import FLOAT_TYPES, MAX_DIMENSION, MAX_FILE_BYTES
from icmlora.io.strict_json import parse_object
from registry.names import NLL, escape, is_file_name, is_module_name, task_name_problem

MAX_CODE_BYTES = 1024**3
MAX_VECTOR_BYTES = 64 * 1024**2
MAX_CARD_BYTES = 64 * 1024  # a longer model card is left out: nothing in it is needed to write an adapter


@dataclass(frozen=True)
class BundlePart:
    """A range of bytes in the file."""

    digest: str  # SHA-256 of its bytes, in hexadecimal; also its name
    size: int


@dataclass(frozen=True)
class BundledGenerator:
    """The generator that all codes of the bundle belong to."""

    blob: str  # its part
    version: int  # its number among the generators of its base model, from 1
    config: Mapping[str, Any]
    metrics: Mapping[str, Any]  # what its training measured


@dataclass(frozen=True)
class BundledMeasurement:
    """What was measured of a code on held-out text."""

    data: str  # SHA-256 of the text
    value: float  # the metric: `nats_per_token` in the file
    count: int  # predictions that were scored: `tokens` in the file
    utf8_bytes: int
    retained_gain: float | None
    squared_error: float | None  # `dw_error` in the file, as below
    settings: Mapping[str, Any]
    metric: str = NLL
    others: Mapping[str, float] = field(default_factory=dict)  # further figures, by name


class BundledExtra(NamedTuple):
    """What the code of a task cannot represent: packed tensors, or a packed file."""

    part: str
    file: str | None  # the file's name; None for tensors, which name themselves
    size: int  # in bytes, before packing


@dataclass(frozen=True)
class BundledVectors:
    """The task vectors of one task."""

    part: str  # their part
    extractors: tuple[Mapping[str, Any], ...]  # what made each of the views in it


@dataclass(frozen=True)
class BundledTask:
    """One task: its code, and what is known of the original adapter, which is not in the bundle."""

    name: str
    code: str  # its part
    squared_error: float | None  # square of the relative error, measured when the code was made
    weights: str  # SHA-256 of the original `adapter_model.safetensors`
    weights_size: int
    config: str  # its part: the original `adapter_config.json`
    card: str | None  # its part: the original model card, if it was short
    dtype: str  # of the original: "F32", "F16", "BF16", or several joined with "+"
    step: int | None  # the original's training step, if it is known
    is_generated: bool  # nobody trained the original: a generator made it from samples of the task
    layout: tuple[ModuleShape, ...]
    measured: BundledMeasurement | None
    template: str = ""  # what the original's format notes of its form
    extras: tuple[BundledExtra, ...] = ()
    vectors: BundledVectors | None = None
    format: str = "peft"  # of the original; a decoded adapter is written in it

    @property
    def rank_max(self) -> int:
        """Largest rank of a module."""
        return max(shape.rank for shape in self.layout)

    @property
    def parameters(self) -> int:
        """Values of the original."""
        return sum(shape.parameters for shape in self.layout)

    @property
    def target_modules(self) -> tuple[str, ...]:
        """Names as a configuration gives them."""
        return target_modules(shape.module for shape in self.layout)

    @property
    def retained_gain(self) -> float | None:
        """Retained gain of the code, if it was measured."""
        return None if self.measured is None else self.measured.retained_gain

    @property
    def precision(self) -> str | None:
        """Precision of the base model that the gain was measured on, as far as the bundle says."""
        found = None if self.measured is None else self.measured.settings.get("dtype")
        return found if isinstance(found, str) else None

    @property
    def files(self) -> tuple[str, ...]:
        """Names of the files that are written next to the adapter."""
        return tuple(extra.file for extra in self.extras if extra.file is not None)

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts that belong to this task."""
        card = () if self.card is None else (self.card,)
        vectors = () if self.vectors is None else (self.vectors.part,)
        return (self.code, self.config, *card, *(extra.part for extra in self.extras), *vectors)


@dataclass(frozen=True)
class BundleIndex:
    """Everything in a bundle but the bytes of its parts."""

    base_model: str  # label of the base model, as adapters name it
    generator: BundledGenerator
    tasks: tuple[BundledTask, ...]  # by name, without regard to case
    parts: tuple[BundlePart, ...]

    def __post_init__(self) -> None:
        """Check that names and parts fit together."""
        names = [task.name.lower() for task in self.tasks]
        if not names or names != sorted(set(names)):
            raise BundleError("the bundle's tasks are missing, out of order or duplicated")
        if len(self.sizes) != len(self.parts) or self.sizes.keys() != {digest for digest, _ in self._uses()}:
            raise BundleError("the bundle's parts do not match its tasks")
        for digest, limit in self._uses():
            if self.sizes[digest] > limit:
                message = f"a part of the bundle has {self.sizes[digest]:,} bytes, more than {limit:,}"
                raise UnsafeInput(message, kind="limits")

    @cached_property
    def sizes(self) -> Mapping[str, int]:
        """Digest -> length of every part."""
        return {part.digest: part.size for part in self.parts}

    def task(self, name: str) -> BundledTask | None:
        """Return a task by name, in any case, or None if it is not there."""
        wanted = unicodedata.normalize("NFC", name).lower()
        return next((task for task in self.tasks if task.name.lower() == wanted), None)

    def _uses(self) -> Iterator[tuple[str, int]]:
        """Yield every reference to a part, with the most bytes that it may have."""
        yield self.generator.blob, MAX_FILE_BYTES
        for task in self.tasks:
            yield task.code, MAX_CODE_BYTES
            yield task.config, MAX_CONFIG_BYTES
            if task.card is not None:
                yield task.card, MAX_CARD_BYTES
            yield from ((extra.part, MAX_FILE_BYTES) for extra in task.extras)
            if task.vectors is not None:
                yield task.vectors.part, MAX_VECTOR_BYTES


MAX_INDEX_BYTES = 32 * 1024 * 1024
MAX_TASKS = 5_000

_INDEX = ("base_model", "extractors", "generator", "layouts", "parts", "tasks")
_GENERATOR = tuple(BundledGenerator.__dataclass_fields__)
# Field -> key in the file, where they differ.
_KEYS = {"squared_error": "dw_error", "value": "nats_per_token", "count": "tokens"}
_TASK = tuple(_KEYS.get(name, name) for name in BundledTask.__dataclass_fields__)
_FORMAT = re.compile(r"[a-z0-9_-]+")
_MEASURED = tuple(_KEYS.get(name, name) for name in BundledMeasurement.__dataclass_fields__)

Layout = tuple[ModuleShape, ...]


def index_to_json(index: BundleIndex) -> bytes:
    """Serialise an index."""
    layouts = list(dict.fromkeys(task.layout for task in index.tasks))
    numbers = {layout: number for number, layout in enumerate(layouts)}
    extractors = _extractors(index)
    fields = {
        "base_model": index.base_model,
        "extractors": extractors,
        "generator": vars(index.generator),
        "layouts": layouts,
        "parts": [[part.digest, part.size] for part in index.parts],
        "tasks": [_task_fields(task, numbers[task.layout], extractors) for task in index.tasks],
    }
    return json.dumps(fields, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")


def index_from_json(data: bytes) -> BundleIndex:
    """Read what `index_to_json` wrote.

    Raises:
        BundleError: It has other fields or values than this format.
        UnsafeInput: It breaks a limit, or has a name that is none.
    """
    parsed = _object(data, "the bundle's index", MAX_INDEX_BYTES)
    fields = Fields(parsed, _INDEX, "the bundle's index")
    tasks = fields.entries("tasks")
    if len(tasks) > MAX_TASKS:
        raise UnsafeInput(f"the bundle has {len(tasks):,} tasks, more than {MAX_TASKS:,}", kind="limits")
    layouts = [_layout(entry) for entry in fields.entries("layouts")]
    extractors = [_extractor(entry) for entry in fields.entries("extractors")]
    return BundleIndex(
        base_model=fields.text("base_model", MAX_LABEL),
        generator=_generator(fields.mapping("generator")),
        tasks=tuple(_task(entry, layouts, extractors) for entry in tasks),
        parts=tuple(_part(entry) for entry in fields.entries("parts")),
    )


def _object(data: bytes, what: str, limit: int) -> dict[str, Any]:
    try:
        return parse_object(data, what=what, max_bytes=limit)
    except UnsafeInput:
        raise
    except AdapterRefused as error:
        raise BundleError(error.message) from None


def _extractors(index: BundleIndex) -> list[Mapping[str, Any]]:
    """Return what made the vectors of the tasks, each once, in the order in which tasks name them."""
    found: list[Mapping[str, Any]] = []
    for task in index.tasks:
        for extractor in () if task.vectors is None else task.vectors.extractors:
            if extractor not in found:
                found.append(extractor)
    return found


def _task_fields(task: BundledTask, layout: int, extractors: list[Mapping[str, Any]]) -> dict[str, Any]:
    measured = None if task.measured is None else _under_keys(task.measured)
    vectors = None
    if task.vectors is not None:
        vectors = [task.vectors.part, [extractors.index(one) for one in task.vectors.extractors]]
    return {**_under_keys(task), "layout": layout, "measured": measured, "vectors": vectors}


def _under_keys(record: BundledTask | BundledMeasurement) -> dict[str, Any]:
    return {_KEYS.get(name, name): value for name, value in vars(record).items()}


def _generator(value: object) -> BundledGenerator:
    fields = Fields(value, _GENERATOR, "the bundle's generator")
    return BundledGenerator(
        blob=fields.digest("blob"),
        version=fields.count("version", least=1),
        config=fields.mapping("config"),
        metrics=fields.mapping("metrics"),
    )


def _task(value: object, layouts: Sequence[Layout], extractors: Sequence[Mapping[str, Any]]) -> BundledTask:
    what = "a task of the bundle"
    fields = Fields(value, _TASK, what)
    name = fields.text("name", limit=1024)
    if (problem := task_name_problem(name)) is not None:
        raise UnsafeInput(f"{escape(name, 120)!r} is not a task name: {problem}", kind="name")
    dtype = fields.text("dtype", limit=64)
    if dtype != "+".join(sorted(set(dtype.split("+")) & FLOAT_TYPES)):
        raise wrong(dtype, "a task of the bundle: dtype")
    form = fields.text("format", limit=32)
    if not _FORMAT.fullmatch(form):
        raise wrong(form, "a task of the bundle: format")
    layout = fields.count("layout")
    if layout >= len(layouts):
        raise wrong(layout, "a task of the bundle: layout")
    return BundledTask(
        name=name,
        code=fields.digest("code"),
        squared_error=_squared_error(fields),
        weights=fields.digest("weights"),
        weights_size=fields.count("weights_size", least=1),
        config=fields.digest("config"),
        card=fields.optional("card", fields.digest),
        dtype=dtype,
        step=fields.optional("step", fields.count),
        is_generated=fields.flag("is_generated"),
        layout=layouts[layout],
        measured=_measured(fields.optional("measured", fields.mapping)),
        template=_template(fields.optional_text("template", limit=MAX_CONFIG_BYTES)),
        extras=tuple(_extra(entry) for entry in fields.entries("extras")),
        vectors=_vectors(fields.optional("vectors", fields.entries), extractors),
        format=form,
    )


def _vectors(value: list[Any] | None, extractors: Sequence[Mapping[str, Any]]) -> BundledVectors | None:
    if value is None:
        return None
    part, listed = as_row(value, 2, "the vectors of a task")
    if not isinstance(listed, list) or not listed:
        raise wrong(value, "the vectors of a task")
    numbers = [as_count(number, "an extractor of a task") for number in listed]
    views = [extractors[number].get("view") for number in numbers if number < len(extractors)]
    if len(views) < len(numbers) or len(set(views)) < len(views):
        raise wrong(value, "the vectors of a task")
    return BundledVectors(as_digest(part, "the digest of vectors"), tuple(extractors[number] for number in numbers))


def _extractor(value: object) -> Mapping[str, Any]:
    if not isinstance(value, dict) or value.get("view") not in ("adapted", "context"):
        raise wrong(value, "an extractor of the bundle")
    return value


def _squared_error(fields: Fields) -> float | None:
    value = fields.optional("dw_error", fields.number)
    if value is not None and value < 0:
        raise wrong(value, "an error of the bundle: dw_error")
    return value


def _template(text: str | None) -> str:
    if text is None:
        return ""
    _object(text.encode(), "a template of the bundle", MAX_CONFIG_BYTES)
    return text


def _extra(value: object) -> BundledExtra:
    part, file, size = as_row(value, 3, "an extra of the bundle")
    if file is not None and (not isinstance(file, str) or not is_file_name(file)):
        raise UnsafeInput(f"{escape(str(file), 120)!r} is not a file name", kind="name")
    return BundledExtra(as_digest(part, "an extra's digest"), file, as_count(size, "an extra's size"))


def _measured(value: Mapping[str, Any] | None) -> BundledMeasurement | None:
    if value is None:
        return None
    fields = Fields(value, _MEASURED, "a measurement of the bundle")
    return BundledMeasurement(
        data=fields.digest("data"),
        value=fields.number("nats_per_token"),
        count=fields.count("tokens"),
        utf8_bytes=fields.count("utf8_bytes"),
        retained_gain=fields.optional("retained_gain", fields.number),
        squared_error=_squared_error(fields),
        settings=fields.mapping("settings"),
        metric=fields.text("metric", limit=100),
        others={name: as_number(value, "a figure of the bundle") for name, value in fields.mapping("others").items()},
    )


def _part(value: object) -> BundlePart:
    digest, size = as_row(value, 2, "a part of the bundle")
    return BundlePart(as_digest(digest, "a part's digest"), as_count(size, "a part's size"))


def _layout(value: object) -> Layout:
    if not isinstance(value, list) or not value:
        raise wrong(value, "a layout of the bundle")
    shapes = tuple(_shape(entry) for entry in value)
    if len({shape.module for shape in shapes}) != len(shapes):
        raise BundleError("a layout of the bundle names a module twice")
    return shapes


def _shape(value: object) -> ModuleShape:
    module, rank, inputs, outputs = as_row(value, 4, "a module of the bundle")
    if not isinstance(module, str) or len(module) > 512 or not is_module_name(module):
        raise UnsafeInput(f"{escape(str(module), 120)!r} is not a module name", kind="name")
    sizes = [as_count(size, f"{module} of the bundle", least=1) for size in (rank, inputs, outputs)]
    if sizes[0] > MAX_RANK or max(sizes) > MAX_DIMENSION:
        raise UnsafeInput(f"{module} of the bundle has the shape {sizes}", kind="limits")
    return ModuleShape(module, *sizes)
