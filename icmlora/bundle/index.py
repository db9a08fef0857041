"""The contents of a bundle as manifests: one generator, the tasks that it decodes, and the parts that they name.

    directory   {"generator": digest, "tasks": [digest, ...], "parts": [[digest, size], ...]}, deflated JSON
    parts       the manifests, the documents that they share, then blobs, each once

A part has no offset: it begins where the one before it ends, so parts cannot overlap or leave holes. Manifests are read
by the registry's own strict reader, and then held against the limits of this file: a bundle is a file from outside.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, cast

from icmlora.adapter.layout import ModuleShape, target_modules
from icmlora.adapter.module_groups import blocks_of
from icmlora.errors import AdapterRefused, BundleError, UnsafeInput
from icmlora.formats.peft.config import MAX_CONFIG_BYTES, MAX_LABEL, MAX_RANK
from icmlora.io.safetensors import FLOAT_TYPES, MAX_DIMENSION, MAX_FILE_BYTES
from icmlora.io.strict_json import parse_object
from registry.errors import DamagedStore
from registry.manifests import (
    Adapter,
    Claim,
    Code,
    File,
    Generator,
    Measurement,
    Part,
    State,
    Task,
    Vector,
    decode,
    encode,
    is_digest,
    packed,
    read_shared,
    unpacked,
)
from registry.names import escape, is_file_name, is_module_name, task_name_problem

MAX_CODE_BYTES = 1024**3
MAX_VECTOR_BYTES = 64 * 1024**2
MAX_CARD_BYTES = 64 * 1024  # a longer model card is left out: nothing in it is needed to write an adapter
MAX_DIRECTORY_BYTES = 32 * 1024**2
MAX_MANIFEST_BYTES = 4 * 1024**2
MAX_TASKS = 5_000
_FORMAT = re.compile(r"[a-z0-9_-]{1,32}")
_CLAIMED = ("data", "value", "count", "utf8_bytes", "retained_gain", "squared_error", "settings", "metric", "others")


@dataclass(frozen=True)
class BundleIndex:
    """Everything in a bundle but its blobs."""

    generator: Generator
    tasks: tuple[Task, ...]  # by name, in any case
    parts: tuple[File, ...]  # in the order of the file

    @property
    def base_model(self) -> str:
        """The name that the adapters give their base model."""
        return self.generator.base_model

    @cached_property
    def sizes(self) -> Mapping[str, int]:
        """Digest -> length of every part."""
        return {str(part): part.size for part in self.parts}

    def task(self, name: str) -> Task | None:
        """Return a task by name, in any case, or None if it is not there."""
        wanted = unicodedata.normalize("NFC", name).lower()
        return next((task for task in self.tasks if task.name.lower() == wanted), None)


# Writing.


def bundled_generator(generator: Generator) -> Generator:
    """Return a generator without anything that is only true in its store."""
    kept = {"base_model", "version", "blob", "config", "metrics"}
    return Generator(**{name: getattr(generator, name) for name in kept}, created_at="")


def bundled_task(task: Task, generator: Generator, vectors: Sequence[Vector], *, with_card: bool) -> Task:
    """Return a task without anything that is only true in its store: places, notes, texts and history.

    Its original counts as evicted, and the quality of its code is a claim: nobody who reads it has measured that.
    """
    assert task.code is not None
    kept = (*Adapter.SHARED, "weights", "config", "extras", "step", "is_generated")
    final = Adapter(
        **{name: getattr(task.final, name) for name in kept},
        card=task.final.card if with_card else None,
        source="",
        created_at="",
        evicted_at="",
    )
    code = Code(blob=task.code.blob, generator=generator.blob, claim=_claim(task))
    return Task(
        name=task.name, base_model=generator.base_model, final=final, vectors=tuple(vectors), code=code, created_at=""
    )


def _claim(task: Task) -> Claim | None:
    assert task.code is not None
    measured: Measurement | None = task.quality
    known = task.code.claim or Claim()  # of an imported code that nobody has measured since
    error = known.squared_error if task.code.squared_error is None else task.code.squared_error
    figures = known.measured if measured is None else {name: getattr(measured, name) for name in _CLAIMED}
    return None if error is None and figures is None else Claim(squared_error=error, measured=figures)


def contents(generator: Generator, tasks: Sequence[Task]) -> tuple[BundleIndex, bytes, dict[str, bytes]]:
    """Return the index of a bundle, its directory, and digest -> bytes of manifests and documents."""
    tasks = sorted(tasks, key=lambda task: task.name.lower())
    made, digests = dict[str, bytes](), list[str]()
    documents = dict[str, bytes]()
    for state in (generator, *tasks):
        data, shared = encode(state)
        digests.append(_sha256(data))
        made[digests[-1]] = data
        documents |= shared
    made |= documents
    small = [File(digest, len(data)) for digest, data in made.items()]
    blobs = dict.fromkeys(file for state in (generator, *tasks) for file, _ in _uses(state))
    parts = tuple(small + [file for file in blobs if file not in made])
    directory = {"generator": digests[0], "tasks": digests[1:], "parts": [[str(part), part.size] for part in parts]}
    return BundleIndex(generator, tuple(tasks), parts), packed(directory), made


def _sha256(data: bytes) -> str:
    from hashlib import sha256

    return sha256(data).hexdigest()


def _uses(state: State) -> Iterator[tuple[File, int]]:
    """Yield every blob that a state of a bundle names, with the most bytes that it may have."""
    if isinstance(state, Generator):
        yield state.blob, MAX_FILE_BYTES
    elif isinstance(state, Task) and state.code is not None:
        yield state.code.blob, MAX_CODE_BYTES
        yield state.final.config, MAX_CONFIG_BYTES
        if state.final.card is not None:
            yield state.final.card, MAX_CARD_BYTES
        yield from ((extra.blob, MAX_FILE_BYTES) for extra in state.final.extras)
        yield from ((vector.blob, MAX_VECTOR_BYTES) for vector in state.vectors)


# Reading.


class Directory:
    """The directory of a bundle: which parts there are, before any of them is read.

    Raises:
        BundleError: It has other values than this format.
        UnsafeInput: It breaks a limit.
    """

    def __init__(self, data: bytes) -> None:
        try:
            fields = unpacked(data, MAX_DIRECTORY_BYTES)
            self.generator, self.tasks = fields["generator"], fields["tasks"]
            self.parts = tuple(File(digest, size) for digest, size in fields["parts"])
            named = (self.generator, *self.tasks, *self.parts)
            if fields.keys() != {"generator", "tasks", "parts"} or not all(map(is_digest, named)):
                raise ValueError("other fields")
            if not all(type(part.size) is int and part.size >= 0 for part in self.parts):
                raise ValueError("a part has no length")
        except (DamagedStore, KeyError, TypeError, ValueError, AttributeError) as error:
            raise BundleError(f"the bundle's directory does not have the values of this format: {error}") from None
        if len(self.tasks) > MAX_TASKS:
            raise UnsafeInput(f"the bundle has {len(self.tasks):,} tasks, more than {MAX_TASKS:,}", kind="limits")
        if len(set(self.parts)) != len(self.parts):
            raise BundleError("the bundle has a part twice")

    def index(self, read: Mapping[str, bytes]) -> BundleIndex:
        """Read the manifests, given digest -> bytes of those and of the documents that they share.

        Raises:
            BundleError: A manifest is not one of this format, or the parts are not those that they name.
            UnsafeInput: A manifest breaks a limit, or has a name that is none.
        """
        documents = set[str]()

        def shared(kind: type[Part], file: File) -> Mapping[str, Any]:
            documents.add(str(file))
            return read_shared(kind, read[file])

        states = list[State]()
        for digest in (self.generator, *self.tasks):
            try:
                states.append(decode(read[digest], shared))
            except (DamagedStore, KeyError, TypeError, ValueError) as error:
                raise BundleError(f"a manifest of the bundle cannot be read: {error}") from None
        generator, tasks = states[0], cast(list[Task], states[1:])
        if not isinstance(generator, Generator) or not all(isinstance(task, Task) for task in tasks):
            raise BundleError("the bundle has manifests of other kinds than a generator and its tasks")
        index = BundleIndex(generator, tuple(tasks), self.parts)
        _check(index, {self.generator, *self.tasks, *documents})
        return index

    @property
    def small(self) -> list[File]:
        """The parts that may be manifests or documents."""
        return [part for part in self.parts if part.size <= MAX_MANIFEST_BYTES]


def _check(index: BundleIndex, manifests: set[str]) -> None:
    names = [task.name.lower() for task in index.tasks]
    if not names or names != sorted(set(names)):
        raise BundleError("the bundle's tasks are missing, out of order or duplicated")
    uses = [use for state in (index.generator, *index.tasks) for use in _uses(state)]
    if index.sizes.keys() != manifests | {str(file) for file, _ in uses}:
        raise BundleError("the bundle's parts do not match its tasks")
    for file, limit in uses:
        if file.size != index.sizes[file]:
            raise BundleError(f"part {file[:12]} of the bundle has another size than its manifest states")
        if file.size > limit:
            message = f"a part of the bundle has {file.size:,} bytes, more than {limit:,}"
            raise UnsafeInput(message, kind="limits")
    if not 1 <= len(index.base_model) <= MAX_LABEL or index.generator.version < 1:
        raise BundleError("the bundle's generator has no valid base model or version")
    layouts = set[tuple[Any, ...]]()
    for task in index.tasks:
        _check_task(task, index.generator)
        if task.final.layout not in layouts:  # most of a fleet have one
            _check_layout(task.final)
            layouts.add(task.final.layout)


def _check_task(task: Task, generator: Generator) -> None:
    if (problem := task_name_problem(task.name)) is not None:
        raise UnsafeInput(f"{escape(task.name, 120)!r} is not a task name: {problem}", kind="name")
    final, code = task.final, task.code
    if code is None or code.generator != generator.blob or task.base_model != generator.base_model:
        raise BundleError(f"the code of {task.name!r} belongs to another generator")
    only_in_stores = (final.initial, task.samples, task.eval_data, task.note, task.label, final.original_only)
    if any(value is not None for value in only_in_stores) or task.checkpoints or task.measured or not final.is_evicted:
        raise BundleError(f"task {task.name!r} has more than a bundle may hold")
    if final.dtype != "+".join(sorted(set(final.dtype.split("+")) & FLOAT_TYPES)) or not final.dtype:
        raise BundleError(f"task {task.name!r} has the unknown number format {escape(final.dtype, 40)!r}")
    if not _FORMAT.fullmatch(final.format):
        raise BundleError(f"task {task.name!r} has the unknown format {escape(final.format, 40)!r}")
    if final.weights.size < 1 or (final.step or 0) < 0:
        raise BundleError(f"the original of {task.name!r} has an impossible size or step")
    for extra in final.extras:
        if extra.file is not None and not is_file_name(extra.file):
            raise UnsafeInput(f"{escape(extra.file, 120)!r} is not a file name", kind="name")
        if extra.size < 0:
            raise BundleError(f"an extra of {task.name!r} has a negative size")
    if final.template:
        try:
            parse_object(final.template.encode(), what="a template of the bundle", max_bytes=MAX_CONFIG_BYTES)
        except UnsafeInput:
            raise
        except AdapterRefused as error:
            raise BundleError(error.message) from None
    views = [(vector.view, vector.support_set) for vector in task.vectors]
    if len(set(views)) < len(views) or any(vector.extractor.get("view") != vector.view for vector in task.vectors):
        raise BundleError(f"the vectors of {task.name!r} do not match their descriptions")
    _check_claim(task.name, code.claim)


def _check_claim(name: str, claim: Claim | None) -> None:
    if claim is None:
        return
    numbers = [claim.squared_error, *(claim.measured or {}).values()]
    if any(isinstance(number, float) and not math.isfinite(number) for number in numbers):
        raise BundleError(f"the bundle states an impossible figure for {name!r}")
    measured = claim.measured
    if (claim.squared_error or 0.0) < 0 or (measured is not None and measured.keys() != set(_CLAIMED)):
        raise BundleError(f"the bundle states an impossible figure for {name!r}")
    if measured is not None:
        try:
            Measurement(source="code", **measured)  # type: ignore[arg-type]
            is_right = all(isinstance(measured[key], dict) for key in ("settings", "others"))
            is_right &= isinstance(measured["value"], float) and is_digest(str(measured["data"]))
            is_right &= isinstance(measured["retained_gain"], float | None) and isinstance(measured["metric"], str)
        except TypeError:
            is_right = False
        if not is_right:
            raise BundleError(f"the bundle states an impossible figure for {name!r}")


def _check_layout(final: Adapter) -> None:
    """Check the modules of an adapter, and what follows from them."""
    names = [module for module, *_ in final.layout]
    if not names or len(set(names)) != len(names):
        raise BundleError("a layout of the bundle is empty or names a module twice")
    for module, *sizes in final.layout:
        if len(module) > 512 or not is_module_name(module):
            raise UnsafeInput(f"{escape(module, 120)!r} is not a module name", kind="name")
        if min(sizes) < 1:
            raise BundleError(f"{module} of the bundle has the shape {sizes}")
        if sizes[0] > MAX_RANK or max(sizes) > MAX_DIMENSION:
            raise UnsafeInput(f"{module} of the bundle has the shape {sizes}", kind="limits")
    shapes = [ModuleShape(*entry) for entry in final.layout]
    # As ingesting its original would name them.
    targets = {tuple(target_modules(names)), tuple(blocks_of(names))}
    facts = max(shape.rank for shape in shapes), sum(shape.parameters for shape in shapes)
    if (final.rank_max, final.parameters) != facts or final.target_modules not in targets:
        raise BundleError("a layout of the bundle contradicts the description of its adapter")


def imported(task: Task, *, source: str, base_model: str, label: str | None, moment: str) -> Task:
    """Return a task of a bundle as a store takes it."""
    final = replace(task.final, source=source, created_at=moment, evicted_at=moment)
    return replace(task, final=final, base_model=base_model, label=label, created_at=moment)
