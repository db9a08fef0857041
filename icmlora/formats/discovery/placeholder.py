"""Placeholders: the small file that stands where an adapter was, and says how to bring it back.

    loras/poems/adapter_model.safetensors, adapter_config.json  ->  loras/poems/icm-placeholder.json
    loras/rust.toy, an adapter in a single file                 ->  loras/rust.icm-placeholder.json

It is JSON with sorted keys: the task, the store, the digests of weights, configuration and code, and the files whose
place it takes. Anybody may have written it, so it is read like a file from outside: no name in it leads out of its
folder, and the store that it names is shown to people but never opened because of it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

from icmlora.errors import AdapterRefused, located
from icmlora.io.files import read_regular
from icmlora.io.strict_json import parse_object
from registry.names import escape, is_file_name, is_text, task_name_problem

if TYPE_CHECKING:
    from icmlora.formats.discovery.tree import Folder

PLACEHOLDER_NAME = "icm-placeholder.json"
VERSION = 1
MAX_BYTES = 64 * 1024
MAX_FILES = 64
_MAX_PATH = 4096
_MAX_ABOUT = 2000
_MAX_COUNT = 2**53  # whole numbers above this differ between JSON readers

_DIGEST = re.compile(r"[0-9a-f]{64}")
_FORMAT = re.compile(r"[a-z0-9_-]{1,32}")
_ABOUT = (
    "The adapter that was here is kept by icm in the store below, as the task below. "
    "`icm restore` with the path of this folder brings it back."
)

Part = Literal["weights", "config", "companion"]


@dataclass(frozen=True)
class FileStamp:
    """What a file is recognised by."""

    digest: str  # SHA-256 in hexadecimal
    size: int  # in bytes


@dataclass(frozen=True)
class ReplacedFile:
    """A file whose place the placeholder takes."""

    name: str  # in the folder of the placeholder
    part: Part
    stamp: FileStamp


@dataclass(frozen=True)
class CodeStamp:
    """The code that the store had of the adapter when the placeholder was written."""

    code: FileStamp
    generator: FileStamp
    residual: FileStamp | None = None


@dataclass(frozen=True)
class Placeholder:
    """What a placeholder says."""

    task: str
    store: str  # path of the store folder, to show to people
    format: str
    is_final: bool  # whether the adapter stood for its task; false for a checkpoint
    # Digests of the adapter as the store took it. Only the weights that were a pickle had other bytes in the folder.
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
        content: What it says, or why it cannot be read.
    """

    place: Path
    path: Path
    content: Placeholder | AdapterRefused

    @property
    def may_be_final(self) -> bool:
        """Whether it may stand for the final adapter of a task."""
        return not isinstance(self.content, Placeholder) or self.content.is_final


def is_placeholder(name: str) -> bool:
    """Say whether a file is a placeholder, judged by its name."""
    return name == PLACEHOLDER_NAME or (name.endswith(f".{PLACEHOLDER_NAME}") and not name.startswith("."))


def placeholder_path(place: Path, *, is_folder: bool) -> Path:
    """Return where the placeholder of an adapter is, or would be."""
    return place / PLACEHOLDER_NAME if is_folder else place.with_name(f"{place.name}.{PLACEHOLDER_NAME}")


def find_placeholders(folder: Folder) -> Iterator[FoundPlaceholder]:
    """Read the placeholders of a folder. One that is met through a link is left out: it is met in its own folder."""
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
        AdapterRefused: It cannot be read, or is not as icm writes it.
        UnsafeInput: It is a link or special file, or breaks a limit.
    """
    with located(path):
        return parse_placeholder(read_regular(path, max_bytes=MAX_BYTES))


def placeholder_to_json(placeholder: Placeholder) -> bytes:
    """Return the bytes of a placeholder; equal ones have equal bytes."""
    code = placeholder.code
    value = {
        "about": _ABOUT,
        "adapter": {
            "config": placeholder.config,
            "final": placeholder.is_final,
            "format": placeholder.format,
            "weights": placeholder.weights,
        },
        "code": None if code is None else _stamps(code),
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
    if type(version) is int and version > VERSION:
        hint = "use the icm that wrote it, or a newer one"
        raise AdapterRefused(f"a placeholder of version {version}", kind="placeholder", hint=hint)
    _keys(value, {"about", "adapter", "code", "files", "icm_placeholder", "store", "task"}, "the placeholder")
    _check(type(version) is int and version == VERSION, "icm_placeholder", version)
    _check(_is_text(value["about"], _MAX_ABOUT), "about", value["about"])
    _check(_is_text(value["store"], _MAX_PATH), "store", value["store"])
    task = value["task"]
    _check(isinstance(task, str) and task_name_problem(task) is None, "task", task)
    adapter = _keys(value["adapter"], {"config", "final", "format", "weights"}, "adapter")
    _check(type(adapter["final"]) is bool, "final", adapter["final"])
    _check(isinstance(adapter["format"], str) and _FORMAT.fullmatch(adapter["format"]), "format", adapter["format"])
    return Placeholder(
        task=task,
        store=value["store"],
        format=adapter["format"],
        is_final=adapter["final"],
        weights=_digest(adapter["weights"], "weights"),
        config=_digest(adapter["config"], "config"),
        files=_files(value["files"]),
        code=None if value["code"] is None else _code(value["code"]),
    )


def _stamp(stamp: FileStamp) -> dict[str, object]:
    return {"sha256": stamp.digest, "size": stamp.size}


def _stamps(code: CodeStamp) -> dict[str, object]:
    residual = None if code.residual is None else _stamp(code.residual)
    return {**_stamp(code.code), "generator": _stamp(code.generator), "residual": residual}


def _files(value: object) -> tuple[ReplacedFile, ...]:
    _check(isinstance(value, list) and 1 <= len(value) <= MAX_FILES, "files", value)
    files = tuple(map(_file, cast(list[object], value)))
    names = [file.name for file in files]
    _check(names == sorted(set(names)), "files", names)
    parts = [file.part for file in files]
    _check(parts.count("weights") == 1 and parts.count("config") <= 1, "files", parts)
    return files


def _file(value: object) -> ReplacedFile:
    found = _keys(value, {"name", "part", "sha256", "size"}, "a file")
    name, part = found["name"], found["part"]
    _check(isinstance(name, str) and is_file_name(name) and not is_placeholder(name), "name", name)
    _check(isinstance(part, str) and part in get_args(Part), "part", part)
    return ReplacedFile(name, part, _stamp_of(found))


def _code(value: object) -> CodeStamp:
    found = _keys(value, {"sha256", "size", "generator", "residual"}, "code")
    generator = _keys(found["generator"], {"sha256", "size"}, "generator")
    residual = None if found["residual"] is None else _keys(found["residual"], {"sha256", "size"}, "residual")
    return CodeStamp(_stamp_of(found), _stamp_of(generator), None if residual is None else _stamp_of(residual))


def _stamp_of(found: dict[str, Any]) -> FileStamp:
    size = found["size"]
    _check(type(size) is int and 0 <= size <= _MAX_COUNT, "size", size)
    return FileStamp(_digest(found["sha256"], "sha256"), size)


def _digest(value: object, key: str) -> str:
    _check(isinstance(value, str) and _DIGEST.fullmatch(value), key, value)
    return cast(str, value)


def _is_text(value: object, limit: int) -> bool:
    return isinstance(value, str) and 1 <= len(value) <= limit and is_text(value)


def _keys(value: object, keys: Collection[str], what: str) -> dict[str, Any]:
    if not isinstance(value, dict) or value.keys() != set(keys):
        raise _refusal(f"{what} does not have the keys of this format")
    return cast(dict[str, Any], value)


def _check(holds: object, key: str, value: object) -> None:
    if not holds:
        raise _refusal(f"{key} is {escape(repr(value), 60)}, which this format does not have")


def _refusal(fact: str) -> AdapterRefused:
    hint = "`icm materialize TASK -o DIR` writes the adapter of a task; then remove this file"
    return AdapterRefused(f"a placeholder that is damaged: {fact}", kind="placeholder", hint=hint)
