"""Restore adapters to the folders where `icm evict --placeholder` left placeholders.

    placeholder ──▶ the adapter with its digests ──▶ original, byte for byte ──┐
                                                └──▶ code, decoded ────────────┴─▶ files, durable ──▶ placeholder gone

The adapter is looked up by the digests of its weights and configuration, so its task may have been renamed, or have a
newer version. Only the store or bundle of the caller is opened, never the store that a placeholder names.
No file in a folder is overwritten, and the files of an adapter appear together: a full disk leaves none of them. A
killed call leaves the placeholder in place, and the same call finishes its work.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from icmlora.errors import AdapterRefused, DataError, OutputExists
from icmlora.fleet.bundles.bundles import Bundle
from icmlora.fleet.context import Context, Event, TaskFailed, reporting, use_case
from icmlora.fleet.failures import FAILURES
from icmlora.fleet.resources.adapter_row import original_files
from icmlora.fleet.resources.code_source import CodeSource, StoreCodes, open_codes
from icmlora.formats.catalogue import format_named
from icmlora.formats.discovery.placeholder import (
    PLACEHOLDER_NAME,
    FoundPlaceholder,
    Placeholder,
    ReplacedFile,
    find_placeholders,
    is_placeholder,
)
from icmlora.formats.discovery.task_names import run_folder
from icmlora.formats.discovery.tree import Folder, walk
from icmlora.formats.discovery.unsupported import PICKLES
from icmlora.formats.format import AdapterBytes, AdapterFormat
from icmlora.io.files import hash_regular, read_regular
from icmlora.io.safetensors import MAX_FILE_BYTES
from icmlora.io.staging import write_files
from registry.errors import IcmError, RegistryError, StoreNotFound
from registry.files import failpoint, fsync_dir, is_full, unlink
from registry.manifests import Code, Task, WithRelativeError
from registry.names import folder_of, source_label
from registry.storage.blobs.content import digest_of

RestoreStatus = Literal["restored", "would_restore", "complete", "refused"]
NO_SPACE = "no_space"
"""The kind of a refusal because the disk is full."""


@dataclass(frozen=True)
class AdapterRestored(WithRelativeError, Event):
    """The result for one placeholder."""

    path: str  # of the placeholder's folder, or of a refused input
    task: str | None  # as the placeholder names it; None if it cannot be read
    # `restored`; `would_restore` in a dry run; `complete` (the files were all there, so only the placeholder went);
    # `refused` (see `kind`, `reason` and `hint`).
    status: RestoreStatus
    source: Literal["original", "code"] | None = None
    size: int = 0  # bytes of the files that were written
    weights: str | None = None  # SHA-256 of the weights as they were written
    generator: str | None = None  # digest of the generator that decoded it; None for an original
    squared_error: float | None = None  # None if it was not measured
    retained_gain: float | None = None
    converted_from: str | None = None  # the name of the pickle that stood there; safetensors were written instead
    kind: str | None = None
    reason: str | None = None
    hint: str | None = None
    precision: str | None = None  # of the base model that the gain was measured on


@dataclass
class RestoreReport:
    """The restored adapters, and the refused ones."""

    adapters: list[AdapterRestored] = field(default_factory=list)

    @property
    def refused(self) -> list[AdapterRestored]:
        """Those that could not be restored."""
        return [adapter for adapter in self.adapters if adapter.status == "refused"]

    @property
    def is_full(self) -> bool:
        """Whether something could not be restored because the disk is full."""
        return any(adapter.kind == NO_SPACE for adapter in self.adapters)

    @property
    def restored(self) -> list[AdapterRestored]:
        """Those that were restored, or would be."""
        return [adapter for adapter in self.adapters if adapter.status != "refused"]

    @property
    def size(self) -> int:
        """All bytes that were written, or would be."""
        return sum(adapter.size for adapter in self.adapters)


@use_case
def restore(
    context: Context, folders: Sequence[str | Path], *, bundle: str | Path | None = None, dry_run: bool = False
) -> RestoreReport:
    """Restore adapters to the folders where `evict` left placeholders.

    An adapter is written byte for byte if the store has its original, or else decoded from its code. No file in a
    folder is overwritten. Refused placeholders are in the report and do not stop the rest.

    Args:
        context: The store.
        folders: Folders with placeholders, at any depth.
        bundle: Read this bundle instead of the store.
        dry_run: Check everything and report the files to write, but write nothing.

    Raises:
        DataError: A folder does not exist, or nothing could be restored.
        BundleError: The bundle is damaged.
    """
    report = RestoreReport()
    errors: list[Exception] = []

    def add(done: AdapterRestored) -> None:
        report.adapters.append(done)
        context.on_event(done)

    def refuse(error: Exception, path: str, task: str | None = None) -> None:
        errors.append(error)
        add(_refused(error, path, task))

    with reporting(report):
        readable, refusals = _find([Path(folder) for folder in folders])
        for refusal in refusals:
            refuse(refusal, refusal.path or ".")
        if readable:
            with _opened(context, bundle, readable) as codes:
                for number, item in enumerate(readable):
                    context.progress(number, len(readable), source_label(item.place))
                    try:
                        done = _Restorer(codes, item).run(dry_run=dry_run)
                    except (*FAILURES, RegistryError, OSError) as error:
                        refuse(error, source_label(item.place), _content(item).task)
                    else:
                        add(done)
                context.progress(len(readable), len(readable))
    if errors and not report.restored:
        full = [error for error in errors if is_full(error)]
        if full or len(errors) == 1:
            raise (full or errors)[0]
        raise DataError(f"nothing was restored: all {len(errors)} placeholders were refused")
    return report


@contextmanager
def _opened(context: Context, bundle: str | Path | None, found: Sequence[FoundPlaceholder]) -> Iterator[CodeSource]:
    if bundle is not None:
        opened = Bundle(bundle)
        context.progress(0, None, "checking")
        with opened.open() as file:
            file.check()
        with open_codes(opened.context) as codes:
            yield codes
        return
    try:
        store = context.open(read_only=True)
    except StoreNotFound as error:
        named = sorted({_content(item).store for item in found})
        error.hint = f"the placeholders name the store at {named[0]}; specify it with --store if it is yours"
        raise
    with store:
        yield StoreCodes(store, context)


def _find(folders: Sequence[Path]) -> tuple[list[FoundPlaceholder], list[AdapterRefused]]:
    """Find the placeholders under some folders, each once, and refuse those that cannot be read."""
    found, refused = dict[Path, FoundPlaceholder](), list[AdapterRefused]()
    for path in folders:
        root = Path(os.path.realpath(path))
        if root.is_dir():
            trees = walk(root, {PLACEHOLDER_NAME}, refused.append)
        elif is_placeholder(root.name) and root.is_file():
            trees = iter([Folder(root.parent, {root.name: root})])
        else:
            fact = "is not a folder" if root.exists() else "does not exist"
            hint = "specify a folder that contains placeholders, at any depth"
            refused.append(AdapterRefused(fact, kind="not-a-folder", path=path, hint=hint))
            continue
        found |= {item.path: item for folder in trees for item in find_placeholders(folder)}
    refused += [item.content for item in found.values() if isinstance(item.content, AdapterRefused)]
    return [item for item in found.values() if isinstance(item.content, Placeholder)], refused


def _content(found: FoundPlaceholder) -> Placeholder:
    assert isinstance(found.content, Placeholder)  # those that cannot be read were refused before
    return found.content


def _refused(error: Exception, path: str, task: str | None) -> AdapterRestored:
    if isinstance(error, IcmError):
        failed = TaskFailed.of(task or "", error)
        return AdapterRestored(path, task, "refused", kind=failed.kind, reason=failed.message, hint=failed.hint)
    kind, reason = "cannot_decode", f"its code cannot be decoded: {type(error).__name__}: {error}"
    if isinstance(error, OSError):
        kind, reason = "cannot_write", f"it cannot be written: {error.strerror or error}"
    if is_full(error):
        hint = "free some space, then run the same command again"
        return AdapterRestored(path, task, "refused", kind=NO_SPACE, reason=reason, hint=hint)
    return AdapterRestored(path, task, "refused", kind=kind, reason=reason)


def _made(
    codes: CodeSource, found: FoundPlaceholder, weights: bytes | None, done: AdapterRestored
) -> tuple[AdapterBytes, AdapterRestored]:
    """Return the files of an adapter without a card, from its original if that is kept, or else from its code.

    Args:
        codes: Where to look for it.
        found: Its placeholder.
        weights: Its original weights, if its folder has them: then only the files next to them are made.
        done: The report for an original.
    """
    wanted, digests = _content(found), (_content(found).weights, _content(found).config)
    place, run = source_label(found.place), source_label(run_folder(found.place)[0])
    tasks = codes.with_adapter(*digests, name=wanted.task, folders={place, folder_of(place), run})
    # Several tasks may have it; the task that the placeholder names comes first.
    tasks.sort(key=lambda task: task.name.lower() != wanted.task.lower())
    if not tasks:
        hint = f"the placeholder names the store at {wanted.store}; specify it with --store if it is yours"
        if codes.name == "bundle":
            hint = "run `icm ls --from FILE` to list the tasks of a bundle"
        raise DataError(f"the {codes.name} has no adapter with the digests of task {wanted.task!r}", hint=hint)
    adapters = [one for task in tasks for one in task.adapters if (one.weights, one.config) == digests]
    original = next((one for one in adapters if weights is not None or not one.is_evicted), None)
    if original is not None:
        return original_files(codes.read, original, weights), done
    finals = [task for task in tasks if (task.final.weights, task.final.config) == digests]
    for task in finals:
        if task.code is not None:
            return _decoded(codes, task, task.code, done)
    if not finals:
        raise DataError("the store deleted this checkpoint, and a checkpoint has no code")
    raise DataError(f"the original of task {finals[0].name!r} was evicted, and it has no code")


def _decoded(codes: CodeSource, task: Task, code: Code, done: AdapterRestored) -> tuple[AdapterBytes, AdapterRestored]:
    from icmlora.fleet.resources.decoding import code_reader  # torch, which originals do not need

    adapter = code_reader(codes.read, codes.generator_file(code.generator), code)()
    return codes.form(task).write(adapter), replace(
        done,
        source="code",
        generator=str(code.generator),
        squared_error=code.squared_error,
        retained_gain=None if task.quality is None else task.quality.retained_gain,
        precision=None if task.quality is None else task.quality.precision,
    )


class _Restorer:
    """Writes the files of one adapter next to its placeholder, then removes the placeholder."""

    def __init__(self, codes: CodeSource, found: FoundPlaceholder) -> None:
        self._codes, self._found, self._wanted = codes, found, _content(found)
        self._home = found.path.parent
        self._format: AdapterFormat = format_named(self._wanted.format)

    def run(self, *, dry_run: bool) -> AdapterRestored:
        """Restore the adapter."""
        path = source_label(self._found.place)
        done = AdapterRestored(path, self._wanted.task, "complete", "original", squared_error=0.0, retained_gain=1.0)
        missing: Mapping[str, bytes] = {}
        # All are there if the eviction was interrupted before it deleted any, or if the user put the files back.
        if not all(map(self._is_there, self._wanted.files)):
            weights = self._weights
            is_exact = weights.stamp.digest == self._wanted.weights and self._is_there(weights)
            data = read_regular(self._home / weights.name, max_bytes=MAX_FILE_BYTES) if is_exact else None
            made, done = _made(self._codes, self._found, data, done)
            missing = self._missing(made)
            done = replace(
                done,
                status="would_restore" if dry_run else "restored",
                size=sum(map(len, missing.values())),
                weights=digest_of(made.weights),
                converted_from=weights.name if weights.name in PICKLES else None,  # a pickle comes back as safetensors
            )
        if dry_run:
            return done
        if missing:
            write_files(self._home, missing)
        failpoint("restored-adapter")
        unlink(self._found.path)
        fsync_dir(self._home)
        return done

    def _missing(self, made: AdapterBytes) -> dict[str, bytes]:
        """Return the missing files; raise if another file has the name of one."""
        missing: dict[str, bytes] = {}
        for name, data in self._files(made).items():
            path = self._home / name
            if not os.path.lexists(path):
                missing[name] = data
            elif path.is_symlink() or not path.is_file() or hash_regular(path).digest != digest_of(data):
                hint = "move it elsewhere, then run the same command again"
                raise OutputExists(f"{name} already exists with different content", path=path, hint=hint)
        return missing

    def _files(self, made: AdapterBytes) -> dict[str, bytes]:
        """Return the files to write, by name; the file that makes the folder an adapter comes last.

        Names come from the format and the store. Those in the placeholder only choose among them.
        """
        stem = f"{self._found.place.name}."
        is_single = self._found.path.name != PLACEHOLDER_NAME  # an adapter in a single file
        if is_single and (others := [file.name for file in self._wanted.files if not file.name.startswith(stem)]):
            raise DataError(f"the placeholder is for another file, {others[0]!r}", path=self._found.path)
        listed = {file.name for file in self._wanted.files if file.part == "companion"}
        kept = {f"{stem}{key}" if is_single else key: data for key, data in made.companions.items()}
        if lost := listed - kept.keys():
            raise DataError(f"{min(lost)} is not in the store, so the adapter would be incomplete")
        companions = {name: data for name, data in kept.items() if name in listed}
        if is_single:
            return {**companions, self._weights.name: made.weights}
        return self._format.lay_out(replace(made, card=None, companions=companions), "")

    @property
    def _weights(self) -> ReplacedFile:
        return next(file for file in self._wanted.files if file.part == "weights")

    def _is_there(self, file: ReplacedFile) -> bool:
        """Return whether a replaced file is there."""
        try:
            return hash_regular(self._home / file.name).digest == file.stamp.digest
        except AdapterRefused:
            return False
