"""`icm ingest`: take adapters into the store."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from itertools import zip_longest
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING, Annotated, Literal, cast

from icm_cli.failures import print_skipped, print_vectors_event
from icm_cli.options import DeviceOpt, DryRunOpt, argument, option
from icm_cli.output import Column, Mode, Output
from icm_cli.session import Session, command, end
from icm_cli.text import grouped, joined_text, path_shown
from icmlora.io.text import counted, escape, human_size, some

if TYPE_CHECKING:
    from icmlora.fleet.context import Event
    from icmlora.fleet.ingest.ingest import IngestReport, InputProblem
    from icmlora.fleet.vectors.vectors import VectorReport

PathsArg = Annotated[list[Path], argument("PATH...", "Folders with adapters, at any depth.")]
NameOpt = Annotated[
    str | None, option("--name NAME", "Name of the task, if there is only one. Default: the name of its folder.")
]
NameFromOpt = Annotated[
    str | None,
    option(
        "--name-from PATTERN", "Make names of {name}, {parent}, {grandparent} and {path}, such as '{parent}-{name}'."
    ),
]
SamplesOpt = Annotated[
    Path | None,
    option("--samples FILE", "Samples of the task, if there is only one. Default: samples.jsonl next to its adapter."),
]
BaseOfOpt = Annotated[
    str | None,
    option(
        "--base-model NAME",
        "Base model of image adapters, whatever they name, and of other adapters that name none.",
        completes="base",
    ),
]
TextsOpt = Annotated[
    bool, option("--texts/--no-texts", "Also ingest the samples.jsonl and eval.jsonl found next to adapters.")
]
StrictOpt = Annotated[
    bool, option("--strict", "Check everything first, and store nothing if anything cannot be taken.")
]
OnConflictOpt = Annotated[
    Literal["skip", "replace", "fail"],
    option("--on-conflict", "What to do if the store has a task of that name with another adapter."),
]
RestoreOpt = Annotated[bool, option("--restore", "Bring evicted originals back. By default they stay evicted.")]
ReadBinOpt = Annotated[
    bool,
    option(
        "--read-bin",
        "Also read adapter_model.bin, a pickle, in a process of its own with limits, and store it as safetensors.",
    ),
]
InitialOpt = Annotated[
    Path | None,
    option(
        "--initial FOLDER",
        "Initial weights of a PiSSA, OLoRA or CorDA adapter. Default: pissa_init (olora_init ...) next to it.",
    ),
]
VectorsOpt = Annotated[
    bool, option("--vectors/--no-vectors", "Extract task vectors if the base model is on this machine.")
]


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
    on_conflict: OnConflictOpt = "fail",
    restore: RestoreOpt = False,
    read_bin: ReadBinOpt = False,
    initial: InitialOpt = None,
    vectors: VectorsOpt = True,
    device: DeviceOpt = None,
    dry_run: DryRunOpt = False,
) -> None:
    """Take adapters into the store: PEFT folders, training runs, or adapters of other programs.

    Files are checked and copied; nothing in PATH is changed. Running the same command again changes nothing. An
    adapter that cannot have a code, such as a LoHa, is kept as its original only. What cannot be taken is listed at the
    end and never stops the rest; the exit code is then 3. If the base model is on this machine, task vectors are
    extracted too; otherwise run `icm vectors` later. `icm base alias` is for base models with several names,
    and `icm convert --list-formats` lists the formats.

    A task is named after its folder. If the folder is called adapter, best, final, lora, model, output or similar, the
    task is named after the folder above it. Where folders have the same name, the name of the folder above is put in
    front. A task that the store has keeps its name. --name-from passes over folders with such names too; {path} has
    all folders below PATH, {name#run-} cuts "run-" at the start and {name%-lora} "-lora" at the end.

    Example:
      icm ingest ./loras
      icm ingest ./saves --name-from '{parent}-{name}'
    """
    from icmlora.fleet.ingest.ingest import ingest as take_in

    problems: list[InputProblem] = []
    taken: list[IngestReport] = []  # what was taken, once that is told
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
            partial(_tell, session, problems, taken),
        )
    except Exception:
        if not taken and len(problems) > 1:  # nothing was taken; one reason alone is what the error says
            tell_problems(session.out, problems)
        raise
    if not taken:
        _tell_sum(session, report, dry_run=dry_run)
    partly = _tell_extracted(session.out, report.vectors)
    _tell_end(session, report, dry_run=dry_run, is_named=name is not None or name_from is not None)
    done = f"{len(report.ingested)} of {counted(report.found, 'task')} ingested"
    end(done, stopped=stopped, partly=partly or bool(report.problems))


def _tell_extracted(out: Output, extracted: VectorReport | None) -> bool:
    """Say what came of the task vectors, and return whether some failed."""
    if extracted is None:
        return False
    if extracted.tasks or not extracted.failed:
        out.line(f"extracted the vectors of {counted(len(extracted.tasks), 'task')}")
    for note in extracted.notes:
        out.note(note)
    return print_skipped(out, extracted.left_out, "no vectors") or bool(extracted.failed)


def _tell(session: Session, problems: list[InputProblem], taken: list[IngestReport], event: Event) -> None:
    """Report one task; collect what was not taken, which is listed at the end."""
    from icmlora.fleet.bases.joins import BaseJoined
    from icmlora.fleet.context import StageBegun
    from icmlora.fleet.ingest.ingest import InputProblem, PlaceholderMet, TaskIngested

    if isinstance(event, TaskIngested):
        session.out.event("task", **asdict(event))
        session.out.detail(f"{event.task}: {event.status}, {event.new} new, {event.known} known")
        for name, read in (("samples", event.samples), ("held-out text", event.eval_data)):
            if read is not None and read.skipped:
                rows = f"kept {counted(read.kept, 'row')}, skipped {read.skipped:,}"
                session.out.note(f"{event.task}: {name}: {rows}; the first: {read.reason}")
    elif isinstance(event, PlaceholderMet):
        session.out.event("placeholder", **asdict(event))
    elif isinstance(event, BaseJoined):
        session.out.event("base_joined", **asdict(event))
    elif isinstance(event, InputProblem):
        session.out.event("problem", **asdict(event))
        problems.append(event)
    elif isinstance(event, StageBegun):
        taken.append(cast("IngestReport", event.report))
        _tell_sum(session, taken[0], dry_run=False)
    else:
        print_vectors_event(session, event)


def _tell_sum(session: Session, report: IngestReport, *, dry_run: bool) -> None:
    verb = "would ingest" if dry_run else "ingested"
    parts = sum(problem.task is not None for problem in report.problems)
    some = [
        *((report.evicted, "evicted"), (report.restored, "restored")),
        *((len(report.problems) - parts, "not taken"), (parts, "taken in part")),
    ]
    more = "".join(f", {count} {what}" for count, what in some if count)
    session.out.line(
        f"{verb} {counted(len(report.ingested), 'task')}: {counted(report.new, 'new adapter')}, "
        f"{report.known} known{more}; {human_size(report.size)}"
    )
    if report.evicted:
        session.out.hint("evicted originals stay evicted; `--restore` brings them back")


def _tell_end(session: Session, report: IngestReport, *, dry_run: bool, is_named: bool) -> None:
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
        _tell_names(session.out, report)
    _tell_guesses(session.out, report)
    _tell_originals(session.out, report)
    _tell_converted(session.out, report)
    _tell_wrapped(session.out, report)
    _tell_extras(session.out, report)
    _tell_decoded(session.out, report)
    _tell_duplicates(session.out, report)
    _tell_placeholders(session.out, report)
    if report.not_kept:
        files = [name if count == 1 else f"{name} ({count} times)" for name, count in report.not_kept.items()]
        total = counted(sum(report.not_kept.values()), "file")
        session.out.note(f"not kept: {total} next to adapters: {some(files)}")
    if report.without_vectors:
        session.out.note(f"{counted(len(report.without_vectors), 'task')} without task vectors")
        session.out.hint("run `icm vectors` to extract them; `icm base ls` shows whether the base model is found")
    tell_problems(session.out, report.problems)


def _tell_tasks(out: Output, tasks: Sequence[str], one: str, several: str | None = None, what: str = "task") -> None:
    """Say what is so with some tasks, if there are any."""
    if tasks:
        is_so = one if len(tasks) == 1 or several is None else several
        out.note(f"{counted(len(tasks), what)} {is_so}: {some(tasks)}")


def _tell_names(out: Output, report: IngestReport) -> None:
    """Say which new tasks are not called like their folder."""
    added = [task for task in report.ingested if task.status == "added"]
    named = [f"{task.task} ({path_shown(task.folder)})" for task in added if task.is_renamed]
    _tell_tasks(out, named, "is not called like the folder", "are not called like the folder")
    if foreign := [task.task for task in added if not task.task.isascii()]:
        out.hint(f"Tab completes names that are hard to type; `icm edit {foreign[0]} --name NAME` renames a task")


def _tell_guesses(out: Output, report: IngestReport) -> None:
    """Say which base models are no more than likely."""
    if guessed := grouped((task.base_model, task.task) for task in report.ingested if task.base_is_guess):
        groups = [f"{base} for {some(tasks)}" for base, tasks in guessed.items()]
        out.note(f"the base model is a guess from the sizes of the tensors: {'; '.join(groups)}")
        out.hint("if it is wrong: `icm ingest --base-model NAME --on-conflict replace`")


def _tell_originals(out: Output, report: IngestReport) -> None:
    reasons = grouped((task.original_only, task.task) for task in report.ingested if task.original_only is not None)
    if reasons:
        count = sum(map(len, reasons.values()))
        verb = "is kept as its original only" if count == 1 else "are kept as originals only"
        groups = [f"{some(tasks)} ({reason})" for reason, tasks in reasons.items()]
        out.note(f"{counted(count, 'task')} {verb}: {some(groups, '; ')}")


def _tell_converted(out: Output, report: IngestReport) -> None:
    tasks = [f"{task.task} (from {task.converted_from})" for task in report.ingested if task.converted_from is not None]
    _tell_tasks(out, tasks, "converted from a pickle, kept as safetensors")
    tasks = [f"{task.task} ({path_shown(task.initial)})" for task in report.ingested if task.initial is not None]
    _tell_tasks(out, tasks, "has initial weights, and can have a code", "have initial weights, and can have a code")


def _tell_wrapped(out: Output, report: IngestReport) -> None:
    tasks = [f"{task.task} ({task.wrapper})" for task in report.ingested if task.wrapper is not None]
    fact = "tensors with names of a wrapper, which PEFT loads only into a model that is wrapped alike"
    _tell_tasks(out, tasks, f"has {fact}", f"have {fact}")
    if any(task.wrapper not in (None, "module") for task in report.ingested):
        out.hint("the original stays as it is; `icm materialize TASK --source code` writes names that PEFT finds")


def _tell_extras(out: Output, report: IngestReport) -> None:
    large = [
        f"{task.task} ({human_size(task.extras_size)}, LoRA {human_size(task.lora_size)})"
        for task in report.ingested
        if task.original_only is None and task.extras_size > task.lora_size
    ]
    if large:
        verb = "has" if len(large) == 1 else "have"
        out.note(
            f"{counted(len(large), 'task')} {verb} more bytes in heads, tokenizers and other extras than in the LoRA: "
            f"{some(large)}; equal extras are stored once"
        )


def _tell_decoded(out: Output, report: IngestReport) -> None:
    tasks = [task.task for task in report.ingested if task.status == "decoded"]
    fact = "written from the code of an evicted task, and not taken"
    _tell_tasks(out, tasks, f"was {fact}", f"were {fact}", what="adapter")


def _tell_duplicates(out: Output, report: IngestReport) -> None:
    """Say which new adapters have the tensors of another task."""
    pairs = [(task.task, task.same_as) for task in report.ingested if task.same_as is not None]
    if len(pairs) == 1:
        out.note("{} has the same tensors as {}".format(*pairs[0]))
    elif pairs:
        shown = some([f"{task} ({other})" for task, other in pairs])
        out.note(f"{len(pairs):,} tasks have the same tensors as another: {shown}")
    if pairs:
        out.hint("`icm rm NAME` removes a task; `icm duplicates` also finds near copies")


def _tell_placeholders(out: Output, report: IngestReport) -> None:
    """Say which placeholders were passed over, and with how many adapters next to them."""
    met = report.placeholders
    if not met:
        return
    tasks = list(dict.fromkeys(item.task for item in met))
    out.note(f"{counted(len(met), 'placeholder')} passed over, for {some(tasks)}")
    if left := sum(item.passed_over for item in met):
        verb = "was" if left == 1 else "were"
        out.note(f"{counted(left, 'checkpoint')} next to them {verb} passed over too: the final adapter is not there")
    out.hint("`icm restore FOLDER` brings adapters back where placeholders are")


def tell_problems(out: Output, problems: Sequence[InputProblem]) -> None:
    """List what was not taken, or taken in part: where, why, and what to do."""
    if not problems or out.is_json:
        return
    if out.is_quiet:
        for problem in problems:
            out.warn(f"{problem.path}: {problem.message}")
        return
    rows = [
        (
            path_shown(problem.path),
            problem.message if problem.task is None else f"{problem.message} ({problem.task} is taken without it)",
            problem.hint or "",
        )
        for problem in problems
    ]
    columns = [Column("not taken"), Column("reason"), Column("way out")]
    out.line()
    out.table(columns, rows if out.mode is Mode.PLAIN else _wrapped(rows))


_PATH_SHARE, _GAPS = 0.34, 4


def _wrapped(rows: Sequence[tuple[str, str, str]]) -> list[tuple[str, str, str]]:
    """Break cells into lines, so that the table fits the terminal and every path can be read as a whole."""
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
