"""Make the codes of tasks again with the current generator. Nothing is trained.

task ──search──▶ code ──one transaction──▶ replaces the present code and what was measured of it
    encode_tasks        _recorded
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import TYPE_CHECKING, Literal

from icmlora.adapter.model import Adapter
from icmlora.errors import (
    BaseModelNotFound,
    BaseModelUnsuited,
    Cancelled,
    DataError,
    GeneratorError,
    OptionsConflict,
    OutOfMemory,
)
from icmlora.fleet.context import Context, Event, Shard, base_record, reporting, select_tasks, use_case
from icmlora.fleet.encode.refiner import Finished, Refiner, refine_all, stoppable
from icmlora.fleet.encode.search import CodeSearch
from icmlora.fleet.failures import FAILURES, Failed, as_error
from icmlora.fleet.measure.measure import Measurement, TaskLosses, losses_on_own_text, record_measurements
from icmlora.fleet.resources.adapter_source import mean_vectors
from icmlora.fleet.resources.decoding import codec_of_task
from icmlora.fleet.resources.loading import Models, read_original
from icmlora.fleet.resources.texts import read_samples
from icmlora.fleet.resources.workers import Tell, check_place, naming, worker_pool
from icmlora.formats.catalogue import format_named
from icmlora.generator.config import keep_of, quality_of, tolerance_of
from icmlora.generator.limits import Limits
from icmlora.io.devices import gradient_dtype
from icmlora.training.config import REFINE_STEPS
from icmlora.training.refinement import FOR_SHARE, WITHOUT_REFINE, RefineConfig
from registry.errors import TaskNotFound
from registry.records import (
    AdapterRecord,
    CodeLimits,
    CodeRecord,
    GeneratorRecord,
    NewCode,
    NewEvaluation,
    TaskRecord,
    WithRelativeError,
)
from registry.tables.codes import restore_hint

if TYPE_CHECKING:
    from registry.store import Store

_REFINED_TOGETHER = 4
"""Tasks whose codes a card refines side by side: a pass of one alone is too small to keep it busy."""

EncodeStatus = Literal["encoded", "below", "known", "evicted", "unmeasured", "changed", "original_only"]


@dataclass(frozen=True)
class TaskEncoded(WithRelativeError, Event):
    """One task is done."""

    task: str
    # `encoded`: it has a new code, the smallest found that meets the limits. `known`: it had one already. `below`:
    # no code meets them, so it should keep its original; it has its most accurate code, or with a `reason` the one
    # that it had. `evicted`: its original is gone, so its code stays. `unmeasured`: see `reason`; its code stays.
    # `original_only`: there can be no code, see `reason`. `changed`: it got another adapter meanwhile, which it keeps;
    # see `reason`.
    status: EncodeStatus
    size: int | None = None  # bytes of its code
    before: int | None = None  # bytes of the code that it had before, if any
    squared_error: float | None = None
    effect: float | None = None  # share of its adapter's effect that its code keeps
    retained_gain: float | None = None
    reason: str | None = None
    precision: str | None = None  # of the base model that the gain was measured on


@dataclass
class EncodeReport:
    """What was done, one entry per task."""

    tasks: list[TaskEncoded] = field(default_factory=list)
    is_named: bool = False  # whether the tasks were named, instead of all being meant

    @property
    def original_only(self) -> list[TaskEncoded]:
        """The tasks of which there can be no code."""
        return [task for task in self.tasks if task.status == "original_only"]

    @property
    def short(self) -> list[TaskEncoded]:
        """The tasks without a code that is known to meet the limits; of all tasks, only those that can have one."""
        missed = ("below", "unmeasured", "changed", *(["original_only", "evicted"] if self.is_named else []))
        return [task for task in self.tasks if task.status in missed]


@use_case
def encode(
    context: Context,
    tasks: Sequence[str] = (),
    *,
    quality: int | None = None,
    keep: float | None = None,
    min_gain: float | None = None,
    max_error: float | None = None,
    tolerance: float | None = None,
    size: int | None = None,
    refine: int | None = None,
    base_model: str | None = None,
    device: str = "auto",
    again: bool = False,
    workers: str | None = None,
    shard: str | None = None,
) -> EncodeReport:
    """Re-encode tasks with the current generator, as small as the limits allow; nothing is trained.

    A task whose code was made with the same limits is skipped, so the same call continues after an interruption.
    A code meets all of `min_gain`, `max_error`, `tolerance` and `size` that are given, or keeps what `keep` says.
    Without any, the quality counts.

    Args:
        context: The store, and who listens.
        tasks: Names of tasks; all by default.
        quality: 1 (smallest codes) to 8 (most accurate); by default that of the generator. Where the base model is at
            hand it stands for a share to keep, else for a tolerance.
        keep: Share of the adapter's effect that a code keeps, as seen on samples that refinement does not read. Needs
            the base model.
        min_gain: Smallest retained gain on the task's held-out text. Needs the base model.
        max_error: Largest relative error, ||dW' - dW|| / ||dW||: 0.3 for 30 %.
        tolerance: Largest squared error, weighted by how sensitive each channel is: what `quality` sets.
        size: Bytes that the file of each code may have. The codes are as accurate as that allows.
        refine: Steps that fit a code to what its adapter does, on the task's samples or on texts that the adapted
            model writes itself. Needs the base model. By default 160 with a quality or a share to keep, and none with
            other limits.
        base_model: Only tasks of this base model.
        device: Where to measure and refine.
        again: Encode tasks even if their code already meets these limits.
        workers: Where to compute, as described for `Fleet`.
        shard: Which part of the tasks to work on, as described for `Fleet`.

    Returns:
        One entry per task; `report.short` lists those without a code that meets the limits.

    Raises:
        OptionsConflict: Limits that do not go together.
        DataError: There is no generator, or the base model has no tasks.
    """
    limits = Limits(quality, min_gain, max_error, tolerance, size, refine, keep)
    check_limits(limits)
    check_place(device, workers)
    report = EncodeReport(is_named=bool(tasks))
    with context.open() as store, reporting(report):
        chosen = select_tasks(store, tasks, base_model, Shard.of(shard))
        if chosen and not any(store.generators.current(label) for label in {task.base_model for task in chosen}):
            raise DataError(f"there is no generator for task {chosen[0].name!r}", hint="run `icm train` to train one")
        tell = context.counting(report.tasks, len(chosen))
        for label, of_base in groupby(chosen, key=lambda task: task.base_model):
            with (
                store.job(label, shared=True),
                # Only now: while this waits for the job, no process of its own may hold the store.
                worker_pool(context, store, device=device, workers=workers) as pool,
            ):
                results = pool.each(encode_tasks, list(of_base), tell, limits, again=again, is_named=bool(tasks))
                for task, made in results:
                    report.tasks.append(_recorded(store, task.name, made))
                    context.on_event(report.tasks[-1])
                    tell(task.name)
    return report


def check_limits(limits: Limits) -> None:
    """Raise `OptionsConflict` for limits that do not go together."""
    names = ("keep", "max_error", "min_gain", "tolerance", "size")
    given = [f"--{name.replace('_', '-')}" for name in names if getattr(limits, name) is not None]
    if limits.quality is not None and given:
        raise OptionsConflict(f"--quality cannot be combined with {' and '.join(given)}")
    if limits.keep is not None and len(given) > 1:
        raise OptionsConflict(f"--keep cannot be combined with {' and '.join(given[1:])}")
    if limits.size is not None and limits.refine:
        fact = "--refine changes the size of a code, so it cannot be used with --size"
        raise OptionsConflict(fact, hint="leave out one of the two")
    if limits.refine and limits.max_error is not None:
        hint = "use --min-gain, which measures refined codes"
        raise OptionsConflict(
            "--refine moves codes away from the weights, so it cannot be used with --max-error", hint=hint
        )


@dataclass(frozen=True)
class Made:
    """A code that was made of one task, before it is recorded."""

    outcome: TaskEncoded  # what becomes of the task once it is recorded
    data: bytes
    squared_error: float
    asked: CodeLimits
    measured: Sequence[Measurement]  # on the way, of other sources
    evaluations: Sequence[NewEvaluation]  # of itself
    of: AdapterRecord  # what it is a code of
    generator: int

    def record(self, store: Store) -> bool:
        """Record it, and return whether its task still has that adapter."""
        blob = store.blobs.put(self.data)
        code = NewCode(self.of, blob, 8.0 * len(self.data), self.squared_error, self.asked, self.outcome.effect)
        return store.codes.replace(self.generator, code, self.evaluations) is not None


def _recorded(store: Store, name: str, made: TaskEncoded | Made | Failed) -> TaskEncoded:
    """Record what was made of a task, and return what became of it."""
    if isinstance(made, TaskEncoded):
        return made
    if isinstance(made, Failed):
        return TaskEncoded(name, "unmeasured", reason=made.error.message)
    try:
        record_measurements(store, made.measured)
        return made.outcome if made.record(store) else _changed(name, "its adapter changed during encoding")
    except TaskNotFound:  # `icm rm` does not wait for this job
        return _changed(name, "it was removed during encoding")


def _changed(name: str, reason: str) -> TaskEncoded:
    return TaskEncoded(name, "changed", reason=reason)


@dataclass(frozen=True)
class _TaskState:
    """What the store knows of a task when its turn comes, what it is encoded with, and where to report progress."""

    models: Models
    task: TaskRecord
    generator: GeneratorRecord
    final: AdapterRecord
    code: CodeRecord | None
    tell: Tell

    @property
    def store(self) -> Store:
        """The store."""
        return self.models.store

    def losses(self, limits: Limits) -> TaskLosses | None:
        """Return what measures gains, if one is asked for."""
        if limits.min_gain is None:
            return None
        return losses_on_own_text(self.store, self.models, self.task, self.generator)

    def unchanged(self, status: EncodeStatus, reason: str | None = None) -> TaskEncoded:
        """Return the outcome of a task whose code stays."""
        if self.code is None:
            return TaskEncoded(self.task.name, status, reason=reason)
        size, error = self.code.size, self.code.squared_error
        return TaskEncoded(self.task.name, status, size, size, error, reason=reason)

    def unmeasured(self, error: Exception) -> TaskEncoded:
        """Return the outcome of a task on which something failed."""
        failure = as_error(error, self.models.loaded(self.task.base_model))
        told = failure.message if failure.hint is None else f"{failure.message} ({failure.hint})"
        return self.unchanged("unmeasured", told if isinstance(failure, OutOfMemory) else failure.message)


@dataclass(frozen=True)
class _Prepared:
    """A task whose code is about to be made."""

    state: _TaskState
    search: CodeSearch
    is_by_quality: bool  # which is what its code is made for, but no limit that it may miss
    reason: str | None  # why its code is not refined although a quality asks for it


def encode_tasks(
    models: Models,
    tasks: Sequence[TaskRecord],
    tell: Tell,
    asked: Limits,
    *,
    again: bool,
    is_named: bool,
) -> Iterator[tuple[TaskRecord, TaskEncoded | Made]]:
    """Make the code of each task of one base model, or say why there is nothing to record.

    On a card, the codes of several tasks are refined side by side: they share the base model and each pass through it.
    """
    at_once = 1 if models.device.type == "cpu" else _REFINED_TOGETHER
    for start in range(0, len(tasks), at_once):
        some = tasks[start : start + at_once]
        prepared = [_prepare(models, task, naming(task, tell), asked, again=again, is_named=is_named) for task in some]
        refined = _refined_together([one for one in prepared if isinstance(one, _Prepared)], tell)
        for task, one in zip(some, prepared, strict=True):
            yield task, _code(one, refined.get(task.name)) if isinstance(one, _Prepared) else one


def _prepare(
    models: Models, planned: TaskRecord, tell: Tell, asked: Limits, *, again: bool, is_named: bool
) -> TaskEncoded | _Prepared:
    """Read what it takes to make the code of a task; return the outcome where that needs none."""
    name, base_model, store = planned.name, planned.base_model, models.store
    generator = store.generators.current(base_model)
    try:
        task, final = store.tasks.get(name), store.tasks.final(name)
        if generator is None:
            reason = final.original_only or "there is no generator for it; run `icm train` to train one"
            return TaskEncoded(name, "original_only" if final.original_only else "unmeasured", reason=reason)
        if task.base_model != base_model:
            return _changed(name, f"it now belongs to base model {task.base_model!r}")
        state = _TaskState(models, task, generator, final, store.codes.get(name, generator.id), tell)
        if final.is_evicted:
            way = restore_hint({name: final.is_generated})
            reason = f"its original is not in the store, so its code cannot be replaced; {way}"
            return state.unchanged("evicted", reason if is_named else None)
        if final.original_only is not None:
            return state.unchanged("original_only", final.original_only)
        models.generator_file(generator)  # before minutes are spent: it may be damaged
        limits = _limits_under(generator, asked, refined=asked.refine != 0)
        if not again and (known := _known(state, asked, limits)) is not None:
            return known
        try:
            return _searched(state, asked, limits, again=again)
        except Cancelled:
            raise
        except FAILURES as error:
            return state.unmeasured(error)
    except TaskNotFound:  # `icm rm` does not wait for this job
        return _changed(name, "it was removed during encoding")


def _limits_under(generator: GeneratorRecord, asked: Limits, *, refined: bool) -> Limits:
    """Return the limits of one code, refined or plain: a quality stands for a tolerance, and for steps."""
    if asked.keep is not None:
        return replace(asked, refine=REFINE_STEPS if asked.refine is None else asked.refine)
    if not asked.is_by_quality:
        return replace(asked, refine=asked.refine or 0)
    quality = asked.quality or quality_of(float(generator.config["tolerance"]))  # type: ignore[arg-type]
    if quality is None:
        fact = "the generator was trained with its own tolerance, so its codes have no quality level"
        raise DataError(fact, hint="specify --quality or another limit")
    if not refined:
        return Limits(tolerance=tolerance_of(quality), refine=0)
    return Limits(keep=keep_of(quality), refine=REFINE_STEPS if asked.refine is None else asked.refine)


def _asked(limits: Limits, *, is_kept: bool) -> CodeLimits:
    """Return what the store records of the limits of a code."""
    steps = limits.refine or 0
    return CodeLimits(limits.min_gain, limits.max_error, limits.tolerance, is_kept, steps, limits.size, limits.keep)


def _known(state: _TaskState, asked: Limits, limits: Limits) -> TaskEncoded | None:
    """Return the outcome if the code was made with the same limits already, so that a stopped run can continue."""
    code = state.code
    if code is None or code.asked is None or code.asked != _asked(limits, is_kept=code.asked.is_kept):
        return None
    base = base_record(state.store, state.task.base_model)
    wanted = (code.generator_id, "code", state.task.eval_data, None if base is None else base.load_in)
    rows = [
        row
        for row in state.store.evaluations.all(state.task.name)
        if (row.generator_id, row.rung, row.data, row.load_in) == wanted
    ]
    if limits.min_gain is not None and not rows:
        return None  # its held-out text has changed, or how its base model is loaded
    outcome = state.unchanged("known" if code.asked.is_kept or asked.is_by_quality else "below")
    if not rows:
        return outcome
    return replace(outcome, retained_gain=rows[0].retained_gain, precision=rows[0].precision)


def _searched(state: _TaskState, asked: Limits, limits: Limits, *, again: bool) -> TaskEncoded | _Prepared:
    """Prepare to search for the code of a task."""
    original, refiner, reason = read_original(state.store, state.final), None, None
    if limits.refine or limits.keep is not None:
        try:
            refiner = _refiner(state, original, limits)
        except (BaseModelNotFound, BaseModelUnsuited, DataError) as error:
            if not asked.is_by_quality:
                raise
            limits, reason = _limits_under(state.generator, asked, refined=False), f"not refined: {error.message}"
            if not again and (known := _known(state, asked, limits)) is not None:
                return replace(known, reason=reason)
    generator_file = state.models.generator_file(state.generator)
    codec = codec_of_task(state.store, generator_file, state.code, original.layout)
    vectors = mean_vectors(state.store, state.store.vectors.all(state.task.name))
    initial, losses = state.models.seeds.find(original), state.losses(limits)
    search = CodeSearch(codec, original, vectors, initial, limits, losses, refiner, state.tell)
    return _Prepared(state, search, asked.is_by_quality, reason)


def _refiner(state: _TaskState, original: Adapter, limits: Limits) -> Refiner:
    """Prepare to refine the code of a task; raise an error where that is not possible."""
    if format_named(state.final.format).is_for_images:
        raise DataError("icm cannot run the base models of image adapters", hint=WITHOUT_REFINE)
    if any(extra.file is None for extra in state.final.extras):
        raise DataError("its adapter has more than LoRA factors, so its code cannot be refined", hint=WITHOUT_REFINE)
    base = state.models.base(state.task.base_model, gradient_dtype(state.models.device))
    samples = read_samples(state.store, state.task, base)
    with stoppable(base, lambda: state.tell("preparing to refine")):
        config = replace(RefineConfig() if limits.keep is None else FOR_SHARE, steps=limits.refine or 0)
        return Refiner.of(base, original, () if samples is None else samples.items, config)


def _refined_together(prepared: Sequence[_Prepared], tell: Tell) -> dict[str, Finished]:
    """Refine the codes of several tasks together; nothing is returned where that fails, so each is made alone."""
    prepared = [one for one in prepared if one.search.is_refined_once]
    if len(prepared) < 2:
        return {}
    try:
        codes = [one.search.coarse() for one in prepared]
        made = refine_all(codes, lambda note: tell(f"{len(prepared)} tasks: {note}"))
    except Cancelled:
        raise
    except FAILURES as error:
        as_error(error)  # frees the memory, if that is what ran out: one alone may fit
        return {}
    return {one.state.task.name: code for one, code in zip(prepared, made, strict=True)}


def _code(prepared: _Prepared, refined: Finished | None) -> TaskEncoded | Made:
    """Make the smallest code of a task that meets the limits, or the most accurate one of a size."""
    state, search, reason, size = prepared.state, prepared.search, prepared.reason, prepared.search.limits.size
    try:
        best, is_kept = search.best() if refined is None else search.done(refined)
    except Cancelled:
        raise
    except GeneratorError as error:  # not even the finest step meets the limits
        return state.unchanged("below", error.message)
    except FAILURES as error:
        return state.unmeasured(error)
    taken = len(best.encoded.data)
    if size is not None and taken > size:
        reason = f"its smallest code takes {taken:,} bytes"
    status: EncodeStatus = "encoded" if is_kept or prepared.is_by_quality else "below"
    losses, result = search.losses, best.result
    outcome = TaskEncoded(
        state.task.name,
        status,
        taken,
        before=None if state.code is None else state.code.size,
        squared_error=best.encoded.squared_error,
        effect=best.effect,
        retained_gain=best.gain,
        reason=reason,
        precision=None if losses is None else losses.precision,
    )
    return Made(
        outcome,
        best.encoded.data,
        best.encoded.squared_error,
        _asked(search.limits, is_kept=is_kept),
        [] if losses is None else losses.made,
        [] if losses is None or result is None else [losses.record_of(result)],
        state.final,
        state.generator.id,
    )
