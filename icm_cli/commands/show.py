"""`icm show`: print everything about one task."""

from __future__ import annotations

from functools import partial
from itertools import repeat
from typing import TYPE_CHECKING, Annotated

from icm_cli.command import Call, command
from icm_cli.eval_report import no_gain
from icm_cli.output import Field
from icm_cli.session import Session
from icm_cli.text import SOURCES, as_fields, claim_json, claim_text, figure, groups_json
from icmlora.fleet.measure.metric_result import MetricResult, gain_text, measured_in
from icmlora.fleet.params import Param
from icmlora.fleet.stats.bill_text import limits_text
from icmlora.fleet.tasks.details import show_task
from icmlora.formats.file_header import header_notes
from icmlora.io.text import counted, escape, human_percent, human_size, in_ranges

if TYPE_CHECKING:
    from collections.abc import Sequence

    from icmlora.adapter.metrics import GroupError
    from icmlora.fleet.tasks.details import TaskDetails
    from registry.manifests import Measurement, StoredAdapter, Task

ErrorsOpt = Annotated[
    bool,
    Param(
        "Also decode the code and show its relative error by kind of module, or by block of an image model.", "--errors"
    ),
]


@command(show_task)
def show(session: Session, call: Call[TaskDetails], errors: ErrorsOpt = False) -> None:
    details = call.now()
    groups: Sequence[GroupError] = ()
    if errors:
        from icmlora.fleet.measure.module_errors import module_errors  # decodes

        groups = module_errors(session.context, call["task"])
    session.out.document({**_as_json(details), "errors": groups_json(groups) if errors else None})
    session.out.record(_summary(details))
    session.out.line()
    _print_adapters(session, details)
    session.out.line()
    _print_measurements(session, details)
    if groups:
        session.out.line()
        total = sum(group.parameters for group in groups)
        fields: list[Field[GroupError]] = [
            Field("modules", lambda group: group.group),
            Field("count", lambda group: str(group.modules), right=True),
            Field("share of parameters", lambda group: human_percent(group.parameters / total), right=True),
            *(Field(f"error of {source}", partial(_error, source), right=True) for source in groups[0].errors),
        ]
        session.out.listing(fields, groups)
    if session.out.verbosity:
        session.out.line()
        for key, text in sorted(details.header.items()):
            session.out.line(f"{escape(key, 80)}  {escape(text, 400)}")
        for module, rank, inputs, outputs in details.task.final.layout:
            session.out.line(f"{module}  rank {rank}  {inputs} -> {outputs}")


def _summary(details: TaskDetails) -> list[tuple[str, str]]:
    task, final = details.task, details.task.final
    tags = [("tags", ", ".join(task.tags))] if task.tags else []
    found = ", ".join(f"{neighbour.task} {neighbour.distance:.3f}" for neighbour in details.nearest)
    return [
        ("task", task.name),
        *([] if task.version == 1 else [("version", str(task.version))]),
        ("base model", task.base_model),
        *([] if final.format == "peft" else [("format", final.format)]),
        ("targets", ", ".join(in_ranges(final.target_modules))),
        ("modules", f"{len(final.layout)}, {final.parameters:,} parameters"),
        ("source", final.source),
        ("original", _original(task)),
        *_kept(task),
        *header_notes(details.header).items(),
        *(tags if task.note is None else [*tags, ("note", " ".join(task.note.split()))]),
        ("samples", "yes" if task.samples else "no"),
        ("held-out text", "yes" if task.eval_data else "no"),
        *_template(details),
        ("vectors", counted(len(task.vectors), "vector")),
        *([("nearest tasks", found)] if found else []),
        *_coded(details),
        ("ingested", task.created_at),
    ]


def _template(details: TaskDetails) -> list[tuple[str, str]]:
    if details.template is None:
        return []
    owner = "of the adapter" if details.has_own_template else "of the base model"
    return [("chat template", f"{owner}, {details.template[:12]}")]


def _coded(details: TaskDetails) -> list[tuple[str, str]]:
    code = details.task.code
    if details.task.not_encodable is not None:
        return []
    if code is None:
        return [("code", "-")]
    under = "" if details.generator is None else f" under generator {details.generator.version}"
    error = "" if code.relative_error is None else f", relative error {code.relative_error:.3f}"
    effect = "" if code.effect is None else f", keeps {code.effect:.3f} of the adapter's effect"
    lines = [("code", f"{human_size(code.size)}{under}{error}{effect}")]
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
    found, modules = len(details.initial.modules), len(details.task.final.layout)
    return f"seed {details.initial.seed}, recovered for {found} of {counted(modules, 'module')}"


def _original(task: Task) -> str:
    final = task.final
    state = "in the store" if final.evicted_at is None else f"evicted at {final.evicted_at}"
    if final.is_generated:
        state = "none: generated, not trained" if final.evicted_at else "generated, then ingested"
    elif final.was_never_here:
        state = f"none: imported at {final.created_at} from a bundle, which holds only codes"
    return f"{state}, pinned" if task.pinned else state


def _kept(task: Task) -> list[tuple[str, str]]:
    """Return the parts of an adapter that are stored exactly because no code can represent them."""
    final = task.final
    lines = [] if task.not_encodable is None else [("original only", task.not_encodable)]
    if final.extras:
        files = ", ".join(extra.file for extra in final.extras if extra.file is not None)
        lines.append(("extras", f"{human_size(final.extras_bytes)}, stored exactly{files and f': {files}'}"))
    return lines


def _print_adapters(session: Session, details: TaskDetails) -> None:
    final = details.task.final
    is_same = dict(zip(map(id, details.task.checkpoints), details.same_as_final, strict=True))
    fields: list[Field[StoredAdapter]] = [
        Field("step", lambda adapter: "-" if adapter.step is None else str(adapter.step), right=True),
        Field("final", lambda adapter: "yes" if adapter is final else ""),
        Field("rank", lambda adapter: str(adapter.rank_max), right=True),
        Field("dtype", lambda adapter: adapter.dtype.lower()),
        Field("size", lambda adapter: _size(adapter), right=True),
        Field("weights", lambda adapter: adapter.weights[:12]),
        Field("same as", lambda adapter: "final" if is_same.get(id(adapter)) else "", is_rare=True),
    ]
    session.out.listing(fields, details.task.adapters)


def _size(adapter: StoredAdapter) -> str:
    if adapter.was_never_here:
        return "none"
    return "evicted" if adapter.is_evicted else human_size(adapter.original_bytes)


def _present(task: Task) -> list[Measurement]:
    """Return the measurements that do not depend on an earlier generator, the task's own text first."""
    measured = [one for one in task.measured if _is_present(task, one)]
    return sorted(measured, key=lambda one: (one.data != task.eval_data, one.data, SOURCES.index(one.source)))


def _is_present(task: Task, one: Measurement) -> bool:
    return one.generator in (None, None if task.code is None else task.code.generator)


def _print_measurements(session: Session, details: TaskDetails) -> None:
    measured = _present(details.task)
    names = dict.fromkeys(name for one in measured for name in MetricResult.of(one).figures)
    fields: list[Field[Measurement]] = [
        Field("source", lambda one: f"{one.source}{measured_in([one.precision])}"),
        Field("text", lambda one: "held-out" if one.data == details.task.eval_data else one.data[:12]),
        *(Field(name, partial(_metric, name), right=True) for name in names),
        Field("retained gain", lambda one: gain_text(one.retained_gain, one.precision), right=True),
        Field("relative error", lambda one: figure(one.relative_error, 3), right=True),
    ]
    session.out.listing(fields, measured)
    for data in dict.fromkeys(one.data for one in measured):
        of_data = [one for one in measured if one.data == data]
        scores = {one.source: MetricResult.of(one) for one in of_data}
        gains = [one.retained_gain for one in of_data if one.source not in ("base", "original")]
        if sentence := no_gain(details.task.name, scores, gains):
            session.out.line(sentence)


def _metric(name: str, one: Measurement) -> str:
    value = MetricResult.of(one).figures.get(name)
    return "-" if value is None else f"{value:.4g}"


def _error(source: str, group: GroupError) -> str:
    return f"{group.errors[source]:.3f}"


def _as_json(details: TaskDetails) -> dict[str, object]:
    task, final, generator = details.task, details.task.final, details.generator
    return {
        "name": task.name,
        "version": task.version,
        "base_model": task.base_model,
        "created_at": task.created_at,
        "pinned": task.pinned,
        "tags": task.tags,
        "note": task.note,
        "samples": task.samples,
        "eval_data": task.eval_data,
        "original_only": task.not_encodable,
        "extras_bytes": final.extras_bytes,
        "adapters": [
            *map(_adapter_json, task.checkpoints, repeat(False), details.same_as_final),
            _adapter_json(final, True, False),
        ],
        "layout": [
            {"module": module, "rank": rank, "in": inputs, "out": outputs}
            for module, rank, inputs, outputs in final.layout
        ],
        "header": dict(details.header),
        "template": details.template,
        "has_own_template": details.has_own_template,
        "vectors": [as_fields(vector, "more") for vector in task.vectors],
        "nearest": [as_fields(neighbour) for neighbour in details.nearest],
        "generator": None if generator is None else {"version": generator.version, "digest": generator.blob},
        "initial_seed": None if details.initial is None else details.initial.seed,
        "code": None
        if task.code is None
        else {**as_fields(task.code, "more", "claim"), "size": task.code.size, "claimed": claim_json(task.code.claim)},
        "evaluations": [_measurement_json(task, one) for one in task.measured],
    }


def _adapter_json(adapter: StoredAdapter, is_final: bool, same_as_final: bool) -> dict[str, object]:
    return {
        **as_fields(adapter, "more", "layout", "template"),
        "is_final": is_final,
        "same_as_final": same_as_final,
        "original_bytes": adapter.original_bytes,
        "weights_bytes": adapter.weights.size,
        "initial_bytes": 0 if adapter.initial is None else adapter.initial.size,
        "extras": [{**as_fields(extra, "more"), "packed_size": extra.packed_size} for extra in adapter.extras],
    }


def _measurement_json(task: Task, one: Measurement) -> dict[str, object]:
    # All measurements are of the present original: a new one is another version.
    settings = {**one.settings, "original": task.final.weights}
    figures = {name.replace(" ", "_"): value for name, value in MetricResult.of(one).figures.items()}
    return {**as_fields(one, "more"), **figures, "settings": settings, "is_current": _is_present(task, one)}
