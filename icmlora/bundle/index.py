"""The contents of a bundle: the manifests of a generator and its tasks, and the blobs that they reference.

    directory   {"generator": digest, "tasks": [digest, ...], "parts": [[digest, size], ...]}, deflated JSON
    parts       the manifests, the documents that they share, then blobs, each once

A part has no offset: it begins at the end of the previous one, so parts cannot overlap or leave gaps. Bundles are
untrusted, so manifests are parsed by the registry's strict reader and then checked against the limits below.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple, cast

from icmlora.adapter.layout import ModuleShape, target_modules
from icmlora.adapter.module_groups import blocks_of
from icmlora.errors import AdapterRefused, BundleError, UnsafeInput
from icmlora.formats.peft.config import MAX_CONFIG_BYTES, MAX_LABEL, MAX_RANK
from icmlora.io.safetensors import FLOAT_TYPES, MAX_DIMENSION, MAX_FILE_BYTES
from icmlora.io.strict_json import parse_object
from registry import encoding
from registry.errors import DamagedStore
from registry.manifests import Claim, Code, File, Generator, Measurement, Part, State, StoredAdapter, Task, is_digest
from registry.names import escape, is_file_name, is_module_name, task_name_problem

MAX_CODE_BYTES = 1024**3
MAX_VECTOR_BYTES = 64 * 1024**2
MAX_CARD_BYTES = 64 * 1024  # a longer model card is omitted: adapters can be written without it
MAX_DIRECTORY_BYTES = 32 * 1024**2
MAX_TEXT_BYTES = 64 * 1024**2
"""All manifests and documents together, inflated."""
MAX_TASKS = 5_000
MAX_COUNT = 2**53  # larger numbers differ between JSON readers, and databases do not take them
_MAX_MODULE_NAME = 512
_FORMAT = re.compile(r"[a-z0-9_-]{1,32}")
_CLAIMED = ("data", "value", "count", "utf8_bytes", "retained_gain", "squared_error", "settings", "metric", "others")


@dataclass(frozen=True)
class BundleIndex:
    """The manifests of a bundle."""

    generator: Generator
    tasks: tuple[Task, ...]  # by name, in any case
    parts: tuple[File, ...]  # in the order of the file

    @property
    def base_model(self) -> str:
        """The base model's name in the adapters."""
        return self.generator.base_model

    @cached_property
    def _by_name(self) -> Mapping[str, Task]:
        return {task.name.lower(): task for task in self.tasks}

    def task(self, name: str) -> Task | None:
        """Return a task by name, in any case, or None if it is not there."""
        return self._by_name.get(unicodedata.normalize("NFC", name).lower())


class Directory(NamedTuple):
    """Digests of the manifests, and all parts in the order of the file."""

    generator: str
    tasks: Sequence[str]
    parts: tuple[File, ...]


# Writing.


def bundled_generator(generator: Generator) -> Generator:
    """Return a generator without the facts that are specific to its store."""
    kept = ("base_model", "version", "blob", "config", "metrics")
    return Generator(**{name: getattr(generator, name) for name in kept}, created_at="")


def bundled_task(task: Task) -> Task:
    """Return a task without the facts that are specific to its store: locations, notes, texts and history.

    Its original counts as evicted, and the quality of its code becomes a claim that the reader has not measured.
    Idempotent.
    """
    final, code = task.final, task.code
    assert code is not None
    kept = ("weights", "config", "card", "step", "is_generated", "dtype", "layout", "format", "template")
    facts: dict[str, Any] = {name: getattr(final, name) for name in kept}
    shapes, targets = [ModuleShape(*entry) for entry in final.layout], _targets(final)
    original = StoredAdapter(
        **facts,
        extras=tuple(replace(extra, more={}) for extra in final.extras),
        rank_max=max((shape.rank for shape in shapes), default=0),
        parameters=sum(shape.parameters for shape in shapes),
        target_modules=final.target_modules if final.target_modules in targets else targets[0],
        source="",
        created_at="",
        evicted_at="",
    )
    return Task(
        name=task.name,
        base_model=task.base_model,
        final=original,
        vectors=tuple(replace(vector, more={}) for vector in task.vectors),
        code=Code(blob=code.blob, generator=code.generator, claim=_claim(task, code)),
        created_at="",
    )


def _targets(final: StoredAdapter) -> list[tuple[str, ...]]:
    """Return the valid target modules of an adapter with these modules: blocks for image models."""
    names = [module for module, *_ in final.layout]
    return [target_modules(names), blocks_of(names)]


def _claim(task: Task, code: Code) -> Claim | None:
    measured, known = task.quality, code.claim or Claim()  # an imported code that was not measured here
    error = known.squared_error if code.squared_error is None else code.squared_error
    figures = known.measured if measured is None else {name: getattr(measured, name) for name in _CLAIMED}
    return None if error is None and figures is None else Claim(squared_error=error, measured=figures)


def contents(generator: Generator, tasks: Sequence[Task]) -> tuple[BundleIndex, bytes, dict[str, bytes]]:
    """Return the index of a bundle, its directory, and digest -> bytes of its manifests and documents."""
    tasks = sorted(tasks, key=lambda task: task.name.lower())
    made, documents = dict[str, bytes](), dict[str, bytes]()
    for state in (generator, *tasks):
        data, shared, _ = encoding.encode(state)
        made[hashlib.sha256(data).hexdigest()] = data
        documents |= shared
    digests = list(made)
    made |= documents
    blobs = dict.fromkeys(file for state in (generator, *tasks) for file, _ in _uses(state))
    parts = (*(File(digest, len(data)) for digest, data in made.items()), *blobs)
    directory = {"generator": digests[0], "tasks": digests[1:], "parts": [[str(part), part.size] for part in parts]}
    return BundleIndex(generator, tuple(tasks), parts), encoding.packed(directory), made


def _uses(state: State) -> Iterator[tuple[File, int]]:
    """Yield every blob that a state references, with its size limit in bytes."""
    if isinstance(state, Generator):
        yield state.blob, MAX_FILE_BYTES
    elif isinstance(state, Task) and state.code is not None:
        yield state.code.blob, MAX_CODE_BYTES
        yield state.final.config, MAX_CONFIG_BYTES
        if state.final.card is not None:
            yield state.final.card, MAX_CARD_BYTES
        yield from ((extra.blob, MAX_FILE_BYTES) for extra in state.final.extras)
        yield from ((vector.blob, MAX_VECTOR_BYTES) for vector in state.vectors)


def blobs_of(state: State) -> list[File]:
    """Return the blobs that a generator or a task of a bundle references."""
    return [file for file, _ in _uses(state)]


# Reading.


def read_directory(data: bytes) -> Directory:
    """Read the directory of a bundle.

    Raises:
        BundleError: It is not valid.
        UnsafeInput: It exceeds a limit.
    """
    fields, _ = _json(data, "the bundle's directory", MAX_DIRECTORY_BYTES)
    try:
        parts = tuple(File(digest, size) for digest, size in fields["parts"])
        found = Directory(fields["generator"], fields["tasks"], parts)
        if fields.keys() != set(Directory._fields):
            raise ValueError("it has other keys")
        if not all(map(is_digest, (found.generator, *found.tasks, *parts))):
            raise ValueError("a digest is not valid")
        if not all(type(part.size) is int and part.size >= 0 for part in parts):
            raise ValueError("a size is not valid")
    except (KeyError, TypeError, ValueError) as error:
        raise BundleError(f"the bundle's directory is not valid: {escape(str(error), 120)}") from None
    if len(found.tasks) > MAX_TASKS:
        raise UnsafeInput(f"the bundle has {len(found.tasks):,} tasks, more than {MAX_TASKS:,}", kind="limits")
    if len(set(parts)) != len(parts):
        raise BundleError("the bundle has a part twice")
    return found


def read_index(directory: Directory, read: Callable[[str], bytes]) -> BundleIndex:
    """Read the manifests of a bundle; `read` returns the verified bytes of a part.

    Raises:
        BundleError: A manifest is not valid, or the parts do not match the manifests.
        UnsafeInput: A manifest exceeds a limit, or has an invalid name.
    """
    sizes, left = {str(part): part.size for part in directory.parts}, MAX_TEXT_BYTES
    documents = dict[tuple[type[Part], str], Mapping[str, Any]]()
    used = {directory.generator, *directory.tasks}

    def text(digest: str) -> bytes:
        nonlocal left
        if not sizes.get(digest, left + 1) <= left:
            raise BundleError("the bundle's parts do not match its manifests")
        data = read(digest)
        left -= _json(data, "a manifest of the bundle", left)[1]
        return data

    def shared(kind: type[Part], file: File) -> Mapping[str, Any]:
        key = kind, str(file)
        if key not in documents:
            used.add(str(file))
            documents[key] = encoding.read_shared(kind, text(file))
        return documents[key]

    try:
        generator, *tasks = (
            encoding.decode(text(digest), shared, digest) for digest in (directory.generator, *directory.tasks)
        )
    except (DamagedStore, ArithmeticError, LookupError, TypeError, ValueError) as error:
        raise BundleError(f"a manifest of the bundle is not valid: {escape(str(error), 200)}") from None
    if not isinstance(generator, Generator) or not all(isinstance(task, Task) for task in tasks):
        raise BundleError("the bundle has other manifests than a generator and its tasks")
    index = BundleIndex(generator, tuple(cast(list[Task], tasks)), directory.parts)
    _check(index, sizes, used)
    return index


def _json(data: bytes, what: str, limit: int) -> tuple[dict[str, Any], int]:
    """Return the object in deflated JSON, which every parser reads alike, and the length of its text."""
    try:
        inflate = zlib.decompressobj()
        text = inflate.decompress(data, limit + 1)
        if len(text) <= limit and (not inflate.eof or inflate.unused_data):
            raise BundleError(f"{what} is truncated, or followed by other bytes")
        return parse_object(text, what=what, max_bytes=limit), len(text)
    except UnsafeInput:
        raise
    except (AdapterRefused, zlib.error) as error:
        raise BundleError(f"{what} is not valid: {escape(str(error), 200)}") from None


def _check(index: BundleIndex, sizes: Mapping[str, int], used: set[str]) -> None:
    generator, names = index.generator, [task.name.lower() for task in index.tasks]
    if not names or names != sorted(set(names)):
        raise BundleError("the bundle's tasks are missing, out of order or duplicated")
    uses = [use for state in (generator, *index.tasks) for use in _uses(state)]
    if sizes.keys() != used | {str(file) for file, _ in uses}:
        raise BundleError("the bundle's parts do not match its manifests")
    for file, limit in uses:
        if file.size != sizes[file]:
            raise BundleError(f"part {file[:12]} of the bundle has another size than its manifest states")
        if file.size > limit:
            message = f"a part of the bundle has {file.size:,} bytes, more than {limit:,}"
            raise UnsafeInput(message, kind="limits")
    if generator != bundled_generator(generator) or not 1 <= generator.version <= MAX_COUNT:
        raise BundleError("the bundle's generator has more than a bundle may hold, or no valid version")
    if not 1 <= len(generator.base_model) <= MAX_LABEL:
        raise BundleError("the bundle's generator has no valid base model")
    layouts = set[tuple[Any, ...]]()
    for task in index.tasks:
        _check_task(task, generator)
        if task.final.layout not in layouts:  # most tasks of a fleet share one
            _check_layout(task.final)
            layouts.add(task.final.layout)
        if task != bundled_task(task):
            fact = "has more than a bundle may hold, or its description contradicts its layout"
            raise BundleError(f"task {task.name!r} {fact}")


def _check_task(task: Task, generator: Generator) -> None:
    name, final, code = task.name, task.final, task.code
    if (problem := task_name_problem(name)) is not None:
        raise UnsafeInput(f"{escape(name, 120)!r} is not a task name: {problem}", kind="name")
    if code is None or code.generator != generator.blob or task.base_model != generator.base_model:
        raise BundleError(f"the code of {name!r} belongs to another generator")
    if not final.dtype or final.dtype != "+".join(sorted(set(final.dtype.split("+")) & FLOAT_TYPES)):
        raise BundleError(f"task {name!r} has the unknown number format {escape(final.dtype, 40)!r}")
    if not _FORMAT.fullmatch(final.format):
        raise BundleError(f"task {name!r} has the unknown format {escape(final.format, 40)!r}")
    for extra in final.extras:
        if extra.file is not None and not is_file_name(extra.file):
            raise UnsafeInput(f"{escape(extra.file, 120)!r} is not a file name", kind="name")
    counts = [final.weights.size - 1, final.step or 0, *(extra.size for extra in final.extras)]
    counts += [number for vector in task.vectors for number in (vector.support_set, vector.dim - 1)]
    if not all(0 <= count < MAX_COUNT for count in counts):
        raise BundleError(f"task {name!r} has an impossible size, step or number")
    if final.template:
        try:
            parse_object(final.template.encode(), what="a template of the bundle", max_bytes=MAX_CONFIG_BYTES)
        except UnsafeInput:
            raise
        except AdapterRefused as error:
            raise BundleError(error.message) from None
    views = [(vector.view, vector.support_set) for vector in task.vectors]
    if len(set(views)) < len(views) or any(vector.extractor.get("view") != vector.view for vector in task.vectors):
        raise BundleError(f"the vectors of {name!r} do not match their descriptions")
    if code.claim is not None:
        _check_claim(name, code.claim)


def _check_claim(name: str, claim: Claim) -> None:
    try:
        if (claim.squared_error or 0.0) < 0:
            raise ValueError("an error is below 0")
        if claim.measured is not None:
            if claim.measured.keys() != set(_CLAIMED):
                raise ValueError("other figures")
            measured = encoding.read(Measurement, {"source": "code", **claim.measured})
            if not is_digest(measured.data) or any(type(one) is not float for one in measured.others.values()):
                raise ValueError("not a figure")
    except (ArithmeticError, LookupError, TypeError, ValueError):
        raise BundleError(f"the bundle states an impossible figure for {name!r}") from None


def _check_layout(final: StoredAdapter) -> None:
    names = [module for module, *_ in final.layout]
    if not names or len(set(names)) != len(names):
        raise BundleError("a layout of the bundle is empty or names a module twice")
    for module, *sizes in final.layout:
        if len(module) > _MAX_MODULE_NAME or not is_module_name(module):
            raise UnsafeInput(f"{escape(module, 120)!r} is not a module name", kind="name")
        if min(sizes) < 1 or sizes[0] > MAX_RANK or max(sizes) > MAX_DIMENSION:
            raise UnsafeInput(f"{module} of the bundle has the shape {sizes}", kind="limits")


def imported(task: Task, *, source: str, base_model: str, label: str | None, moment: str) -> Task:
    """Return a task of a bundle as it is recorded in a store."""
    final = replace(task.final, source=source, created_at=moment, evicted_at=moment)
    return replace(task, final=final, base_model=base_model, label=label, created_at=moment, manifest=None)
