"""Placeholders: small files that replace adapters and describe how to restore them.

    loras/poems/adapter_model.safetensors, adapter_config.json  ->  loras/poems/icm-placeholder.json
    loras/rust.toy, an adapter in a single file                 ->  loras/rust.icm-placeholder.json

A placeholder is JSON with sorted keys: the task, the store, the digests of weights, configuration and code, and the
files it replaces. It is untrusted: no name in it may lead out of its folder, and the store it names is shown to the
user, but never opened because of it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from icmlora.errors import AdapterRefused, OtherFormat, located
from icmlora.io.files import read_regular
from icmlora.io.strict_json import parse_object
from registry.names import escape, is_file_name, is_text, task_name_problem

if TYPE_CHECKING:
    from icmlora.formats.discovery.tree import Folder

PLACEHOLDER_NAME = "icm-placeholder.json"
VERSION = 2
MAX_BYTES = 64 * 1024
MAX_FILES = 64
_MAX_PATH = 4096
_MAX_ABOUT = 2000
_MAX_COUNT = 2**53  # JSON parsers disagree on larger integers

_DIGEST = re.compile(r"[0-9a-f]{64}")
_STAMP = frozenset({"sha256", "size"})
_FORMAT = re.compile(r"[a-z0-9_-]{1,32}")
_ABOUT = (
    "This file replaces an adapter that icm keeps in the store and task named below. "
    "Run `icm restore` with the path of this folder to restore it."
)

Part = Literal["weights", "config", "companion"]


@dataclass(frozen=True)
class FileStamp:
    """Digest and size that identify a file."""

    digest: str  # SHA-256 in hexadecimal
    size: int  # in bytes


@dataclass(frozen=True)
class ReplacedFile:
    """A file that the placeholder replaces."""

    name: str  # in the folder of the placeholder
    part: Part
    stamp: FileStamp


@dataclass(frozen=True)
class CodeStamp:
    """The adapter's code in the store when the placeholder was written."""

    code: FileStamp
    generator: FileStamp


@dataclass(frozen=True)
class Placeholder:
    """The content of a placeholder."""

    task: str
    store: str  # path of the store folder, for display
    format: str
    is_final: bool  # whether it was the final adapter of its task; false for a checkpoint
    # Digests of the adapter in the store. They differ from the replaced files only for weights in a pickle.
    weights: str
    config: str
    files: tuple[ReplacedFile, ...]  # by name
    code: CodeStamp | None = None


@dataclass(frozen=True)
class FoundPlaceholder:
    """A placeholder file in a tree.

    Attributes:
        place: The folder of the adapter, or for a single file the file without its suffix.
        path: The placeholder.
        content: The parsed content, or why it cannot be read.
    """

    place: Path
    path: Path
    content: Placeholder | AdapterRefused

    @property
    def may_be_final(self) -> bool:
        """Whether it may replace the final adapter of a task."""
        return not isinstance(self.content, Placeholder) or self.content.is_final


def is_placeholder(name: str) -> bool:
    """Return whether a file is a placeholder, by its name."""
    return name == PLACEHOLDER_NAME or (name.endswith(f".{PLACEHOLDER_NAME}") and not name.startswith("."))


def placeholder_path(place: Path, *, is_folder: bool) -> Path:
    """Return the path of an adapter's placeholder, which may not exist."""
    return place / PLACEHOLDER_NAME if is_folder else place.with_name(f"{place.name}.{PLACEHOLDER_NAME}")


def find_placeholders(folder: Folder) -> Iterator[FoundPlaceholder]:
    """Yield the placeholders of a folder. Links are skipped: their targets are read in their own folders."""
    for name, path in sorted(folder.files.items()):
        if is_placeholder(name) and path == folder.path / name:
            stem = name.removesuffix(PLACEHOLDER_NAME).removesuffix(".")
            place = folder.path / stem if stem else folder.path
            try:
                yield FoundPlaceholder(place, path, read_placeholder(path))
            except AdapterRefused as error:
                yield FoundPlaceholder(place, path, error)


def read_placeholder(path: Path) -> Placeholder:
    """Read a placeholder.

    Raises:
        AdapterRefused: It cannot be read, or is not in icm's format.
        UnsafeInput: It is a link or special file, or exceeds a limit.
    """
    with located(path):
        return parse_placeholder(read_regular(path, max_bytes=MAX_BYTES))


def placeholder_to_json(placeholder: Placeholder) -> bytes:
    """Return the bytes of a placeholder; equal placeholders have equal bytes."""
    code = placeholder.code
    value = {
        "about": _ABOUT,
        "adapter": {
            "config": placeholder.config,
            "final": placeholder.is_final,
            "format": placeholder.format,
            "weights": placeholder.weights,
        },
        "code": None if code is None else {**_stamp(code.code), "generator": _stamp(code.generator)},
        "files": [{"name": file.name, "part": file.part, **_stamp(file.stamp)} for file in placeholder.files],
        "icm_placeholder": VERSION,
        "store": placeholder.store,
        "task": placeholder.task,
    }
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()


def parse_placeholder(data: bytes) -> Placeholder:
    """Parse the bytes of a placeholder. Raises as `read_placeholder` does."""
    value = parse_object(data, what="the placeholder", max_bytes=MAX_BYTES)
    version = value.get("icm_placeholder")
    if type(version) is int and version != VERSION:
        other = OtherFormat.of("placeholder", version, VERSION)
        raise AdapterRefused(other.message, kind="placeholder", hint=other.hint)
    _keys(value, {"about", "adapter", "code", "files", "icm_placeholder", "store", "task"}, "the placeholder")
    _checked(value, "icm_placeholder", lambda one: type(one) is int and one == VERSION)
    _checked(value, "about", lambda one: _is_text(one, _MAX_ABOUT))
    adapter = _keys(value["adapter"], {"config", "final", "format", "weights"}, "adapter")
    found = _checked(value, "files", lambda some: isinstance(some, list) and 1 <= len(some) <= MAX_FILES)
    files = tuple(map(_file, found))
    names, parts = [file.name for file in files], [file.part for file in files]
    _checked({"files": names}, "files", lambda some: some == sorted(set(some)))
    _checked({"files": parts}, "files", lambda some: some.count("weights") == 1 and some.count("config") <= 1)
    return Placeholder(
        task=_checked(value, "task", lambda one: isinstance(one, str) and task_name_problem(one) is None),
        store=_checked(value, "store", lambda one: _is_text(one, _MAX_PATH)),
        format=_checked(adapter, "format", lambda one: isinstance(one, str) and _FORMAT.fullmatch(one)),
        is_final=_checked(adapter, "final", lambda one: type(one) is bool),
        weights=_checked(adapter, "weights", _is_digest),
        config=_checked(adapter, "config", _is_digest),
        files=files,
        code=None if value["code"] is None else _code(value["code"]),
    )


def _stamp(stamp: FileStamp) -> dict[str, object]:
    return {"sha256": stamp.digest, "size": stamp.size}


def _file(value: object) -> ReplacedFile:
    found = _keys(value, {"name", "part", "sha256", "size"}, "a file")
    name = _checked(found, "name", lambda one: isinstance(one, str) and is_file_name(one) and not is_placeholder(one))
    part = _checked(found, "part", lambda one: isinstance(one, str) and one in get_args(Part))
    return ReplacedFile(name, part, _stamp_of(found))


def _code(value: object) -> CodeStamp:
    found = _keys(value, {*_STAMP, "generator"}, "code")
    generator = _stamp_of(_keys(found["generator"], _STAMP, "generator"))
    return CodeStamp(_stamp_of(found), generator)


def _stamp_of(found: dict[str, Any]) -> FileStamp:
    size = _checked(found, "size", lambda one: type(one) is int and 0 <= one <= _MAX_COUNT)
    return FileStamp(_checked(found, "sha256", _is_digest), size)


def _is_digest(value: object) -> bool:
    return isinstance(value, str) and _DIGEST.fullmatch(value) is not None


def _is_text(value: object, limit: int) -> bool:
    return isinstance(value, str) and 1 <= len(value) <= limit and is_text(value)


def _keys(value: object, keys: Collection[str], what: str) -> dict[str, Any]:
    if not isinstance(value, dict) or value.keys() != set(keys):
        raise _refusal(f"{what} does not have the keys of this format")
    return value


def _checked(found: Mapping[str, Any], key: str, is_good: Callable[[Any], object]) -> Any:
    """Return the value of a key; refuse an invalid value."""
    if not is_good(found[key]):
        raise _refusal(f"{key} is {escape(repr(found[key]), 60)}, which this format does not allow")
    return found[key]


def _refusal(fact: str) -> AdapterRefused:
    hint = "run `icm materialize TASK -o DIR` to write the adapter, then delete this file"
    return AdapterRefused(f"a damaged placeholder: {fact}", kind="placeholder", hint=hint)
