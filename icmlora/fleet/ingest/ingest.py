"""Ingest adapters: find them, check them, store their bytes, then publish them.

    find     paths -> tasks, named, in batches
    check    files -> checked in memory -> blobs, durable        (icmlora.fleet.ingest.files)
    record   one transaction per batch -> manifests              (icmlora.fleet.ingest.record)
    extract  task vectors of the new tasks, if the base model is on this machine

A refused input goes into the report and never stops the others, except with `strict`, which checks everything first.
Recorded batches stay; running the same ingest again records only the rest.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

from icmlora.base_models.finding.labels import typed_label
from icmlora.errors import AdapterRefused, OptionsConflict, UnsafeInput
from icmlora.fleet.context import Context, Event, Progress, StageBegun, reporting, use_case
from icmlora.fleet.ingest.extraction import extract
from icmlora.fleet.ingest.report import IngestReport, InputProblem, OnConflict
from icmlora.fleet.params import Device, DryRun, Param
from icmlora.formats.discovery.discovery import find_tasks, name_tasks, no_adapter
from icmlora.formats.discovery.naming import NameTemplate
from registry.errors import SourceRefused
from registry.names import source_label


@use_case
def ingest(
    context: Context,
    paths: Annotated[Sequence[str | Path], Param("Folders to search for adapters, at any depth.", "PATH...")],
    *,
    name: Annotated[
        str | None, Param("Name of the task, for a single adapter. Default: the name of its folder.", "--name NAME")
    ] = None,
    name_from: Annotated[
        str | None,
        Param(
            "Name tasks by {name}, {parent}, {grandparent} and {path}, such as '{parent}-{name}'.",
            "--name-from PATTERN",
        ),
    ] = None,
    samples: Annotated[
        str | Path | None,
        Param("Samples of the task, for a single adapter. Default: samples.jsonl next to it.", "--samples FILE"),
    ] = None,
    base_model: Annotated[
        str | None,
        Param("Base model of image adapters, and of adapters that name none.", "--base-model NAME", completes="base"),
    ] = None,
    texts: Annotated[
        bool, Param("Also ingest samples.jsonl and eval.jsonl next to adapters.", "--texts/--no-texts")
    ] = True,
    strict: Annotated[bool, Param("Check everything first; store nothing if any input is refused.")] = False,
    on_conflict: Annotated[
        OnConflict | None,
        Param(
            "If the task has another adapter: add a version, skip or fail. Default: version if it is from the same "
            "folder, otherwise fail."
        ),
    ] = None,
    restore: Annotated[bool, Param("Store evicted originals again. Default: they stay evicted.")] = False,
    read_bin: Annotated[
        bool,
        Param("Also read adapter_model.bin, a pickle, in a sandboxed process, and store it as safetensors."),
    ] = False,
    initial: Annotated[
        str | Path | None,
        Param(
            "Initial weights of a PiSSA, OLoRA or CorDA adapter. Default: pissa_init, olora_init or corda_init next "
            "to it.",
            "--initial FOLDER",
        ),
    ] = None,
    vectors: Annotated[
        bool, Param("Extract task vectors if the base model is available.", "--vectors/--no-vectors")
    ] = True,
    device: Device = "auto",
    dry_run: DryRun = False,
) -> IngestReport:
    """Add adapters to the store: PEFT folders, training runs and other formats.

    Files are checked and copied; PATH is not changed, and ingesting it again is safe. If the adapter of a known task
    changed in its folder, it becomes the task's next version; earlier versions are kept. Refused inputs are listed at
    the end and do not stop the rest; the exit code is then 3. If the base model is available, task vectors are
    extracted too. `icm convert --list-formats` lists the formats.

    A task is named after its folder, or after the parent if the folder has a generic name such as adapter or final. If
    two names clash, the parent's name is added. In --name-from, {path} joins all folders below PATH, {name#run-} cuts
    "run-" from the start and {name%-lora} cuts "-lora" from the end.

    Example:
      icm ingest ./loras
      icm ingest ./saves --name-from '{parent}-{name}'

    Raises:
        OptionsConflict: Both `name` and `name_from` are given.
        AdapterRefused: Nothing was found, or everything was refused; with `strict`, an input was refused.
        TaskConflict: The same, because a task has another adapter in the store.
    """
    if name is not None and name_from is not None:
        raise OptionsConflict("--name and --name-from cannot be used together")
    from icmlora.fleet.ingest.ingestion import Ingestion

    roots, folder = [Path(path) for path in paths], None if initial is None else Path(initial).resolve()
    found = find_tasks(roots, texts=texts, read_bin=read_bin, initial=folder)
    if not found.tasks and not found.refused and not found.stand_ins:
        raise no_adapter(roots)
    if found.tasks and name is not None:
        found = replace(found, tasks=name_tasks(found.tasks, name=name))
    if samples is not None:
        if len(found.tasks) != 1:
            fact = f"--samples is for one task, but {len(found.tasks)} were found"
            raise AdapterRefused(fact, kind="samples", path=samples, hint="specify the folder of a single task")
        found = replace(found, tasks=(replace(found.tasks[0], samples=Path(samples)),))
    not_kept = Counter(source_label(Path(path.name)) for task in found.tasks for path in task.not_kept)
    report = IngestReport(found=len(found.tasks), not_kept=dict(sorted(not_kept.items())))
    ingestion = Ingestion(
        context,
        report,
        is_named=name is not None,
        pattern=None if name_from is None else NameTemplate(name_from),
        named_base=None if base_model is None else typed_label(base_model),
        on_conflict=on_conflict,
        restore=restore,
        dry_run=dry_run,
    )
    with reporting(report):
        if strict:
            checking = replace(context, on_event=lambda event: _only_progress(context, event))
            check = replace(ingestion, context=checking, report=IngestReport(), dry_run=True)
            check.run(found)
            _raise_first(check.report, "nothing was ingested: {count} inputs were refused, and --strict allows none")
        extractable = ingestion.run(found)
        if not report.done:
            _raise_first(report, "nothing was ingested: all {count} inputs were refused")
        if vectors and extractable:
            context.on_event(StageBegun("task vectors", report))
            extract(context, report, extractable, device)
    return report


def _only_progress(context: Context, event: Event) -> None:
    if isinstance(event, Progress | InputProblem):
        context.on_event(event)


def _raise_first(report: IngestReport, message: str) -> None:
    """Raise the error if there is one; if there are several, one with the exit code of the first."""
    if len(report.errors) == 1:
        raise report.errors[0]
    if report.errors:
        kind = UnsafeInput if isinstance(report.errors[0], UnsafeInput | SourceRefused) else AdapterRefused
        raise kind(message.format(count=len(report.errors)), kind=report.problems[0].kind)
