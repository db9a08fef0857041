"""`icm show`: print everything about one task."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Annotated

from icm_cli.eval_report import no_gain
from icm_cli.options import TaskArg, option
from icm_cli.output import Field
from icm_cli.session import Session, command
from icm_cli.text import SOURCES, as_fields, claim_json, claim_text, figure, groups_json
from icmlora.fleet.measure.metric_result import MetricResult, gain_text, measured_in, source_name
from icmlora.fleet.stats.bill_text import limits_text
from icmlora.formats.images.header_notes import header_notes
from icmlora.io.text import counted, escape, human_percent, human_size, in_ranges

if TYPE_CHECKING:
    from collections.abc import Sequence

    from icmlora.adapter.metrics import GroupError
    from icmlora.fleet.records import AdapterRecord, CodeRecord, EvaluationRecord, TaskRecord
    from icmlora.fleet.tasks.tasks import TaskDetails

ErrorsOpt = Annotated[
    bool,
    option(
        "--errors",
        "Also decode the code and show its relative error by kind of module, or by block of an image model.",
    ),
]

_ADAPTER_FIELDS: tuple[Field[AdapterRecord], ...] = (
    Field("step", lambda adapter: "-" if adapter.step is None else str(adapter.step), right=True),
    Field("final", lambda adapter: "yes" if adapter.is_final else ""),
    Field("rank", lambda adapter: str(adapter.rank_max), right=True),
    Field("dtype", lambda adapter: adapter.dtype.lower()),
    Field("size", lambda adapter: _size(adapter), right=True),
    Field("weights", lambda adapter: adapter.weights[:12]),
)


@command
def show(session: Session, task: TaskArg, errors: ErrorsOpt = False) -> None:
    """Show one task: its adapters, vectors, code and measured quality.

    The nearest tasks have the smallest cosine distance between task vectors. `icm map` compares all tasks.

    Example:
      icm show shakespeare
      icm show watercolour --errors
    """
    from icmlora.fleet.tasks.tasks import show_task

    details = show_task(session.context, task)
    groups: Sequence[GroupError] = ()
    if errors:
        from icmlora.fleet.measure.module_errors import module_errors  # decodes

        groups = module_errors(session.context, task)
    session.out.document({**_as_json(details), "errors": groups_json(groups) if errors else None})
    session.out.record(_summary(details))
    session.out.line()
    is_same = details.same_as_final
    copies: Field[AdapterRecord] = Field("same as", lambda row: "final" if row.id in is_same else "", is_rare=True)
    session.out.listing([*_ADAPTER_FIELDS, copies], details.adapters)
    session.out.line()
    _print_evaluations(session, details)
    if groups:
        session.out.line()
        _print_errors(session, groups)
    if session.out.verbosity:
        session.out.line()
        for key, text in sorted(details.header.items()):
            session.out.line(f"{escape(key, 80)}  {escape(text, 400)}")
        for module, rank, inputs, outputs in details.final.layout:
            session.out.line(f"{module}  rank {rank}  {inputs} -> {outputs}")


def _summary(details: TaskDetails) -> list[tuple[str, str]]:
    final = details.final
    return [
        ("task", details.task.name),
        ("base model", details.task.base_model),
        *([] if final.format == "peft" else [("format", final.format)]),
        ("targets", ", ".join(in_ranges(final.target_modules))),
        ("modules", f"{len(final.layout)}, {final.parameters:,} parameters"),
        ("source", final.source),
        ("original", _original(details)),
        *_kept(final),
        *header_notes(details.header).items(),
        *_marks(details.task),
        ("samples", "yes" if details.task.samples else "no"),
        ("held-out text", "yes" if details.task.eval_data else "no"),
        *_template(details),
        ("vectors", counted(len(details.vectors), "vector")),
        *_nearest(details),
        *_coded(details),
        ("ingested", details.task.created_at),
    ]


def _marks(task: TaskRecord) -> list[tuple[str, str]]:
    tags = [("tags", ", ".join(task.tags))] if task.tags else []
    return tags if task.note is None else [*tags, ("note", " ".join(task.note.split()))]


def _template(details: TaskDetails) -> list[tuple[str, str]]:
    if details.template is None:
        return []
    owner = "of the adapter" if details.has_own_template else "of the base model"
    return [("chat template", f"{owner}, {details.template[:12]}")]


def _nearest(details: TaskDetails) -> list[tuple[str, str]]:
    found = ", ".join(f"{neighbour.task} {neighbour.distance:.3f}" for neighbour in details.nearest)
    return [("nearest tasks", found)] if found else []


def _coded(details: TaskDetails) -> list[tuple[str, str]]:
    generator, code = details.generator, details.code
    if details.final.original_only is not None:
        return []
    if code is None or generator is None:
        return [("code", "-")]
    error = "" if code.relative_error is None else f", relative error {code.relative_error:.3f}"
    effect = "" if code.effect is None else f", keeps {code.effect:.3f} of the adapter's effect"
    lines = [("code", f"{human_size(code.size)} under generator {generator.version}{error}{effect}")]
    if code.claim is not None:
        lines.append(("claimed by the bundle", f"{claim_text(code.claim)}; not measured here"))
    lines.append(("initialisation", _initial(details)))
    if code.asked is not None:
        verdict = "met" if code.asked.is_kept else "not met"
        lines.append(("limit", f"{limits_text(code.asked)}: {verdict}"))
    return lines


def _initial(details: TaskDetails) -> str:
    if details.initial is None:
        return "seed not recovered"
    found, modules = len(details.initial.modules), len(details.final.layout)
    return f"seed {details.initial.seed}, recovered for {found} of {counted(modules, 'module')}"


def _original(details: TaskDetails) -> str:
    final = details.final
    state = "in the store" if final.evicted_at is None else f"evicted at {final.evicted_at}"
    if final.is_generated:
        state = "none: generated, not trained" if final.evicted_at else "generated, then ingested"
    elif final.was_never_here:
        state = f"none: imported at {final.created_at} from a bundle, which holds only codes"
    return f"{state}, pinned" if details.task.pinned else state


def _kept(final: AdapterRecord) -> list[tuple[str, str]]:
    """Return the parts of an adapter that are stored exactly because no code can represent them."""
    lines = [] if final.original_only is None else [("original only", final.original_only)]
    if final.extras:
        files = ", ".join(extra.file for extra in final.extras if extra.file is not None)
        lines.append(("extras", f"{human_size(final.extras_bytes)}, stored exactly{files and f': {files}'}"))
    return lines


def _size(adapter: AdapterRecord) -> str:
    if adapter.was_never_here:
        return "none"
    return "evicted" if adapter.is_evicted else human_size(adapter.original_bytes)


def _present(details: TaskDetails) -> list[EvaluationRecord]:
    """Return the measurements that do not depend on an earlier generator, the task's own text first."""
    current = {None, None if details.generator is None else details.generator.id}
    rows = [row for row in details.evaluations if row.generator_id in current]
    return sorted(rows, key=lambda row: (row.data != details.task.eval_data, row.data, SOURCES.index(row.rung)))


def _print_evaluations(session: Session, details: TaskDetails) -> None:
    rows = _present(details)
    names = dict.fromkeys(name for row in rows for name in MetricResult.of(row).figures)
    fields: list[Field[EvaluationRecord]] = [
        Field("source", lambda row: f"{source_name(row.rung)}{measured_in([row.precision])}"),
        Field("text", lambda row: "held-out" if row.data == details.task.eval_data else row.data[:12]),
        *(Field(name, partial(_metric, name), right=True) for name in names),
        Field("retained gain", lambda row: gain_text(row.retained_gain, row.precision), right=True),
        Field("relative error", lambda row: figure(row.relative_error, 3), right=True),
    ]
    session.out.listing(fields, rows)
    for data in dict.fromkeys(row.data for row in rows):
        of_data = [row for row in rows if row.data == data]
        scores = {row.rung: MetricResult.of(row) for row in of_data}
        gains = [row.retained_gain for row in of_data if row.rung not in ("base", "original")]
        if sentence := no_gain(details.task.name, scores, gains):
            session.out.line(sentence)


def _metric(name: str, row: EvaluationRecord) -> str:
    value = MetricResult.of(row).figures.get(name)
    return "-" if value is None else f"{value:.4g}"


def _print_errors(session: Session, groups: Sequence[GroupError]) -> None:
    total = sum(group.parameters for group in groups)
    fields: list[Field[GroupError]] = [
        Field("modules", lambda group: group.group),
        Field("count", lambda group: str(group.modules), right=True),
        Field("share of parameters", lambda group: human_percent(group.parameters / total), right=True),
        *(Field(f"error of {source}", partial(_error, source), right=True) for source in groups[0].errors),
    ]
    session.out.listing(fields, groups)


def _error(source: str, group: GroupError) -> str:
    return f"{group.errors[source]:.3f}"


def _as_json(details: TaskDetails) -> dict[str, object]:
    generator, present = details.generator, _present(details)
    return {
        "name": details.task.name,
        "base_model": details.task.base_model,
        "created_at": details.task.created_at,
        "pinned": details.task.pinned,
        "tags": list(details.task.tags),
        "note": details.task.note,
        "samples": details.task.samples,
        "eval_data": details.task.eval_data,
        "original_only": details.final.original_only,
        "extras_bytes": details.final.extras_bytes,
        "adapters": [
            {**_adapter_json(adapter), "same_as_final": adapter.id in details.same_as_final}
            for adapter in details.adapters
        ],
        "layout": [
            {"module": module, "rank": rank, "in": inputs, "out": outputs}
            for module, rank, inputs, outputs in details.final.layout
        ],
        "header": dict(details.header),
        "template": details.template,
        "has_own_template": details.has_own_template,
        "vectors": [_without_ids(asdict(vector)) for vector in details.vectors],
        "nearest": [asdict(neighbour) for neighbour in details.nearest],
        "generator": None if generator is None else {"version": generator.version, "digest": generator.blob},
        "initial_seed": None if details.initial is None else details.initial.seed,
        "code": None if details.code is None else _code_json(details.code),
        "evaluations": [
            {**_evaluation_json(details, entry), "is_current": entry in present} for entry in details.evaluations
        ],
    }


def _code_json(code: CodeRecord) -> dict[str, object]:
    return {**_without_ids(as_fields(code), "claim"), "claimed": claim_json(code.claim)}


def _adapter_json(adapter: AdapterRecord) -> dict[str, object]:
    extras = [extra._asdict() for extra in adapter.extras]
    return {**_without_ids(asdict(adapter), "layout", "template"), "extras": extras}


def _evaluation_json(details: TaskDetails, entry: EvaluationRecord) -> dict[str, object]:
    # A task has one original, and its measurements are deleted with it: the rows do not repeat its digest.
    settings = {**entry.settings, "original": details.final.weights}
    figures = {name.replace(" ", "_"): value for name, value in MetricResult.of(entry).figures.items()}
    return {**_without_ids(as_fields(entry)), **figures, "settings": settings}


def _without_ids(fields: dict[str, object], *others: str) -> dict[str, object]:
    """Drop database ids, and the task's name, which the document already has."""
    dropped = {"id", "task", "adapter_id", "generator_id", *others}
    return {name: value for name, value in fields.items() if name not in dropped}
