"""Check a store for damage, repair it, and prune what nothing needs: `icm verify`, `icm prune`."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from icmlora.errors import BaseModelMismatch, BaseModelNotFound, DataError
from icmlora.fleet.context import Context, locate_base, use_case
from registry.errors import DamagedStore, RegistryError
from registry.verify import Finding as Finding

if TYPE_CHECKING:
    from registry.records import CodeRecord, GeneratorRecord, TaskSummary
    from registry.storage.prune import PruneReport as PruneReport
    from registry.storage.row_repair import RowRepair as RowRepair
    from registry.store import Store

BlobKind = Literal["code", "generator", "task vectors", "weights"]

_STARTS: dict[bytes, BlobKind] = {
    b"ICMC": "code",
    b"ICMG": "generator",
    b"ICMT": "task vectors",
    b"GGUF": "weights",
}
_MAX_HEADER = 100 << 20
"""More than the header of any safetensors file has."""
_SAME = 1e-3
"""How far two measurements of one relative error may be apart, on other processors and with other versions of torch."""


@use_case
def verify(
    context: Context, tasks: Sequence[str] = (), *, read_data: bool = False, decode: bool = False
) -> Iterator[Finding]:
    """Check the database and the blobs, and yield what is wrong as it is found.

    Args:
        context: The store.
        tasks: Check only what these tasks need; everything if empty.
        read_data: Also read and hash every blob. By default only its presence and length are checked.
        decode: Also decode every code whose original is there, and compare its error with the recorded one.
    """
    with context.open(read_only=True) as store:
        rows_are_wrong = False
        for finding in store.verify(read_data=read_data, names=tasks):
            yield finding
            rows_are_wrong |= finding.kind in ("database", "row")
        if rows_are_wrong:
            return  # what follows believes them
        wanted = {store.tasks.get(name).name for name in tasks}
        rows = [row for row in store.tasks.summaries() if not wanted or row.task.name in wanted]
        if read_data:
            yield from _wrong_kinds(store, wanted)
        if decode:
            yield from _wrong_errors(store, rows)
        yield from _remarks(store, rows, with_base_models=read_data)


def _remarks(store: Store, rows: Sequence[TaskSummary], *, with_base_models: bool) -> Iterator[Finding]:
    """Yield which adapters do nothing, and which do not fit their base model."""
    fitted: defaultdict[str, list[TaskSummary]] = defaultdict(list)
    for row in rows:
        if with_base_models and row.final.extras:
            yield from _missed(store, row)
        if row.final.does_nothing:
            yield _remark(row, f"the adapter of {row.task.name} does nothing: {row.final.original_only}")
        elif row.final.layout:
            fitted[row.task.base_model].append(row)
    if with_base_models:
        for label, some in fitted.items():
            yield from _misfits(store, label, some)


def _missed(store: Store, row: TaskSummary) -> Iterator[Finding]:
    from icmlora.fleet.resources.decoding import check_references

    try:
        check_references(store, row.final)
    except BaseModelMismatch as error:
        yield _remark(row, f"the adapter of {row.task.name} cannot be written from its code: {error.message}")
    except (BaseModelNotFound, DataError, DamagedStore):  # nothing to compare with, or damage that was found already
        return


def _misfits(store: Store, label: str, rows: Sequence[TaskSummary]) -> Iterator[Finding]:
    try:
        found = locate_base(store, label)  # before torch is imported
        from icmlora.base_models.running.modules import check_fits
        from icmlora.base_models.skeleton import load_skeleton

        base = load_skeleton(found)
    except BaseModelNotFound:  # then there is nothing to compare with
        return
    for row in rows:
        try:
            check_fits(base, row.final.layout)
        except BaseModelMismatch as error:
            yield _remark(row, f"the adapter of {row.task.name} does not fit: {error.message}")


def _remark(row: TaskSummary, text: str) -> Finding:
    return Finding("remark", text, "", tasks=(row.task.name,))


def _wrong_kinds(store: Store, wanted: Collection[str]) -> Iterator[Finding]:
    """Yield the blobs that are no code or generator although their rows say so."""
    for generator in store.generators.all():
        rows = [row for row in store.codes.all(generator.id) if not wanted or row.task in wanted]
        expected = [(row.blob, "code", (row.task,)) for row in rows]
        for digest, kind, tasks in [*expected, (generator.blob, "generator", ())]:
            with suppress(DamagedStore):  # one that is missing was found already
                if kind_of(store.blobs.start(digest, 64)) != kind:
                    fact = f"blob {digest} does not have the kind recorded in its row, {kind}"
                    yield Finding("row", fact, store.blobs.place(digest), digest, tasks)


def _wrong_errors(store: Store, rows: Sequence[TaskSummary]) -> Iterator[Finding]:
    """Decode every code whose original is there, and yield those that have another error than was recorded."""
    for row in rows:
        code, generator = row.code, store.generators.current(row.task.base_model)
        if code is None or generator is None or not row.final.can_be_read or code.squared_error is None:
            continue  # nothing to compare, or nobody measured it
        if (fact := _wrong_error(store, row, code, generator, code.squared_error)) is not None:
            yield Finding("row", fact, store.blobs.place(code.blob), code.blob, (row.task.name,))


def _wrong_error(
    store: Store, row: TaskSummary, code: CodeRecord, generator: GeneratorRecord, recorded: float
) -> str | None:
    """Say what is wrong with the recorded squared error of a code; None if nothing is."""
    from icmlora.adapter.metrics import squared_error
    from icmlora.fleet.failures import FAILURES, as_error
    from icmlora.fleet.resources.decoding import decode_code
    from icmlora.fleet.resources.loading import read_original
    from icmlora.generator.versions import GeneratorFile

    try:
        decoded = decode_code(store, GeneratorFile(store.blobs.read(generator.blob)), code)
        before, now = math.sqrt(recorded), math.sqrt(squared_error(read_original(store, row.final), decoded))
    except FAILURES as error:
        return f"the code of task {row.task.name} cannot be decoded: {as_error(error).message}"
    if math.isclose(before, now, rel_tol=_SAME, abs_tol=_SAME):
        return None
    return f"the code of task {row.task.name} has a relative error of {now:.4f}, but {before:.4f} is recorded"


def kind_of(start: bytes) -> BlobKind | None:
    """Return what a blob is by its first bytes, at least nine of them; None for anything else, such as text."""
    # A safetensors file begins with the length of its header, which is JSON.
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= _MAX_HEADER:
        return "weights"
    return _STARTS.get(start[:4])


@use_case
def repair_blobs(context: Context) -> list[tuple[Finding, str]]:
    """Move every damaged blob to quarantine, and return its finding and new place. Ingesting restores originals."""
    with context.open() as store:
        return store.repair()


@use_case
def repair_rows(context: Context) -> list[RowRepair]:
    """Correct rows of the database of which a single bit flipped; a copy of it goes to quarantine before.

    Returns:
        What became of each wrong row: the value that was corrected, or the `problem` for which it was left alone.
    """
    with context.open() as store:
        return store.repair_rows()


@use_case
def restore_database(context: Context) -> str:
    """Put the copy of the database that icm kept before the last deletion in its place.

    What was there goes to the folder `quarantine` of the store. What was recorded after the copy is not in it.

    Returns:
        When the copy was made, as RFC 3339.

    Raises:
        DamagedStore: There is no copy, or it is damaged too; nothing was changed.
    """
    from registry.storage.kept import restore_database

    if not isinstance(context.address, Path):
        hint = "the database server has backups of its own: see docs/guides/team.md"
        raise RegistryError(f"icm keeps no backup of the database at {context.address}", hint=hint)
    return restore_database(context.address, lock_timeout=context.lock_timeout, command=context.command)


@use_case
def prune(
    context: Context, *, grace: float | None = None, empty_quarantine: bool = False, dry_run: bool = False
) -> PruneReport:
    """Delete blobs that no task needs and files that interrupted commands left behind.

    Codes, generators and weights are moved to the folder `quarantine` beside the blobs instead. In a remote
    place, the originals that `evict` left because they were young are deleted, if what replaces them is intact.

    Args:
        context: The store.
        grace: Seconds; younger files stay, so that a running ingest is safe. By default an hour, in an object store 24.
        empty_quarantine: Delete these too, and what is in quarantine.
        dry_run: Only report what would be deleted.
    """
    with context.open(read_only=dry_run) as store:
        return store.prune(
            grace=grace,
            is_precious=lambda start: kind_of(start) in ("code", "generator", "weights"),
            empty_quarantine=empty_quarantine,
            dry_run=dry_run,
        )
