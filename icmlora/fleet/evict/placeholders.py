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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from icmlora.errors import AdapterRefused, IcmLoraError
from icmlora.fleet.evict.types import FolderReplaced
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
from icmlora.formats.format import AdapterBytes
from icmlora.io.files import HashedFile, hash_regular
from icmlora.io.safetensors import read_header
from icmlora.io.staging import writing_file
from registry.errors import RegistryError
from registry.files import failpoint, fsync_dir, is_full, unlink
from registry.manifests import Code, StoredAdapter, Task
from registry.names import absolute, is_file_name
from registry.storage.blobs.content import digest_of

if TYPE_CHECKING:
    from registry.store import Store

_WRITE_BITS = stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH

_Decoded = Callable[[], AdapterBytes | None]


class NotReplaced(IcmLoraError):
    """The files of an adapter stay where they are, for the reason given."""


class Placeholders:
    """Replaces adapters in users' folders, or only plans to."""

    def __init__(self, store: Store, *, dry_run: bool) -> None:
        self._store, self._dry_run = store, dry_run

    def replace_files(
        self,
        task: Task,
        adapter: StoredAdapter,
        check: Callable[[], None],
        code: Code | None,
        decoded: _Decoded = lambda: None,
    ) -> FolderReplaced | None:
        """Replace the files of one adapter of a task in the folder that it came from; None if it came from none.

        Args:
            task: The task.
            adapter: Its final adapter, or a checkpoint.
            check: Called before anything is deleted; raises if the store could not restore the adapter.
            code: The code of a final adapter that has one.
            decoded: Called if the weights are not the original ones: returns the files that the code decodes to,
                which `icm restore` may have written.
        """
        try:
            folder = _AdapterFolder.of(adapter)
            if folder is None:
                return FolderReplaced(adapter.source, "missing") if os.path.isabs(adapter.source) else None
            return self._replaced(folder, task, adapter, check, code, decoded)
        except (IcmLoraError, RegistryError) as error:
            return FolderReplaced(adapter.source, "left", reason=error.message)
        except OSError as error:
            fact = f"it cannot be changed: {error.strerror or error}"
            return FolderReplaced(adapter.source, "left", reason=fact, is_full=is_full(error))

    def has_left(self, adapter: StoredAdapter) -> bool:
        """Return whether a placeholder of this adapter is in its folder."""
        try:
            folder = _AdapterFolder.of(adapter)
            return folder is not None and folder.read_placeholder(adapter) is not None
        except (IcmLoraError, OSError):
            return False

    def _replaced(
        self,
        folder: _AdapterFolder,
        task: Task,
        adapter: StoredAdapter,
        check: Callable[[], None],
        code: Code | None,
        decoded: _Decoded,
    ) -> FolderReplaced:
        known = folder.read_placeholder(adapter)  # an interrupted run may have left it next to the adapter
        listed = None if known is None else {folder.home / file.name: file.part for file in known.files}
        parts = folder.parts(adapter) if listed is None else listed
        parts = {path: part for path, part in parts.items() if os.path.lexists(path)}
        if not parts:
            return FolderReplaced(adapter.source, "missing" if known is None else "there")
        doomed = self._unchanged(folder, adapter, parts, decoded)
        if not doomed:  # the files that it lists and that are still there have other bytes now
            return FolderReplaced(adapter.source, "there")
        if not folder.home.stat().st_mode & _WRITE_BITS:  # root could write nevertheless
            raise NotReplaced("its folder is marked as read-only")
        check()
        freed = sum(file.status.st_size for file in doomed if file.status.st_nlink == 1)
        if self._dry_run:
            if not os.access(folder.home, os.W_OK | os.X_OK):
                raise NotReplaced("it cannot be changed: no permission to write")
            return FolderReplaced(adapter.source, "would_replace", freed)
        _check_unchanged(doomed)  # the check may take a while
        if known is None:
            self._write(folder, task, adapter, doomed, parts, code)
        failpoint("placeholder-written")
        for file in doomed:
            _check_unchanged([file])
            unlink(file.path)
            failpoint("placeholder-file-gone")
        fsync_dir(folder.home)
        return FolderReplaced(adapter.source, "replaced", freed)

    def _unchanged(
        self, folder: _AdapterFolder, adapter: StoredAdapter, parts: Mapping[Path, Part], decoded: _Decoded
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
            if file.digest == adapter.weights or file.digest == self._pickle_digest(adapter):
                continue
            restored = decoded()  # it may be what `icm restore` wrote
            if restored is None or digest_of(restored.weights) != file.digest:
                raise NotReplaced(f"{file.path.name} has changed since it was ingested")
            config = digest_of(restored.config)
        for file in files["config"]:
            if file.digest != config:
                raise NotReplaced(f"{file.path.name} has changed since it was ingested")
        return [file for some in files.values() for file in some]

    def _pickle_digest(self, adapter: StoredAdapter) -> str | None:
        """Return the digest of the pickle that an original was converted from; None for another or evicted adapter."""
        if adapter.is_evicted:
            return None
        try:
            return read_header(self._store.blobs.read(adapter.weights)).metadata.get(CONVERTED_FROM)
        except AdapterRefused:  # another format than safetensors
            return None

    def _has_kept(self, adapter: StoredAdapter, name: str, file: HashedFile) -> bool:
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
        adapter: StoredAdapter,
        files: Sequence[HashedFile],
        parts: Mapping[Path, Part],
        code: Code | None,
    ) -> None:
        if odd := [file.path.name for file in files if not is_file_name(file.path.name)]:
            raise NotReplaced(f"a placeholder cannot hold the file name {odd[0]!r}")
        stamp = None
        if code is not None:
            generator = FileStamp(code.generator, code.generator.size)
            stamp = CodeStamp(FileStamp(code.blob, code.size), generator)
        replaced = [
            ReplacedFile(file.path.name, parts[file.path], FileStamp(file.digest, file.status.st_size))
            for file in sorted(files, key=lambda file: file.path.name)
        ]
        placeholder = Placeholder(
            task=task.name,
            store=absolute(self._store.address),
            format=adapter.format,
            is_final=adapter is task.final,
            weights=adapter.weights,
            config=adapter.config,
            files=tuple(replaced),
            code=stamp,
        )
        with writing_file(folder.placeholder) as stream:
            stream.write(placeholder_to_json(placeholder))


@dataclass(frozen=True)
class _AdapterFolder:
    """The folder of an adapter, which may be gone."""

    place: Path  # of the adapter
    home: Path  # the folder of its files: the same, or for a single file the one above
    placeholder: Path

    @classmethod
    def of(cls, adapter: StoredAdapter) -> _AdapterFolder | None:
        """Find the folder that an adapter was ingested from; None if there was none, or it is not there any more."""
        if not os.path.isabs(adapter.source):  # it came in a bundle, or the generator made it
            return None
        place = Path(adapter.source)
        is_folder = place.is_dir()
        home = place if is_folder else place.parent
        if not home.is_dir():
            return None
        # The path had no links when the adapter was ingested.
        if Path(os.path.realpath(home)) != home:
            raise NotReplaced("its path contains a symbolic link")
        return cls(place, home, placeholder_path(place, is_folder=is_folder))

    def read_placeholder(self, adapter: StoredAdapter) -> Placeholder | None:
        """Read the placeholder of an adapter, if there is one; raise if it is another adapter's."""
        if not os.path.lexists(self.placeholder):
            return None
        known = read_placeholder(self.placeholder)
        if (known.weights, known.config) != (adapter.weights, adapter.config):
            raise NotReplaced(f"it has the placeholder of another adapter, of task {known.task!r}")
        return known

    def companion(self, path: Path) -> str:
        """Return the name under which the store keeps a file next to the adapter."""
        return path.name if self.home == self.place else path.name.removeprefix(f"{self.place.name}.")

    def parts(self, adapter: StoredAdapter) -> dict[Path, Part]:
        """Return the files of the adapter in the folder; there are none if it is not there any more."""
        prefix = "" if self.home == self.place else f"{self.place.name}."
        with os.scandir(self.home) as entries:
            # Links are listed under their own names, without a look at their targets. Of a folder of single files,
            # which may be thousands, only this adapter's files are listed.
            files = {
                entry.name: Path(entry.path)
                for entry in entries
                if entry.name.startswith(prefix) and (entry.is_file() or entry.is_symlink())
            }
        parts: dict[Path, Part] = {}
        for paths in format_named(adapter.format).find(with_pickle(Folder(self.home, files))):
            if paths.place == self.place:
                parts[paths.weights] = "weights"
                parts |= {} if paths.config is None else {paths.config: "config"}
                parts |= dict.fromkeys(paths.companions.values(), "companion")
        return parts


def _check_unchanged(files: Sequence[HashedFile]) -> None:
    for file in files:
        if not file.is_unchanged():
            raise NotReplaced(f"{file.path.name} changed while being checked; run the same command again")
