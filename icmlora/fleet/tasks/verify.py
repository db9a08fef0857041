"""Check a store for damage, repair it, and prune files that nothing needs: `icm verify`, `icm prune`."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from icmlora.errors import BaseModelMismatch, BaseModelNotFound, DataError
from icmlora.fleet.context import Context, Event, locate_base, use_case
from icmlora.fleet.failures import FAILURES, as_error
from icmlora.fleet.params import DryRun, Param, Tasks, age
from registry.errors import DamagedStore
from registry.findings import Finding, Rebuilt
from registry.manifests import Code, Task

if TYPE_CHECKING:
    from registry.reachability import PruneReport as PruneReport
    from registry.store import Store

_SAME = 1e-3
"""How much two measurements of a relative error may differ, on other processors and with other versions of torch."""


@dataclass(frozen=True)
class Found(Event):
    """`verify` found something."""

    finding: Finding


@use_case
def verify(
    context: Context,
    tasks: Tasks = (),
    *,
    read_data: Annotated[bool, Param("Hash every blob instead of only checking its length.")] = False,
    decode: Annotated[bool, Param("Decode codes that still have an original, and compare their errors.")] = False,
) -> list[Finding]:
    """Check the store for damage.

    Compares the database with the manifests, and checks the length of every blob. --read-data also checks the contents.
    The exit code is 1 if there are problems. Remarks are not problems: they name adapters that have no effect and, with
    --read-data, adapters that do not fit their base model, if it is on this machine, and changes that were not
    committed. -v also lists harmless leftovers of interrupted commands.

    Other commands skip damaged tasks, and delete nothing until the store is repaired.

    --repair deletes nothing. A removed task stays removed.

    Example:
      icm verify --read-data
    """
    findings = []
    with context.open(read_only=True) as store:
        for finding in _findings(store, tasks, read_data=read_data, decode=decode):
            context.on_event(Found(finding))
            findings.append(finding)
    return findings


def _findings(store: Store, tasks: Sequence[str], *, read_data: bool, decode: bool) -> Iterator[Finding]:
    is_damaged = False
    for finding in store.verify(read_data=read_data, names=tasks):
        yield finding
        is_damaged |= finding.is_problem and finding.is_of_database
    if is_damaged:  # the rest reads tasks
        return
    fitted = defaultdict[str, list[Task]](list)
    for task in store.named(tasks) if tasks else store.tasks():
        code = task.code
        if decode and code is not None and task.final.can_be_read and code.squared_error is not None:
            fact = _wrong_error(store, task, code, math.sqrt(code.squared_error))
            if fact is not None:
                yield _finding("code", task, f"the code of task {task.name} {fact}", code.blob)
        if task.final.does_nothing:
            yield _finding("remark", task, f"the adapter of {task.name} does nothing: {task.final.original_only}")
        elif task.final.layout and read_data:
            fitted[task.base_model].append(task)
        if read_data and task.final.extras:
            yield from _missing_references(store, task)
    for base_model, some in fitted.items():
        yield from _misfits(store, base_model, some)


def _finding(kind: Literal["remark", "code"], task: Task, text: str, digest: str | None = None) -> Finding:
    return Finding(kind, text, digest or "", digest, (task.name,))


def _missing_references(store: Store, task: Task) -> Iterator[Finding]:
    from icmlora.fleet.resources.decoding import check_references

    try:
        check_references(store, task)
    except BaseModelMismatch as error:
        yield _finding("remark", task, f"the adapter of {task.name} cannot be written from its code: {error.message}")
    except (BaseModelNotFound, DataError, DamagedStore):  # nothing to compare with, or damage that was found already
        return


def _misfits(store: Store, base_model: str, tasks: Sequence[Task]) -> Iterator[Finding]:
    try:
        found = locate_base(store, base_model)  # before torch is imported
        from icmlora.base_models.running.modules import check_fits
        from icmlora.base_models.skeleton import load_skeleton

        base = load_skeleton(found)
    except BaseModelNotFound:  # nothing to compare with
        return
    for task in tasks:
        try:
            check_fits(base, task.final.layout)
        except BaseModelMismatch as error:
            yield _finding("remark", task, f"the adapter of {task.name} does not fit: {error.message}")


def _wrong_error(store: Store, task: Task, code: Code, recorded: float) -> str | None:
    """Decode a code whose original is there; return the problem if its error is not the recorded one."""
    from icmlora.adapter.metrics import squared_error
    from icmlora.fleet.resources.decoding import decode_code
    from icmlora.fleet.resources.loading import read_original
    from icmlora.generator.codec.generator_file import GeneratorFile

    try:
        decoded = decode_code(store, GeneratorFile(store.blobs.read(code.generator)), code)
        measured = math.sqrt(squared_error(read_original(store, task.final), decoded))
    except FAILURES as error:
        return f"cannot be decoded: {as_error(error).message}"
    if math.isclose(recorded, measured, rel_tol=_SAME, abs_tol=_SAME):
        return None
    return f"has a relative error of {measured:.4f}, but {recorded:.4f} is recorded"


@use_case
def rebuild_database(context: Context) -> Rebuilt:
    """Write the database again from the manifests: it may be missing, damaged, or an old copy."""
    with context.open() as store:
        return store.rebuild()


@use_case
def repair_files(context: Context, findings: Sequence[Finding] | None = None) -> list[tuple[Finding, str]]:
    """Correct one flipped bit of small damaged files, and move other damaged files to quarantine.

    Args:
        context: The store.
        findings: Of `verify`; by default it reads all files.

    Returns:
        Each finding with the result. Ingesting an adapter again restores its files.
    """
    with context.open() as store:
        found = list(store.verify(read_data=True)) if findings is None else findings
        done = [(one, store.repair(one)) for one in found if one.is_of_file]
        return [(one, result) for one, result in done if result is not None]


@use_case
def prune(
    context: Context,
    *,
    grace: Annotated[
        float | None,
        Param(
            "Delete only files older than AGE, such as 30m or 7d. Default: 1h, or 24h in an object store.",
            "--grace --older-than AGE",
            min=0,
            parse=age,
        ),
    ] = None,
    empty_quarantine: Annotated[bool, Param("Also delete the damaged files in quarantine.")] = False,
    dry_run: DryRun = False,
) -> PruneReport:
    """Delete files that no task needs and leftovers of interrupted commands.

    These are earlier states of tasks, files of removed or evicted tasks, and generators that no code needs. Nothing is
    deleted if the database disagrees with the manifests. Files newer than --grace are kept, so a running `icm ingest`
    is safe.

    Example:
      icm prune --dry-run
    """
    with context.open(read_only=dry_run) as store:
        return store.prune(grace=grace, empty_quarantine=empty_quarantine, dry_run=dry_run)
