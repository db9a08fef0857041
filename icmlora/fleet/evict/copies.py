"""Prove that there are copies of an original elsewhere, by reading them now.

    folder   adapters at any depth     a copy if weights and configuration have the very bytes of the original
    store    another store             the same, and its row says that it is not evicted
    bundle   a file of `icm export`    a copy of the code alone: it must be the code that replaces the original

Each place counts once, and no file counts twice: two paths to one file are one copy. What is in the store itself, or
about to be deleted with the original, does not count.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

from icmlora.errors import DataError, IcmLoraError
from icmlora.fleet.evict.placeholders import pickle_digest
from icmlora.formats import catalogue
from icmlora.formats.discovery.discovery import with_pickle
from icmlora.formats.discovery.tree import walk
from icmlora.formats.discovery.unsupported import PICKLES
from icmlora.io.files import FileId, HashedFile, hash_regular
from icmlora.io.text import counted, some
from registry.errors import RegistryError
from registry.records import AdapterRecord, CodeRecord, GeneratorRecord
from registry.storage.blobs.content import digest_of

if TYPE_CHECKING:
    from icmlora.fleet.context import Context
    from registry.store import Store

Kind = Literal["folder", "store", "bundle"]


@dataclass(frozen=True)
class VerifiedCopy:
    """A copy whose bytes were read and have the right digests."""

    path: str  # as it was given
    kind: Kind  # a bundle has the code alone; folders and stores have the original


@dataclass(frozen=True)
class Proof:
    """The copies of one adapter that were found, out of those that are needed."""

    copies: tuple[VerifiedCopy, ...]
    needed: int
    missing: tuple[str, ...]  # for each other place, why it does not count

    @property
    def is_enough(self) -> bool:
        """Whether there are as many copies as are needed."""
        return len(self.copies) >= self.needed

    @property
    def text(self) -> str:
        """Say what was found."""
        found = f" (in {some([copy.path for copy in self.copies])})" if self.copies else ""
        return "; ".join([f"{len(self.copies)} of {self.needed} copies found{found}", *self.missing])


@dataclass(frozen=True)
class Wanted:
    """An adapter, and what replaces it."""

    row: AdapterRecord
    pickle: str | None  # digest of the pickle that its weights were converted from
    code: CodeRecord | None
    generator: GeneratorRecord | None


class _NoCopy(IcmLoraError):
    """A place has no copy, for the reason given."""


class _Place(Protocol):
    """Where copies may be."""

    @property
    def kind(self) -> Kind:
        """What it is."""
        ...

    def find(self, wanted: Wanted) -> Iterator[FileId]:
        """Yield the file of each copy, which was read; raises `_NoCopy` with a reason, or yields nothing."""
        ...


class Copies:
    """The places that were named, and how many copies are needed of each original.

    Args:
        context: Opens other stores as this one was opened.
        store: The store that the originals are deleted from.
        paths: Folders, stores and bundles.
        needed: How many copies; 0 asks for none.

    Raises:
        DataError: A path does not exist, or is inside the store; or there are fewer paths than copies needed.
        BundleError: A file is no bundle, or a damaged one.
    """

    def __init__(self, context: Context, store: Store, paths: Sequence[Path], needed: int) -> None:
        if needed > len(paths):
            hint = "name the places: each `--copy PATH` counts once"
            fact = f"{counted(needed, 'copy', 'copies')} asked for, but {counted(len(paths), 'place')} named"
            raise DataError(fact, hint=hint)
        self._store, self._needed = store, needed
        self._places = [(path, _open(context, store, path)) for path in paths]

    @contextmanager
    def held(self, *, waits: bool = True) -> Iterator[None]:
        """Hold the other stores, as soon as they are read in the block: nothing is deleted there meanwhile.

        Without `waits`, a store that somebody else has alone just now does not count: whoever has this store alone
        must not wait for another one.
        """
        others = [place for _, place in self._places if isinstance(place, _OtherStore)]
        for other in others:
            other.waits = waits
        try:
            yield
        finally:
            for other in others:
                other.close()

    def prove(
        self,
        row: AdapterRecord,
        code: CodeRecord | None,
        generator: GeneratorRecord | None,
        doomed: Collection[FileId] = (),
    ) -> Proof:
        """Look for copies of one adapter, and read them, inside `held`.

        Args:
            row: The adapter.
            code: What replaces it.
            generator: That of the code.
            doomed: Files that are deleted with it.
        """
        if not self._needed:
            return Proof((), 0, ())
        wanted = Wanted(row, pickle_digest(self._store, row), code, generator)
        # Why a file does not count.
        seen: dict[FileId, str] = dict.fromkeys(doomed, "only the files that are to be replaced")
        seen |= dict.fromkeys(_own_files(self._store, row), "only a link to the file in the store")
        copies: list[VerifiedCopy] = []
        missing: list[str] = []
        for path, place in self._places:
            try:
                found = list(place.find(wanted))
                fresh = next((file for file in found if file not in seen), None)
                if fresh is None:
                    raise _NoCopy(seen[found[0]] if found else "it is not there")
            except (IcmLoraError, RegistryError) as error:
                missing.append(f"{path}: {error.message}")
            except OSError as error:
                missing.append(f"{path}: {error.strerror or error}")
            else:
                seen[fresh] = f"the same file as in {path}"
                copies.append(VerifiedCopy(str(path), place.kind))
        return Proof(tuple(copies), self._needed, tuple(missing))


def _open(context: Context, store: Store, path: Path) -> _Place:
    real, own = Path(os.path.realpath(path)), Path(os.path.realpath(store.paths.root))
    if real == own or real.is_relative_to(own):
        hint = "name another store, a folder with the adapters, or a bundle"
        raise DataError("this is the store itself, so it is no copy", path=path, hint=hint)
    if not real.exists():
        raise DataError("does not exist", path=path)
    if not real.is_dir():
        return _Bundle(real)
    if (real / "FORMAT").is_file():
        return _OtherStore(replace(context, path=real))
    return _Folder(real)


def _own_files(store: Store, row: AdapterRecord) -> Iterator[FileId]:
    """Yield the files of an original in its own store, which other paths may lead to as well."""
    for digest in row.evictable:
        if store.blobs.exists(digest):
            yield _id_of(store.blobs.place(digest))


def _id_of(path: str) -> FileId:
    status = os.stat(path)
    return status.st_dev, status.st_ino


class _Folder:
    """A folder with adapters at any depth."""

    kind: Kind = "folder"

    def __init__(self, root: Path) -> None:
        self._root = root
        self._hashed: dict[Path, HashedFile] = {}

    @cached_property
    def _adapters(self) -> dict[int, list[tuple[Path, Path | None]]]:
        """The adapters by the size of their weights: weights and configuration of each."""
        found: defaultdict[int, list[tuple[Path, Path | None]]] = defaultdict(list)
        for folder in walk(self._root, (), lambda refusal: None):
            for known in catalogue.FORMATS:
                for paths in known.find(with_pickle(folder)):
                    found[paths.weights.stat().st_size].append((paths.weights, paths.config))
        return found

    def find(self, wanted: Wanted) -> Iterator[FileId]:
        """Yield the weights of each copy."""
        row = wanted.row
        if row.initial is not None and not self._has(row.initial, row.initial_bytes):
            raise _NoCopy("the weights that it began with are not there")
        candidates = list(self._adapters.get(row.weights_bytes, ()))
        if wanted.pickle is not None:  # which has another size
            candidates += [pair for pairs in self._adapters.values() for pair in pairs if pair[0].name in PICKLES]
        for weights, config in candidates:
            same = self._hash(weights).digest in (row.weights, wanted.pickle)
            if same and (digest_of(b"") if config is None else self._hash(config).digest) == row.config:
                yield self._hash(weights).id

    def _has(self, digest: str, size: int) -> bool:
        return any(self._hash(weights).digest == digest for weights, _ in self._adapters.get(size, ()))

    def _hash(self, path: Path) -> HashedFile:
        """Hash a file, or return what it was hashed to if it is unchanged: many adapters have the same size."""
        known = self._hashed.get(path)
        if known is None or not known.is_unchanged():
            known = self._hashed[path] = hash_regular(path)
        return known


class _OtherStore:
    """Another store."""

    kind: Kind = "store"

    def __init__(self, context: Context) -> None:
        self._context, self._opened = context, ExitStack()
        self._store: Store | None = None
        self.waits = True
        context.open(read_only=True).close()  # what is wrong with it is said before anything is measured

    def close(self) -> None:
        """Let go of the store, until somebody looks into it again."""
        self._opened.close()
        self._store = None

    def find(self, wanted: Wanted) -> Iterator[FileId]:
        """Yield the weights of the copy."""
        if self._store is None:
            context = self._context if self.waits else replace(self._context, lock_timeout=0.0, patience=None)
            self._store = self._opened.enter_context(context.open(read_only=True))
        row = wanted.row
        rows = self._store.tasks.having(row.weights, row.config)
        if not rows:
            raise _NoCopy("it is not there")
        kept = [found for found in rows if not found.is_evicted and found.initial == row.initial]
        if not kept:
            raise _NoCopy("its original was evicted there too")
        for digest in row.evictable:
            self._store.blobs.check(digest)
        yield _id_of(self._store.blobs.place(row.weights))


class _Bundle:
    """A bundle, which has codes and no originals."""

    kind: Kind = "bundle"

    def __init__(self, path: Path) -> None:
        self._path = path
        self._read()

    def _read(self) -> None:
        """Read and check every byte."""
        from icmlora.bundle.file import open_bundle

        with open_bundle(self._path) as file:
            self._file = HashedFile(self._path, file.digest, self._path.lstat())
            self._index = file.index
            file.check()

    def find(self, wanted: Wanted) -> Iterator[FileId]:
        """Yield the bundle, if it has the very code that replaces the adapter."""
        if not self._file.is_unchanged():
            self._read()
        row, code, generator = wanted.row, wanted.code, wanted.generator
        if not row.is_final:
            raise _NoCopy("a bundle has no checkpoints")
        same = [task for task in self._index.tasks if (task.weights, task.config) == (row.weights, row.config)]
        if not same:
            raise _NoCopy("it is not there")
        if code is not None and code.residual is not None:
            raise _NoCopy("its code has a residual, and a bundle has none")
        codes = {(task.code, self._index.generator.blob) for task in same}
        if code is None or generator is None or (code.blob, generator.blob) not in codes:
            raise _NoCopy("its code there is another one")
        yield self._file.id
