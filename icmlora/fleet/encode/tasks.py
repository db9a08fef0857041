"""Encode tasks again, one base model after the other. Nothing is trained.

task ──search──▶ code ──compare and swap──▶ replaces the present code and its measurements
    encode_tasks        _record
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import TYPE_CHECKING

from icmlora.adapter.model import Adapter
from icmlora.errors import (
    BaseModelNotFound,
    BaseModelUnsuited,
    Cancelled,
    DataError,
    GeneratorError,
    OutOfMemory,
)
from icmlora.fleet.context import Context, Shard, reporting, select_tasks
from icmlora.fleet.encode.encode import EncodeReport, EncodeStatus, TaskEncoded
from icmlora.fleet.encode.refiner import Finished, Refiner, refine_all, stoppable
from icmlora.fleet.encode.search import CodeSearch
from icmlora.fleet.failures import FAILURES, Failed, as_error
from icmlora.fleet.resources.adapter_source import mean_vectors
from icmlora.fleet.resources.decoding import codec_of_task
from icmlora.fleet.resources.loading import ModelCache, read_original
from icmlora.fleet.resources.task_code import is_same_code, replaced_bytes, with_code
from icmlora.fleet.resources.texts import read_samples
from icmlora.fleet.resources.workers import Tell, naming, worker_pool
from icmlora.formats.catalogue import format_named
from icmlora.generator.codec.limits import Limits
from icmlora.generator.config import keep_of, quality_of, tolerance_of
from icmlora.io.devices import gradient_dtype
from icmlora.training.config import REFINE_STEPS
from icmlora.training.refinement import FOR_SHARE, WITHOUT_REFINE
from registry.errors import TaskNotFound
from registry.filters import Selection
from registry.manifests import Code, CodeLimits, File, Generator, Task

if TYPE_CHECKING:
    from registry.store import Store

_REFINED_TOGETHER = 4
"""Codes that a GPU refines side by side: a pass of one alone is too small to keep it busy."""


def encode_in(
    context: Context,
    store: Store,
    tasks: Sequence[str],
    limits: Limits,
    base_model: str | None,
    device: str,
    workers: str | None,
    *,
    again: bool = False,
    shard: Shard | None = None,
) -> EncodeReport:
    """Do the work of `encode` in an open store."""
    report = EncodeReport(is_named=bool(tasks))
    with reporting(report):
        chosen = select_tasks(store, tasks, base_model, shard)
        if chosen and not any(store.generator(label) for label in {task.base_model for task in chosen}):
            raise DataError(f"there is no generator for task {chosen[0].name!r}", hint="run `icm train` to train one")
        tell = context.counting(report.done, len(chosen))
        for label, of_base in groupby(chosen, key=lambda task: task.base_model):
            with (
                store.job(label, shared=True),
                # Only now: while this waits for the job, none of its own processes may hold the store.
                worker_pool(context, store, device=device, workers=workers) as pool,
            ):
                results = pool.each(encode_tasks, list(of_base), tell, limits, again=again, is_named=bool(tasks))
                replaced = list[tuple[Code | None, Code]]()
                try:
                    for task, result in results:
                        report.done.append(_record(store, task.name, result, replaced))
                        context.on_event(report.done[-1])
                        tell(task.name)
                finally:
                    report.replaced_bytes += _replaced_bytes(store, label, replaced)
    return report


def _replaced_bytes(store: Store, base_model: str, codes: Sequence[tuple[Code | None, Code]]) -> int:
    """Return the bytes that are not needed after codes were replaced by others."""
    before, after = [old for old, _ in codes], [new for _, new in codes]
    used = set[str]()
    if {old.generator for old in before if old is not None} - {new.generator for new in after}:
        used = {str(row.generator) for row in store.rows(Selection(base_model=base_model))}
    return replaced_bytes(before, after, used)


@dataclass(frozen=True)
class PendingCode:
    """A new code of a task, before it is recorded."""

    outcome: TaskEncoded
    seen: Task  # as it was encoded
    generator: File
    data: bytes
    asked: CodeLimits

    def record(self, store: Store, replaced: list[tuple[Code | None, Code]]) -> TaskEncoded:
        """Record it, and note which code it replaces, unless another process changed the task."""
        code = Code(
            blob=File(store.blobs.put(self.data), len(self.data)),
            generator=self.generator,
            squared_error=self.outcome.squared_error,
            effect=self.outcome.effect,
            asked=self.asked,
        )
        reason: str | None = None

        def change(task: Task) -> Task:
            nonlocal reason
            reason = self._obstacle(task)
            return task if reason is not None else with_code(task, code)

        name = self.outcome.task
        try:
            store.update(name, change)
        except TaskNotFound:  # `icm rm` does not wait for this job
            return _changed(name, "it was removed during encoding")
        if reason is not None:
            return _changed(name, reason)
        replaced.append((self.seen.code, code))
        return self.outcome

    def _obstacle(self, task: Task) -> str | None:
        """Return why the code must not be recorded."""
        if not task.final.is_same(self.seen.final):
            return "its adapter changed during encoding"
        if task.final.is_evicted:
            return "its original was evicted during encoding"
        return None if is_same_code(task.code, self.seen.code) else "its code was replaced during encoding"


def _record(
    store: Store, name: str, result: TaskEncoded | PendingCode | Failed, replaced: list[tuple[Code | None, Code]]
) -> TaskEncoded:
    if isinstance(result, PendingCode):
        return result.record(store, replaced)
    return result if isinstance(result, TaskEncoded) else TaskEncoded(name, "unmeasured", reason=result.error.message)


def _changed(name: str, reason: str) -> TaskEncoded:
    return TaskEncoded(name, "changed", reason=reason)


@dataclass(frozen=True)
class _Turn:
    """A task as it is when its turn comes, with the generator to encode it and a function that reports progress."""

    models: ModelCache
    task: Task
    generator: Generator
    tell: Tell

    def unchanged(self, status: EncodeStatus, reason: str | None = None) -> TaskEncoded:
        """Return the outcome of a task that keeps its code."""
        code = self.task.code
        if code is None:
            return TaskEncoded(self.task.name, status, reason=reason)
        return TaskEncoded(self.task.name, status, code.size, code.size, code.squared_error, reason=reason)

    def unmeasured(self, error: Exception) -> TaskEncoded:
        """Return the outcome of a task that failed."""
        failure = as_error(error, self.models.loaded(self.task.base_model))
        told = failure.message if failure.hint is None else f"{failure.message} ({failure.hint})"
        return self.unchanged("unmeasured", told if isinstance(failure, OutOfMemory) else failure.message)


@dataclass(frozen=True)
class _Prepared:
    """A task that is ready to be encoded."""

    turn: _Turn
    search: CodeSearch
    is_by_quality: bool  # then its limits may be missed
    reason: str | None  # why its code is not refined although a quality asks for it


def encode_tasks(
    models: ModelCache,
    tasks: Sequence[Task],
    tell: Tell,
    asked: Limits,
    *,
    again: bool,
    is_named: bool,
) -> Iterator[tuple[Task, TaskEncoded | PendingCode]]:
    """Make the code of each task of one base model, or say why it has no new one.

    On a GPU, the codes of several tasks are refined side by side: they share the base model and each pass through it.
    """
    at_once = 1 if models.device.type == "cpu" else _REFINED_TOGETHER
    for start in range(0, len(tasks), at_once):
        some = tasks[start : start + at_once]
        prepared = [_prepare(models, task, naming(task, tell), asked, again=again, is_named=is_named) for task in some]
        refined = _refined_together([one for one in prepared if isinstance(one, _Prepared)], tell)
        for task, one in zip(some, prepared, strict=True):
            yield task, _code(one, refined.get(task.name)) if isinstance(one, _Prepared) else one


def _prepare(
    models: ModelCache, planned: Task, tell: Tell, asked: Limits, *, again: bool, is_named: bool
) -> TaskEncoded | _Prepared:
    """Prepare to encode a task; return the outcome if it needs no new code."""
    base_model, store = planned.base_model, models.store
    generator, task = store.generator(base_model), store.find(planned.name)
    if task is None:  # `icm rm` does not wait for this job
        return _changed(planned.name, "it was removed during encoding")
    if generator is None:
        reason = task.not_encodable or "there is no generator for it; run `icm train` to train one"
        return TaskEncoded(task.name, "original_only" if task.not_encodable else "unmeasured", reason=reason)
    if task.base_model != base_model:
        return _changed(task.name, f"it now belongs to base model {task.base_model!r}")
    turn = _Turn(models, task, generator, tell)
    if task.final.is_evicted:
        reason = f"its original is not in the store, so its code cannot be replaced; {restore_hint(task)}"
        return turn.unchanged("evicted", reason if is_named else None)
    if task.not_encodable is not None:
        return turn.unchanged("original_only", task.not_encodable)
    models.generator_file(generator.blob)  # before minutes are spent: it may be damaged
    limits = _limits_under(generator, asked, refined=asked.refine != 0)
    if not again and (known := _known(turn, asked, limits)) is not None:
        return known
    try:
        return _searched(turn, asked, limits, again=again)
    except Cancelled:
        raise
    except FAILURES as error:
        return turn.unmeasured(error)


def restore_hint(task: Task) -> str:
    """Return how to restore the original of an evicted task."""
    if not task.final.is_generated:
        return "run `icm ingest --restore PATH` with the folder of its original"
    return (
        "run `icm ingest --restore PATH` with the folder that `icm generate` wrote, "
        f"or `icm rm {task.name}` and generate it again afterwards"
    )


def _limits_under(generator: Generator, asked: Limits, *, refined: bool) -> Limits:
    """Return the limits of one code, refined or plain: a quality means a tolerance, or a share to keep and steps."""
    steps = REFINE_STEPS if asked.refine is None else asked.refine
    if asked.keep is not None:
        return replace(asked, refine=steps)
    if not asked.is_by_quality:
        return replace(asked, refine=0)
    quality = asked.quality or quality_of(float(generator.config["tolerance"]))  # type: ignore[arg-type]
    if not refined:
        return Limits(tolerance=tolerance_of(quality), refine=0)
    return Limits(keep=keep_of(quality), refine=steps)


def _asked(limits: Limits, *, is_kept: bool) -> CodeLimits:
    """Return the limits of a code as they are recorded."""
    return CodeLimits(
        max_error=limits.max_error,
        tolerance=limits.tolerance,
        is_kept=is_kept,
        refined=limits.refine or 0,
        max_size=limits.size,
        keep=limits.keep,
    )


def _known(turn: _Turn, asked: Limits, limits: Limits) -> TaskEncoded | None:
    """Return the outcome if the task has a code of the same limits, so that an interrupted run continues."""
    code = turn.task.code_under(turn.generator)
    if code is None or code.asked is None or code.asked != _asked(limits, is_kept=code.asked.is_kept):
        return None
    return turn.unchanged("known" if code.asked.is_kept or asked.is_by_quality else "below")


def _searched(turn: _Turn, asked: Limits, limits: Limits, *, again: bool) -> TaskEncoded | _Prepared:
    """Prepare to search for the code of a task."""
    models, task = turn.models, turn.task
    original, refiner, reason = read_original(models.store, task.final), None, None
    if limits.keep is not None:
        try:
            refiner = _refiner(turn, original, limits)
        except (BaseModelNotFound, BaseModelUnsuited, DataError) as error:
            if not asked.is_by_quality:
                raise
            limits, reason = _limits_under(turn.generator, asked, refined=False), f"not refined: {error.message}"
            if not again and (known := _known(turn, asked, limits)) is not None:
                return replace(known, reason=reason)
    generator_file = models.generator_file(turn.generator.blob)
    codec = codec_of_task(models.store, generator_file, task.code, original.layout)
    vectors = mean_vectors(models.store, task.vectors)
    search = CodeSearch(codec, original, vectors, models.seeds.find(original), limits, refiner, turn.tell)
    return _Prepared(turn, search, asked.is_by_quality, reason)


def _refiner(turn: _Turn, original: Adapter, limits: Limits) -> Refiner:
    """Prepare to refine the code of a task; raise an error where that is not possible."""
    models, task = turn.models, turn.task
    if format_named(task.final.format).is_for_images:
        raise DataError("icm cannot run the base models of image adapters", hint=WITHOUT_REFINE)
    if any(extra.file is None for extra in task.final.extras):
        raise DataError("its adapter has more than LoRA factors, so its code cannot be refined", hint=WITHOUT_REFINE)
    base = models.base(task.base_model, gradient_dtype(models.device))
    samples = read_samples(models.store, task, base)
    with stoppable(base, lambda: turn.tell("preparing to refine")):
        items = () if samples is None else samples.items
        return Refiner.of(base, original, items, replace(FOR_SHARE, steps=limits.refine or 0))


def _refined_together(prepared: Sequence[_Prepared], tell: Tell) -> dict[str, Finished]:
    """Refine the codes of several tasks together; nothing is returned where that fails, so each is made alone."""
    prepared = [one for one in prepared if one.search.is_refined]
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
    return {one.turn.task.name: code for one, code in zip(prepared, made, strict=True)}


def _code(prepared: _Prepared, refined: Finished | None) -> TaskEncoded | PendingCode:
    """Make the smallest code of a task that meets the limits, or the most accurate one of a size."""
    turn, search, reason, size = prepared.turn, prepared.search, prepared.reason, prepared.search.limits.size
    try:
        best = refined or search.best()
    except Cancelled:
        raise
    except GeneratorError as error:  # not even the finest step meets the limits
        return turn.unchanged("below", error.message)
    except FAILURES as error:
        return turn.unmeasured(error)
    taken = len(best.encoded.data)
    if size is not None and taken > size:
        reason = f"its smallest code takes {taken:,} bytes"
    outcome = TaskEncoded(
        turn.task.name,
        "below" if best.misses_limit and not prepared.is_by_quality else "encoded",
        taken,
        before=None if turn.task.code is None else turn.task.code.size,
        squared_error=best.encoded.squared_error,
        effect=best.effect,
        reason=reason,
    )
    asked = _asked(search.limits, is_kept=not best.misses_limit)
    return PendingCode(outcome, turn.task, turn.generator.blob, best.encoded.data, asked)
