"""`icm ingest`: add adapters to the store."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from itertools import zip_longest
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING, Annotated, Literal, cast

from icm_cli.command import plain_command as command
from icm_cli.commands.vectors import print_vectors_detail
from icm_cli.options import DeviceOpt, DryRunOpt, argument, option
from icm_cli.output import Column, Mode, Output
from icm_cli.report import print_event, print_skipped
from icm_cli.session import Session, end
from icm_cli.text import grouped, joined_text, path_shown
from icmlora.io.text import counted, escape, human_size, some

if TYPE_CHECKING:
    from icmlora.fleet.context import Event
    from icmlora.fleet.ingest.report import IngestReport, InputProblem, TaskIngested
    from icmlora.fleet.vectors.vectors import VectorReport

PathsArg = Annotated[list[Path], argument("PATH...", "Folders to search for adapters, at any depth.")]
NameOpt = Annotated[
    str | None, option("--name NAME", "Name of the task, for a single adapter. Default: the name of its folder.")
]
NameFromOpt = Annotated[
    str | None,
    option(
        "--name-from PATTERN", "Name tasks by {name}, {parent}, {grandparent} and {path}, such as '{parent}-{name}'."
    ),
]
SamplesOpt = Annotated[
    Path | None,
    option("--samples FILE", "Samples of the task, for a single adapter. Default: samples.jsonl next to it."),
]
BaseOfOpt = Annotated[
    str | None,
    option(
        "--base-model NAME",
        "Base model of image adapters, and of adapters that name none.",
        completes="base",
    ),
]
TextsOpt = Annotated[bool, option("--texts/--no-texts", "Also ingest samples.jsonl and eval.jsonl next to adapters.")]
StrictOpt = Annotated[bool, option("--strict", "Check everything first; store nothing if any input is refused.")]
OnConflictOpt = Annotated[
    Literal["version", "skip", "fail"] | None,
    option(
        "--on-conflict",
        "If the task has another adapter: add a version, skip or fail. Default: version if it is from the same folder, "
        "otherwise fail.",
    ),
]
RestoreOpt = Annotated[bool, option("--restore", "Store evicted originals again. Default: they stay evicted.")]
ReadBinOpt = Annotated[
    bool,
    option(
        "--read-bin",
        "Also read adapter_model.bin, a pickle, in a sandboxed process, and store it as safetensors.",
    ),
]
InitialOpt = Annotated[
    Path | None,
    option(
        "--initial FOLDER",
        "Initial weights of a PiSSA, OLoRA or CorDA adapter. Default: pissa_init, olora_init or corda_init next to it.",
    ),
]
VectorsOpt = Annotated[bool, option("--vectors/--no-vectors", "Extract task vectors if the base model is available.")]


@command
def ingest(
    session: Session,
    paths: PathsArg,
    name: NameOpt = None,
    name_from: NameFromOpt = None,
    samples: SamplesOpt = None,
    base_model: BaseOfOpt = None,
    texts: TextsOpt = True,
    strict: StrictOpt = False,
    on_conflict: OnConflictOpt = None,
    restore: RestoreOpt = False,
    read_bin: ReadBinOpt = False,
    initial: InitialOpt = None,
    vectors: VectorsOpt = True,
    device: DeviceOpt = None,
    dry_run: DryRunOpt = False,
) -> None:
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
    """
    from icmlora.fleet.ingest.ingest import ingest as take_in

    problems: list[InputProblem] = []
    printed: list[IngestReport] = []  # the report, once its totals are printed
    try:
        report, stopped = session.run(
            "ingest",
            lambda context: take_in(
                context,
                paths,
                name=name,
                name_from=name_from,
                samples=samples,
                base_model=base_model,
                texts=texts,
                strict=strict,
                on_conflict=on_conflict,
                restore=restore,
                read_bin=read_bin,
                initial=initial,
                vectors=vectors,
                device=session.device(device),
                dry_run=dry_run,
            ),
            partial(_print_event, session, problems, printed),
        )
    except Exception:
        if not printed and len(problems) > 1:  # a single reason is in the error itself
            print_problems(session.out, problems)
        raise
    if not printed:
        _print_totals(session, report, dry_run=dry_run)
    partly = _print_extracted(session, report.vectors)
    _print_notes(session, report, dry_run=dry_run, is_named=name is not None or name_from is not None)
    done = f"{len(report.ingested)} of {counted(report.found, 'task')} ingested"
    end(done, stopped=stopped, partly=partly or bool(report.problems))


def _print_extracted(session: Session, extracted: VectorReport | None) -> bool:
    """Print the results for task vectors; return whether any failed."""
    if extracted is None:
        return False
    out = session.out
    if extracted.done or not extracted.failed:
        out.line(f"extracted the vectors of {counted(len(extracted.done), 'task')}")
    for note in extracted.notes:
        out.note(note)
    for group in extracted.skipped:
        print_skipped(session, group, "no vectors")
    return extracted.is_partial


def _print_event(session: Session, problems: list[InputProblem], printed: list[IngestReport], event: Event) -> None:
    """Print one task; collect the problems, which are listed at the end."""
    from icmlora.fleet.bases.joins import BaseJoined
    from icmlora.fleet.context import StageBegun
    from icmlora.fleet.ingest.report import InputProblem, PlaceholderMet, TaskIngested

    if isinstance(event, TaskIngested):
        session.out.event("task", **asdict(event))
        session.out.detail(f"{event.task}: {event.status}, {event.new} new, {event.known} unchanged")
        for name, read in (("samples", event.samples), ("held-out text", event.eval_data)):
            if read is not None and read.skipped:
                rows = f"kept {counted(read.kept, 'row')} of the {name}, skipped {read.skipped:,}"
                session.out.note(f"{event.task}: {rows}; first problem: {read.reason}")
    elif isinstance(event, PlaceholderMet):
        session.out.event("placeholder", **asdict(event))
    elif isinstance(event, BaseJoined):
        session.out.event("base_joined", **asdict(event))
    elif isinstance(event, InputProblem):
        session.out.event("problem", **asdict(event))
        problems.append(event)
    elif isinstance(event, StageBegun):
        printed.append(cast("IngestReport", event.report))
        _print_totals(session, printed[0], dry_run=False)
    else:
        print_event(session, event)
        print_vectors_detail(session, event)


def _print_totals(session: Session, report: IngestReport, *, dry_run: bool) -> None:
    verb = "would ingest" if dry_run else "ingested"
    parts = sum(problem.task is not None for problem in report.problems)
    some = [
        *((report.evicted, "evicted"), (report.restored, "restored")),
        *((len(report.problems) - parts, "refused"), (parts, "ingested in part")),
    ]
    more = "".join(f", {count} {what}" for count, what in some if count)
    session.out.line(
        f"{verb} {counted(len(report.ingested), 'task')}: {counted(report.new, 'new adapter')}, "
        f"{report.known} unchanged{more}; {human_size(report.size)}"
    )
    if report.evicted:
        session.out.hint("run `icm ingest --restore PATH` to store evicted originals again")


def _print_notes(session: Session, report: IngestReport, *, dry_run: bool, is_named: bool) -> None:
    session.out.event(
        "summary",
        dry_run=dry_run,
        tasks=len(report.ingested),
        new=report.new,
        known=report.known,
        evicted=report.evicted,
        restored=report.restored,
        originals_only=sum(task.original_only is not None for task in report.ingested),
        not_taken=sum(problem.task is None for problem in report.problems),
        in_part=sum(problem.task is not None for problem in report.problems),
        placeholders=len(report.placeholders),
        not_kept=report.not_kept,
        size=report.size,
        without_vectors=report.without_vectors,
    )
    for joined in report.joined:
        session.out.note(joined_text(joined))
    if not is_named:
        _print_names(session.out, report)
    _print_versions(session.out, report)
    _print_bases(session.out, report)
    _print_originals(session.out, report)
    for shown, one, several, what in _FACTS:
        tasks = [text for task in report.ingested if (text := shown(task)) is not None]
        if tasks:
            session.out.note(f"{counted(len(tasks), what)} {one if len(tasks) == 1 else several}: {some(tasks)}")
    if any(task.wrapper not in (None, "module") for task in report.ingested):
        session.out.hint("run `icm materialize TASK --source code` to write the names that PEFT expects")
    _print_duplicates(session.out, report)
    _print_placeholders(session.out, report)
    if report.not_kept:
        files = [name if count == 1 else f"{name} ({count} times)" for name, count in report.not_kept.items()]
        total = counted(sum(report.not_kept.values()), "file")
        session.out.note(f"did not store {total} next to adapters: {some(files)}")
    _print_missing_vectors(session.out, report)
    print_problems(session.out, report.problems)


def _print_missing_vectors(out: Output, report: IngestReport) -> None:
    """Print why tasks have no task vectors, and the command that helps."""
    if not report.without_vectors:
        return
    tasks = f"{counted(len(report.without_vectors), 'task')} without task vectors"
    missing = report.bases_not_found
    if not missing:
        out.note(tasks)
        out.hint("run `icm vectors` to extract them")
        return
    bases = f"base model{'s' if len(missing) > 1 else ''} {some(missing)} not found on this machine"
    out.note(f"{tasks}: {bases}")
    more = " for each of them" if len(missing) > 1 else ""
    out.hint(f"run `icm base add {shlex.quote(missing[0])} PATH`{more}, then `icm vectors`")


def _print_names(out: Output, report: IngestReport) -> None:
    """Print the new tasks that are not named after their folder."""
    added = [task for task in report.ingested if task.status == "added"]
    named = [f"{task.task} ({path_shown(task.folder)})" for task in added if task.is_renamed]
    if named:
        fact = "has another name than its folder" if len(named) == 1 else "have other names than their folders"
        out.note(f"{counted(len(named), 'task')} {fact}: {some(named)}")
    if foreign := [task.task for task in added if not task.task.isascii()]:
        out.hint(f"use Tab to complete names, or `icm edit {shlex.quote(foreign[0])} --name NAME` to rename a task")


def _print_versions(out: Output, report: IngestReport) -> None:
    """Print the tasks with a new version."""
    new = [task for task in report.ingested if task.status == "version"]
    if len(new) == 1:
        number = new[0].version
        out.note(f"{new[0].task}: version {number} (its adapter changed; version {number - 1} is kept)")
    elif new:
        shown = some([f"{task.task} (version {task.version})" for task in new])
        out.note(f"{counted(len(new), 'task')} have a new version, because their adapters changed: {shown}")


def _print_bases(out: Output, report: IngestReport) -> None:
    """Print base models that are guessed, and names that look like one base model."""
    for names in report.lookalikes:
        first, *others = map(shlex.quote, sorted(names, key=lambda name: (name.count("/") != 1, name)))
        alias = f"`icm base alias {first} {' '.join(others)}`"
        out.note(f"{some(names)} look like one base model; if they are, run {alias}")
    if guessed := grouped((task.base_model, task.task) for task in report.ingested if task.base_is_guess):
        groups = [f"{base} for {some(tasks)}" for base, tasks in guessed.items()]
        out.note(f"guessed the base model from the tensor shapes: {'; '.join(groups)}")
        out.hint("if that is wrong, run `icm ingest PATH --base-model NAME --on-conflict version`")


def _print_originals(out: Output, report: IngestReport) -> None:
    reasons = grouped((task.original_only, task.task) for task in report.ingested if task.original_only is not None)
    if reasons:
        count = sum(map(len, reasons.values()))
        verb = "cannot have a code and stays an original" if count == 1 else "cannot have a code and stay originals"
        groups = [f"{some(tasks)} ({reason})" for reason, tasks in reasons.items()]
        out.note(f"{counted(count, 'task')} {verb}: {some(groups, '; ')}")


_WRAPPED = "tensor names with a wrapper's prefix, so PEFT loads nothing into an unwrapped model"
_LARGE = "extras (heads, tokenizers, other files) larger than the LoRA"
_DECODED = "skipped, because icm wrote {} from the code of an evicted task"
# A text for each task that a fact holds for, the fact about one and about several, and what they are.
_FACTS: tuple[tuple[Callable[[TaskIngested], str | None], str, str, str], ...] = (
    (
        lambda task: None if task.converted_from is None else f"{task.task} (from {task.converted_from})",
        *2 * ("converted from a pickle and stored as safetensors",),
        "task",
    ),
    (
        lambda task: None if task.initial is None else f"{task.task} ({path_shown(task.initial)})",
        "has initial weights and can have a code",
        "have initial weights and can have a code",
        "task",
    ),
    (
        lambda task: None if task.wrapper is None else f"{task.task} ({task.wrapper})",
        f"has {_WRAPPED}",
        f"have {_WRAPPED}",
        "task",
    ),
    (
        lambda task: (
            f"{task.task} ({human_size(task.extras_size)}, LoRA {human_size(task.lora_size)})"
            if task.original_only is None and task.extras_size > task.lora_size
            else None
        ),
        f"has {_LARGE}",
        f"have {_LARGE}",
        "task",
    ),
    (
        lambda task: task.task if task.status == "decoded" else None,
        _DECODED.format("it"),
        _DECODED.format("them"),
        "adapter",
    ),
)


def _print_duplicates(out: Output, report: IngestReport) -> None:
    """Print checkpoints that equal the final adapter, and new adapters that equal another task's."""
    equal = [task for task in report.ingested if task.same_as_final]
    same = [f"{task.task} (step {', '.join(map(str, task.same_as_final))})" for task in equal]
    if same:
        steps = sum(len(task.same_as_final) for task in equal)
        verb = "is identical to its final adapter" if steps == 1 else "are identical to their final adapters"
        out.note(f"{counted(steps, 'checkpoint')} {verb}: {some(same)}")
    pairs = [(task.task, task.same_as) for task in report.ingested if task.same_as is not None]
    if len(pairs) == 1:
        out.note("{} has the same tensors as {}".format(*pairs[0]))
    elif pairs:
        shown = some([f"{task} ({other})" for task, other in pairs])
        out.note(f"{len(pairs):,} tasks have the same tensors as another: {shown}")
    if pairs:
        out.hint("run `icm rm NAME` to remove a task, or `icm duplicates` to find near copies too")


def _print_placeholders(out: Output, report: IngestReport) -> None:
    """Print the placeholders that were skipped, and the number of adapters next to them."""
    met = report.placeholders
    if not met:
        return
    tasks = list(dict.fromkeys(item.task for item in met))
    out.note(f"skipped {counted(len(met), 'placeholder')} of {some(tasks)}")
    if left := sum(item.passed_over for item in met):
        out.note(f"skipped {counted(left, 'checkpoint')} next to them, without a final adapter")
    out.hint("run `icm restore FOLDER` to write adapters back to their placeholders")


def print_problems(out: Output, problems: Sequence[InputProblem]) -> None:
    """List refused inputs: the path, the reason and the next step."""
    if not problems or out.is_json:
        return
    if out.is_quiet:
        for problem in problems:
            out.warn(f"{problem.path}: {problem.message}")
        return
    rows = [
        (
            path_shown(problem.path),
            problem.message if problem.task is None else f"{problem.message} ({problem.task} was ingested without it)",
            problem.hint or "",
        )
        for problem in problems
    ]
    columns = [Column("refused"), Column("reason"), Column("next step")]
    out.line()
    out.table(columns, rows if out.mode is Mode.PLAIN else _wrapped(rows))


_PATH_SHARE, _GAPS = 0.34, 4


def _wrapped(rows: Sequence[tuple[str, str, str]]) -> list[tuple[str, str, str]]:
    """Break cells into lines, so that the table fits the terminal and every path is shown in full."""
    # Escaped first: a written-out character is wider than it was.
    rows = [(escape(path), escape(reason), escape(hint)) for path, reason, hint in rows]
    room = max(40, shutil.get_terminal_size().columns - _GAPS)
    first = min(max(len(row[0]) for row in rows), int(room * _PATH_SHARE))
    third = min(max(len(row[2]) for row in rows), (room - first) // 2)
    second = room - first - third
    lines: list[tuple[str, str, str]] = []
    for path, reason, hint in rows:
        pieces = [path[at : at + first] for at in range(0, len(path), first)]
        lines.extend(zip_longest(pieces, wrap(reason, second), wrap(hint, max(third, 1)), fillvalue=""))
    return lines
