"""Leave a placeholder in a user's own folder, where an adapter was ingested from, and take the adapter's files away.

    same bytes as ingested? ──▶ placeholder, durable ──▶ files are unlinked: configuration first, weights last
         └── no: left as it is, with the reason

Only files that hash now to what the store recorded are unlinked: weights, configuration, and tokenizers and the like
that were ingested with them. Everything else stays. A kill leaves the adapter, the adapter with its placeholder, or the
placeholder; the same call finishes it.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from icmlora.errors import AdapterRefused, IcmLoraError
from icmlora.formats.catalogue import format_named
from icmlora.formats.discovery.discovery import with_pickle
from icmlora.formats.discovery.pickled import CONVERTED_FROM
from icmlora.formats.discovery.placeholder import (
    CodeStamp,
    FileStamp,
    Part,
    Placeholder,
    ReplacedFile,
    placeholder_path,
    placeholder_to_json,
    read_placeholder,
)
from icmlora.formats.discovery.tree import Folder
from icmlora.formats.format import AdapterBytes, FoundAdapter
from icmlora.io.files import HashedFile, hash_regular
from icmlora.io.safetensors import read_header
from icmlora.io.staging import writing_file
from registry.errors import RegistryError
from registry.files import failpoint, fsync_dir, is_full, unlink
from registry.manifests import Adapter, Code, Task
from registry.names import absolute, is_file_name
from registry.storage.blobs.content import digest_of

if TYPE_CHECKING:
    from registry.store import Store

FolderStatus = Literal["replaced", "would_replace", "there", "missing", "left"]


@dataclass(frozen=True)
class FolderReplaced:
    """The result for the folder that an adapter was ingested from."""

    path: str
    # `replaced`, `would_replace` in a dry run, `there` (it has the placeholder already), `missing` (the adapter is not
    # there any more), `left` (see `reason`).
    status: FolderStatus
    freed: int = 0  # bytes; a file that has another name elsewhere frees nothing
    reason: str | None = None
    is_full: bool = False  # whether the reason is that the disk is full


_WRITE_BITS = stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH


class NotReplaced(IcmLoraError):
    """The files of an adapter stay where they are, for the reason given."""


@dataclass(frozen=True)
class RestoreSource:
    """The source that restores an adapter once its files are deleted."""

    check: Callable[[], None]  # called before anything is deleted; raises if the store could not restore the adapter
    code: Code | None  # its code, for a final adapter that has one
    # Called if the weights are not the original ones: returns the files that the code decodes to, which `icm restore`
    # may have written.
    decoded: Callable[[], AdapterBytes | None] = lambda: None


def source_place(adapter: Adapter) -> Path | None:
    """Return where an adapter was ingested from; None for one of a bundle or of the generator."""
    return Path(adapter.source) if os.path.isabs(adapter.source) else None


def pickle_digest(store: Store, adapter: Adapter) -> str | None:
    """Return the digest of the pickle that an original was converted from; None for any other, or an evicted one."""
    if adapter.is_evicted:
        return None
    try:
        return read_header(store.blobs.read(adapter.weights)).metadata.get(CONVERTED_FROM)
    except AdapterRefused:  # another format than safetensors
        return None


class Placeholders:
    """Replaces adapters in users' folders, or only plans to."""

    def __init__(self, store: Store, *, dry_run: bool) -> None:
        self._store, self._dry_run = store, dry_run

    def replace_files(self, task: Task, adapter: Adapter, source: RestoreSource) -> FolderReplaced | None:
        """Replace the files of one adapter of a task in the folder that it came from; None if it came from none."""
        place = source_place(adapter)
        if place is None:
            return None
        try:
            folder = _AdapterFolder.of(place)
            if folder is None:
                return FolderReplaced(adapter.source, "missing")
            return self._replaced(folder, task, adapter, source)
        except (IcmLoraError, RegistryError) as error:
            return FolderReplaced(adapter.source, "left", reason=error.message)
        except OSError as error:
            fact = f"it cannot be changed: {error.strerror or error}"
            return FolderReplaced(adapter.source, "left", reason=fact, is_full=is_full(error))

    def has_left(self, adapter: Adapter) -> bool:
        """Return whether a placeholder of this adapter is in its folder."""
        place = source_place(adapter)
        try:
            folder = None if place is None else _AdapterFolder.of(place)
            return folder is not None and folder.is_taken and self._known(folder, adapter) is not None
        except (IcmLoraError, OSError):
            return False

    def _replaced(self, folder: _AdapterFolder, task: Task, adapter: Adapter, source: RestoreSource) -> FolderReplaced:
        known = self._known(folder, adapter) if folder.is_taken else None
        parts = (
            _parts_of(folder, adapter)
            if known is None
            else {folder.home / file.name: file.part for file in known.files}
        )
        parts = {path: part for path, part in parts.items() if os.path.lexists(path)}
        if not parts:
            return FolderReplaced(adapter.source, "missing" if known is None else "there")
        doomed = self._unchanged(folder, adapter, parts, source)
        if not doomed:  # what is left of the files that it lists has other bytes now
            return FolderReplaced(adapter.source, "there")
        if not folder.home.stat().st_mode & _WRITE_BITS:  # root could write nevertheless
            raise NotReplaced("its folder is marked as read-only")
        source.check()
        freed = sum(file.status.st_size for file in doomed if file.status.st_nlink == 1)
        if self._dry_run:
            if not os.access(folder.home, os.W_OK | os.X_OK):
                raise NotReplaced("it cannot be changed: no permission to write")
            return FolderReplaced(adapter.source, "would_replace", freed)
        _check_unchanged(doomed)  # the check may take a while
        if known is None:
            replaced = [
                ReplacedFile(file.path.name, parts[file.path], FileStamp(file.digest, file.status.st_size))
                for file in doomed
            ]
            self._write(folder, task, adapter, replaced, _code_stamp(source.code))
        failpoint("placeholder-written")
        _unlink(folder.home, doomed)
        return FolderReplaced(adapter.source, "replaced", freed)

    def _known(self, folder: _AdapterFolder, adapter: Adapter) -> Placeholder:
        """Read the placeholder that is there, which an interrupted run may have left next to the adapter."""
        known = read_placeholder(folder.placeholder)
        if (known.weights, known.config) != (adapter.weights, adapter.config):
            raise NotReplaced(f"it has the placeholder of another adapter, of task {known.task!r}")
        return known

    def _unchanged(
        self, folder: _AdapterFolder, adapter: Adapter, parts: Mapping[Path, Part], source: RestoreSource
    ) -> list[HashedFile]:
        """Return the files that may go, configuration first and weights last; raise if the adapter is another one."""
        files: dict[Part, list[HashedFile]] = {"config": [], "companion": [], "weights": []}
        for path, part in parts.items():
            if not path.is_symlink():
                files[part].append(hash_regular(path))
            elif part != "companion":
                raise NotReplaced(f"{path.name} is a symbolic link")
        files["companion"] = [
            file for file in files["companion"] if self._has_kept(adapter, folder.companion(file.path), file)
        ]
        config: str = adapter.config
        for file in files["weights"]:
            if file.digest == adapter.weights or file.digest == pickle_digest(self._store, adapter):
                continue
            made = source.decoded()  # it may be what `icm restore` wrote
            if made is None or digest_of(made.weights) != file.digest:
                raise NotReplaced(f"{file.path.name} has changed since it was ingested")
            config = digest_of(made.config)
        for file in files["config"]:
            if file.digest != config:
                raise NotReplaced(f"{file.path.name} has changed since it was ingested")
        return [file for some in files.values() for file in some]

    def _has_kept(self, adapter: Adapter, name: str, file: HashedFile) -> bool:
        """Return whether the store has exactly the bytes of a file next to an adapter, under this name."""
        kept = next((extra for extra in adapter.extras if extra.file == name), None)
        if kept is None or kept.size != file.status.st_size:
            return False
        from icmlora.formats.extras import unpack  # most adapters have no companions

        return digest_of(unpack(self._store.blobs.read(kept.blob))) == file.digest

    def _write(
        self,
        folder: _AdapterFolder,
        task: Task,
        adapter: Adapter,
        files: Sequence[ReplacedFile],
        code: CodeStamp | None,
    ) -> None:
        if odd := [file.name for file in files if not is_file_name(file.name)]:
            raise NotReplaced(f"a placeholder cannot hold the file name {odd[0]!r}")
        placeholder = Placeholder(
            task=task.name,
            store=absolute(self._store.address),
            format=adapter.format,
            is_final=adapter is task.final,
            weights=adapter.weights,
            config=adapter.config,
            files=tuple(sorted(files, key=lambda file: file.name)),
            code=code,
        )
        with writing_file(folder.placeholder) as stream:
            stream.write(placeholder_to_json(placeholder))


@dataclass(frozen=True)
class _AdapterFolder:
    """A folder in which an adapter is, or was."""

    place: Path  # of the adapter
    home: Path  # the folder of its files: the same, or for a single file the one above
    placeholder: Path

    @classmethod
    def of(cls, place: Path) -> _AdapterFolder | None:
        """Find the folder; None if it is not there any more."""
        is_folder = place.is_dir()
        home = place if is_folder else place.parent
        if not home.is_dir():
            return None
        # The path had no links when the adapter was ingested.
        if Path(os.path.realpath(home)) != home:
            raise NotReplaced("its path contains a symbolic link")
        return cls(place, home, placeholder_path(place, is_folder=is_folder))

    def has(self, name: str) -> bool:
        """Return whether a file may belong to the adapter, judged by its name."""
        return self.home == self.place or name.startswith(f"{self.place.name}.")

    def companion(self, path: Path) -> str:
        """Return the name under which the store keeps a file next to the adapter."""
        return path.name if self.home == self.place else path.name.removeprefix(f"{self.place.name}.")

    @property
    def is_taken(self) -> bool:
        """Whether a placeholder is there."""
        return os.path.lexists(self.placeholder)


def _parts_of(folder: _AdapterFolder, adapter: Adapter) -> dict[Path, Part]:
    """Find the files of an adapter in its folder; there are none if it is not there any more."""
    with os.scandir(folder.home) as entries:
        # Links are listed under their own names: what is behind them is not looked at. Of a folder of single files,
        # which may be thousands, only those of this adapter are.
        files = {
            entry.name: Path(entry.path)
            for entry in entries
            if folder.has(entry.name) and (entry.is_file() or entry.is_symlink())
        }
    there = with_pickle(Folder(folder.home, files))
    return {
        path: part
        for paths in format_named(adapter.format).find(there)
        if paths.place == folder.place
        for path, part in _parts(paths)
    }


def _parts(paths: FoundAdapter) -> Iterator[tuple[Path, Part]]:
    yield paths.weights, "weights"
    if paths.config is not None:
        yield paths.config, "config"
    for path in paths.companions.values():
        yield path, "companion"


def _code_stamp(code: Code | None) -> CodeStamp | None:
    if code is None:
        return None
    return CodeStamp(FileStamp(code.blob, code.size), FileStamp(code.generator, code.generator.size))


def _unlink(home: Path, files: Sequence[HashedFile]) -> None:
    for file in files:
        _check_unchanged([file])
        unlink(file.path)
        failpoint("placeholder-file-gone")
    fsync_dir(home)


def _check_unchanged(files: Sequence[HashedFile]) -> None:
    for file in files:
        if not file.is_unchanged():
            raise NotReplaced(f"{file.path.name} changed while being checked; run the same command again")
