"""`icm ingest`: add adapters to the store."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict
from itertools import zip_longest
from textwrap import wrap
from typing import TYPE_CHECKING, cast

from icm_cli.command import Call, command
from icm_cli.commands.vectors import print_vectors_detail
from icm_cli.output import Column, Mode, Output
from icm_cli.report import end, print_skipped
from icm_cli.session import Session
from icm_cli.text import grouped, joined_text, path_shown
from icmlora.fleet.bases.joins import BaseJoined
from icmlora.fleet.context import StageBegun
from icmlora.fleet.ingest import ingest as ingestion
from icmlora.fleet.ingest.report import IngestReport, InputProblem, TaskIngested
from icmlora.io.text import counted, escape, human_size, some

if TYPE_CHECKING:
    from icmlora.fleet.context import Event


@command(ingestion.ingest)
def ingest(session: Session, call: Call[IngestReport]) -> None:
    out, dry_run = session.out, call["dry_run"]
    problems: list[InputProblem] = []
    are_totals_printed = False

    def on_event(event: Event) -> None:
        nonlocal are_totals_printed
        if isinstance(event, TaskIngested):
            out.detail(f"{event.task}: {event.status}, {event.new} new, {event.known} unchanged")
            for name, read in (("samples", event.samples), ("held-out text", event.eval_data)):
                if read is not None and read.skipped:
                    rows = f"kept {counted(read.kept, 'row')} of the {name}, skipped {read.skipped:,}"
                    out.note(f"{event.task}: {rows}; first problem: {read.reason}")
        elif isinstance(event, BaseJoined):
            out.event("base_joined", **asdict(event))
        elif isinstance(event, InputProblem):
            problems.append(event)
        elif isinstance(event, StageBegun):
            _print_totals(out, cast("IngestReport", event.report), dry_run=False)
            are_totals_printed = True
        else:
            print_vectors_detail(session, event)

    try:
        report = call.run(on_event)
    except Exception:
        if not are_totals_printed and len(problems) > 1:  # a single reason is in the error itself
            print_problems(out, problems)
        raise
    if not are_totals_printed:
        _print_totals(out, report, dry_run=dry_run)
    if (vectors := report.vectors) is not None:
        if vectors.done or not vectors.failed:
            out.line(f"extracted the vectors of {counted(len(vectors.done), 'task')}")
        for note in vectors.notes:
            out.note(note)
        for group in vectors.skipped:
            print_skipped(session, group, "no vectors")
    parts = sum(problem.task is not None for problem in report.problems)
    out.event(
        "summary",
        dry_run=dry_run,
        tasks=len(report.done),
        new=report.new,
        known=report.known,
        evicted=report.evicted,
        restored=report.restored,
        originals_only=sum(task.original_only is not None for task in report.done),
        not_taken=len(report.problems) - parts,
        in_part=parts,
        placeholders=len(report.placeholders),
        not_kept=report.not_kept,
        size=report.size,
        without_vectors=report.without_vectors,
    )
    _print_notes(out, report, is_named=call["name"] is not None or call["name_from"] is not None)
    print_problems(out, report.problems)
    end(report, f"{len(report.done)} of {counted(report.found, 'task')} ingested")


def _print_totals(out: Output, report: IngestReport, *, dry_run: bool) -> None:
    parts = sum(problem.task is not None for problem in report.problems)
    counts = [
        *((report.evicted, "evicted"), (report.restored, "restored")),
        *((len(report.problems) - parts, "refused"), (parts, "ingested in part")),
    ]
    more = "".join(f", {count} {what}" for count, what in counts if count)
    out.line(
        f"{'would ingest' if dry_run else 'ingested'} {counted(len(report.done), 'task')}: "
        f"{counted(report.new, 'new adapter')}, {report.known} unchanged{more}; {human_size(report.size)}"
    )
    if report.evicted:
        out.hint("run `icm ingest --restore PATH` to store evicted originals again")


# Whether a fact holds for a task, how the task is shown, and the fact.
_FACTS: tuple[tuple[Callable[[TaskIngested], object], str, str], ...] = (
    (
        lambda task: task.status == "added" and task.is_renamed,
        "{task} ({folder})",
        "{has} another name than {its} folder{s}",
    ),
    (
        lambda task: task.status == "version",
        "{task} (version {version})",
        "{has} a new version, because {its} adapter{s} changed",
    ),
    (
        lambda task: task.converted_from,
        "{task} (from {converted_from})",
        "converted from a pickle and stored as safetensors",
    ),
    (lambda task: task.initial, "{task} ({initial})", "{has} initial weights and can have a code"),
    (
        lambda task: task.wrapper,
        "{task} ({wrapper})",
        "{has} tensor names with a wrapper's prefix, so PEFT loads nothing into an unwrapped model",
    ),
    (
        lambda task: task.original_only is None and task.extras_size > task.lora_size,
        "{task} ({extras}, LoRA {lora})",
        "{has} extras (heads, tokenizers, other files) larger than the LoRA",
    ),
    (
        lambda task: task.status == "decoded",
        "{task}",
        "skipped, because icm wrote {its} adapter{s} from the code of an evicted task",
    ),
    (lambda task: task.same_as_final, "{task} (step {steps})", "{has} checkpoints identical to {its} final adapter{s}"),
    (lambda task: task.same_as, "{task} ({same_as})", "{has} the same tensors as another"),
)


def _shown(task: TaskIngested, template: str) -> str:
    shown = {
        "folder": path_shown(task.folder),
        "initial": path_shown(task.initial or ""),
        "extras": human_size(task.extras_size),
        "lora": human_size(task.lora_size),
        "steps": ", ".join(map(str, task.same_as_final)),
    }
    return template.format_map(vars(task) | shown)


def _print_notes(out: Output, report: IngestReport, *, is_named: bool) -> None:
    for joined in report.joined:
        out.note(joined_text(joined))
    for names in report.lookalikes:
        first, *others = map(shlex.quote, sorted(names, key=lambda name: (name.count("/") != 1, name)))
        alias = f"`icm base alias {first} {' '.join(others)}`"
        out.note(f"{some(names)} look like one base model; if they are, run {alias}")
    if guessed := grouped((task.base_model, task.task) for task in report.done if task.base_is_guess):
        groups = [f"{base} for {some(tasks)}" for base, tasks in guessed.items()]
        out.note(f"guessed the base model from the tensor shapes: {'; '.join(groups)}")
        out.hint("if that is wrong, run `icm ingest PATH --base-model NAME --on-conflict version`")
    if reasons := grouped((task.original_only, task.task) for task in report.done if task.original_only is not None):
        count = sum(map(len, reasons.values()))
        verb = "cannot have a code and stays an original" if count == 1 else "cannot have a code and stay originals"
        groups = [f"{some(tasks)} ({reason})" for reason, tasks in reasons.items()]
        out.note(f"{counted(count, 'task')} {verb}: {some(groups, '; ')}")
    for holds, template, fact in _FACTS[is_named:]:  # the first fact is about names
        tasks = [_shown(task, template) for task in report.done if holds(task)]
        has, its, s = ("has", "its", "") if len(tasks) == 1 else ("have", "their", "s")
        if tasks:
            out.note(f"{counted(len(tasks), 'task')} {fact.format(has=has, its=its, s=s)}: {some(tasks)}")
    foreign = [task.task for task in report.done if task.status == "added" and not task.task.isascii()]
    if foreign and not is_named:
        out.hint(f"use Tab to complete names, or `icm edit {shlex.quote(foreign[0])} --name NAME` to rename a task")
    if any(task.wrapper not in (None, "module") for task in report.done):
        out.hint("run `icm materialize TASK --source code` to write the names that PEFT expects")
    if any(task.same_as is not None for task in report.done):
        out.hint("run `icm rm NAME` to remove a task, or `icm duplicates` to find near copies too")
    if met := report.placeholders:
        out.note(
            f"skipped {counted(len(met), 'placeholder')} of {some(list(dict.fromkeys(item.task for item in met)))}"
        )
        if left := sum(item.passed_over for item in met):
            out.note(f"skipped {counted(left, 'checkpoint')} next to them, without a final adapter")
        out.hint("run `icm restore FOLDER` to write adapters back to their placeholders")
    if report.not_kept:
        files = [name if count == 1 else f"{name} ({count} times)" for name, count in report.not_kept.items()]
        total = counted(sum(report.not_kept.values()), "file")
        out.note(f"did not store {total} next to adapters: {some(files)}")
    if report.without_vectors:
        fact, missing = f"{counted(len(report.without_vectors), 'task')} without task vectors", report.bases_not_found
        if missing:
            out.note(f"{fact}: base model{'s' if len(missing) > 1 else ''} {some(missing)} not found on this machine")
            more = " for each of them" if len(missing) > 1 else ""
            out.hint(f"run `icm base add {shlex.quote(missing[0])} PATH`{more}, then `icm vectors`")
        else:
            out.note(fact)
            out.hint("run `icm vectors` to extract them")


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
