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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

from icmlora.errors import AdapterRefused, DataError, OutputExists
from icmlora.fleet.bundles.bundles import Bundle
from icmlora.fleet.context import Context, Event, TaskFailed, reporting, use_case
from icmlora.fleet.failures import FAILURES
from icmlora.fleet.params import BundleFile, DryRun, Param
from icmlora.fleet.resources.adapter_row import original_files
from icmlora.fleet.resources.code_source import CodeSource, StoreCodes, open_codes
from icmlora.fleet.results import Report
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
from registry.manifests import WithRelativeError
from registry.names import folder_of, source_label
from registry.storage.blobs.content import digest_of

NO_SPACE = "no_space"
"""The kind of a refusal because the disk is full."""


@dataclass(frozen=True)
class AdapterRestored(WithRelativeError, Event):
    """The result for one placeholder."""

    TYPE = "adapter"

    path: str  # of the placeholder's folder, or of a refused input
    task: str | None  # as the placeholder names it; None if it cannot be read
    # `restored`; `would_restore` in a dry run; `complete` (the files were all there, so only the placeholder went);
    # `refused` (see `kind`, `reason` and `hint`).
    status: Literal["restored", "would_restore", "complete", "refused"]
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
class RestoreReport(Report[AdapterRestored]):
    """The restored adapters, and the refused ones."""

    refused: list[AdapterRestored] = field(default_factory=list)
    errors: list[Exception] = field(default_factory=list)  # one for each refused adapter

    @property
    def is_partial(self) -> bool:
        """Whether an adapter was not restored."""
        return super().is_partial or bool(self.refused)

    @property
    def is_full(self) -> bool:
        """Whether something could not be restored because the disk is full."""
        return any(adapter.kind == NO_SPACE for adapter in self.refused)

    @property
    def size(self) -> int:
        """All bytes that were written, or would be."""
        return sum(adapter.size for adapter in self.done)


@use_case
def restore(
    context: Context,
    folders: Annotated[Sequence[str | Path], Param("Folders that contain placeholders at any depth.", "FOLDER...")],
    *,
    bundle: BundleFile = None,
    dry_run: DryRun = False,
) -> RestoreReport:
    """Replace placeholders of `icm evict --placeholder` with their adapters.

    If the store still has the original, the adapter is restored byte for byte. Otherwise it is decoded from its code,
    in the original's format, and the table shows the loss. With --from, codes are read from a bundle and no store is
    needed. Existing files are never overwritten. A placeholder is deleted only once its adapter is complete.

    If some adapters cannot be restored, they are listed and the exit code is 3, or 15 if the disk is full.

    icm uses the store given by --store, and ignores the store recorded in a placeholder.

    Example:
      icm restore ./loras
      icm restore ./loras/dog-detection --from fleet.icm

    Raises:
        DataError: A folder does not exist, or nothing could be restored.
        BundleError: The bundle is damaged.
    """
    report = RestoreReport()
    with reporting(report):
        found: dict[Path, FoundPlaceholder] = {}
        for path in folders:
            root = Path(os.path.realpath(path))
            if root.is_dir():
                trees = walk(root, {PLACEHOLDER_NAME}, lambda error: _refuse(context, report, error))
            elif is_placeholder(root.name) and root.is_file():
                trees = iter([Folder(root.parent, {root.name: root})])
            else:
                fact = "is not a folder" if root.exists() else "does not exist"
                hint = "specify a folder that contains placeholders, at any depth"
                _refuse(context, report, AdapterRefused(fact, kind="not-a-folder", path=path, hint=hint))
                continue
            found |= {item.path: item for folder in trees for item in find_placeholders(folder)}
        readable: list[tuple[FoundPlaceholder, Placeholder]] = []
        for item in found.values():
            if isinstance(item.content, Placeholder):
                readable.append((item, item.content))
            else:
                _refuse(context, report, item.content)
        if readable:
            with _opened(context, bundle, {content.store for _, content in readable}) as codes:
                for number, (item, content) in enumerate(readable):
                    place = source_label(item.place)
                    context.progress(number, len(readable), place)
                    try:
                        done = _restore(codes, item, content, dry_run=dry_run)
                    except (*FAILURES, RegistryError, OSError) as error:
                        _refuse(context, report, error, place, content.task)
                    else:
                        report.done.append(done)
                        context.on_event(done)
                context.progress(len(readable), len(readable))
    if report.errors and not report.done:
        full = [error for error in report.errors if is_full(error)]
        if full or len(report.errors) == 1:
            raise (full or report.errors)[0]
        raise DataError(f"nothing was restored: all {len(report.errors)} placeholders were refused")
    return report


def _refuse(
    context: Context, report: RestoreReport, error: Exception, path: str | None = None, task: str | None = None
) -> None:
    hint = None
    if isinstance(error, IcmError):
        failed = TaskFailed.of(task or "", error)
        kind, reason, hint = failed.kind, failed.message, failed.hint
    elif isinstance(error, OSError):
        kind, reason = "cannot_write", f"it cannot be written: {error.strerror or error}"
    else:
        kind, reason = "cannot_decode", f"its code cannot be decoded: {type(error).__name__}: {error}"
    if is_full(error) and not isinstance(error, IcmError):
        kind, hint = NO_SPACE, "free some space, then run the same command again"
    path = path or getattr(error, "path", None) or "."
    report.errors.append(error)
    report.refused.append(AdapterRestored(path, task, "refused", kind=kind, reason=reason, hint=hint))
    context.on_event(report.refused[-1])


@contextmanager
def _opened(context: Context, bundle: str | Path | None, named: set[str]) -> Iterator[CodeSource]:
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
        error.hint = f"the placeholders name the store at {min(named)}; specify it with --store if it is yours"
        raise
    with store:
        yield StoreCodes(store, context)


def _restore(codes: CodeSource, found: FoundPlaceholder, wanted: Placeholder, *, dry_run: bool) -> AdapterRestored:
    """Write the files of one adapter next to its placeholder, then remove the placeholder."""
    path, home, known = source_label(found.place), found.path.parent, format_named(wanted.format)
    done = AdapterRestored(path, wanted.task, "complete", "original", squared_error=0.0, retained_gain=1.0)
    missing: dict[str, bytes] = {}
    weights = next(file for file in wanted.files if file.part == "weights")
    # All are there if the eviction was interrupted before it deleted any, or if the user put the files back.
    if not all(_is_there(home, file) for file in wanted.files):
        is_exact = weights.stamp.digest == wanted.weights and _is_there(home, weights)
        data = read_regular(home / weights.name, max_bytes=MAX_FILE_BYTES) if is_exact else None
        files, done = _files(codes, found, wanted, data, done)
        for name, content in _laid_out(known, found, wanted, files).items():
            target = home / name
            if not os.path.lexists(target):
                missing[name] = content
            elif target.is_symlink() or not target.is_file() or hash_regular(target).digest != digest_of(content):
                hint = "move it elsewhere, then run the same command again"
                raise OutputExists(f"{name} already exists with different content", path=target, hint=hint)
        done = replace(
            done,
            status="would_restore" if dry_run else "restored",
            size=sum(map(len, missing.values())),
            weights=digest_of(files.weights),
            converted_from=weights.name if weights.name in PICKLES else None,  # a pickle comes back as safetensors
        )
    if dry_run:
        return done
    if missing:
        write_files(home, missing)
    failpoint("restored-adapter")
    unlink(found.path)
    fsync_dir(home)
    return done


def _files(
    codes: CodeSource, found: FoundPlaceholder, wanted: Placeholder, weights: bytes | None, done: AdapterRestored
) -> tuple[AdapterBytes, AdapterRestored]:
    """Return the files of an adapter without a card, from its original if that is kept, or else from its code.

    Args:
        codes: Where to look for it.
        found: Its placeholder.
        wanted: The content of the placeholder.
        weights: Its original weights, if its folder has them: then only the files next to them are made.
        done: The report for an original.
    """
    digests = wanted.weights, wanted.config
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
    if not finals:
        raise DataError("the store deleted this checkpoint, and a checkpoint has no code")
    task = next((task for task in finals if task.code is not None), finals[0])
    if task.code is None:
        raise DataError(f"the original of task {task.name!r} was evicted, and it has no code")
    from icmlora.fleet.resources.decoding import code_reader  # torch, which originals do not need

    adapter = code_reader(codes.read, codes.generator_file(task.code.generator), task.code)()
    return codes.form(task).write(adapter), replace(
        done,
        source="code",
        generator=str(task.code.generator),
        squared_error=task.code.squared_error,
        retained_gain=None if task.quality is None else task.quality.retained_gain,
        precision=None if task.quality is None else task.quality.precision,
    )


def _laid_out(
    known: AdapterFormat, found: FoundPlaceholder, wanted: Placeholder, files: AdapterBytes
) -> dict[str, bytes]:
    """Return the files to write, by name; the file that makes the folder an adapter comes last.

    Names come from the format and the store. Those in the placeholder only choose among them.
    """
    stem = f"{found.place.name}."
    is_single = found.path.name != PLACEHOLDER_NAME  # an adapter in a single file
    if is_single and (others := [file.name for file in wanted.files if not file.name.startswith(stem)]):
        raise DataError(f"the placeholder is for another file, {others[0]!r}", path=found.path)
    listed = {file.name for file in wanted.files if file.part == "companion"}
    kept = {f"{stem}{key}" if is_single else key: data for key, data in files.companions.items()}
    if lost := listed - kept.keys():
        raise DataError(f"{min(lost)} is not in the store, so the adapter would be incomplete")
    companions = {name: data for name, data in kept.items() if name in listed}
    if is_single:
        weights = next(file.name for file in wanted.files if file.part == "weights")
        return {**companions, weights: files.weights}
    return known.lay_out(replace(files, card=None, companions=companions), "")


def _is_there(home: Path, file: ReplacedFile) -> bool:
    try:
        return hash_regular(home / file.name).digest == file.stamp.digest
    except AdapterRefused:
        return False
