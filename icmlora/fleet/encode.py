"""Give every task the smallest code that keeps what is asked for, under the present generator; nothing is trained.

task ──search (code_search)──▶ code ──one transaction──▶ in the place of the present one, with what was measured of it
  `────search (residual_search)──▶ residual ──one transaction──▶ beside the present code, which stays
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from icmlora.adapter.model import Adapter
from icmlora.errors import DataError, IcmLoraError
from icmlora.fleet.adapter_source import mean_vectors
from icmlora.fleet.context import Context, Event, Progress, StopFlag, as_it_is_now, chosen_tasks, read_samples
from icmlora.fleet.decoding import codec_of_task
from icmlora.fleet.loading import Models, read_original
from icmlora.fleet.measure import TaskEvaluation, on_own_text
from icmlora.fleet.search import (
    CodeSearch,
    EncodeReport,
    EncodeRequest,
    EncodeStatus,
    Refiner,
    ResidualSearch,
    TaskEncoded,
    evaluations_of,
)
from icmlora.generator.initial_a.search import SeedSearch
from icmlora.io.devices import gradient_dtype, resolve_device
from icmlora.training.refinement import RefineConfig
from registry.errors import CodeChanged, MissingBlob
from registry.records import AdapterRecord, CodeRecord, GeneratorRecord, NewCode, NewResidual, TaskRecord

if TYPE_CHECKING:
    from registry.store import Store


def encode(context: Context, request: EncodeRequest, stop: StopFlag) -> Generator[Event, None, EncodeReport]:
    """Encode tasks anew; each new code is recorded at once, in the place of the present one.

    Raises:
        TaskNotFound: A name is not in the store.
        DataError: There is no generator, or no task belongs to the base model.
        DeviceUnavailable: The device is not there.
    """
    report = EncodeReport()
    with context.open() as store:
        tasks = chosen_tasks(store, request.names, request.base_model)
        work = _Work(store, request, context.cache)
        yield Progress(0, len(tasks))
        for task in tasks:
            if stop.requested:
                report.stopped = True
                break
            done = yield from _within(work.one(task, stop), len(report.tasks), len(tasks), task.name)
            if done is None:
                report.stopped = True
                break
            report.tasks.append(done)
            yield done
            yield Progress(len(report.tasks), len(tasks), task.name)
    return report


def _within(
    work: Generator[Event, None, TaskEncoded | None], done: int, total: int, name: str
) -> Generator[Event, None, TaskEncoded | None]:
    """Show the steps of one task inside the progress over all tasks."""
    while True:
        try:
            event = next(work)
        except StopIteration as end:
            result: TaskEncoded | None = end.value
            return result
        yield (
            Progress(done, total, f"{name}: step {event.done} of {event.total}")
            if isinstance(event, Progress)
            else event
        )


class _Work:
    """Encodes one task after the other; the latest generator and base model are kept, adapters are not."""

    def __init__(self, store: Store, request: EncodeRequest, cache: Path) -> None:
        self._store, self._request = store, request
        self._device = resolve_device(request.device)
        self._models = Models(store, self._device, cache)
        self._seeds = SeedSearch()

    def one(self, task: TaskRecord, stop: StopFlag) -> Generator[Event, None, TaskEncoded | None]:
        """Encode one task and record its code; None where the user stopped in the middle."""
        generator = self._store.generators.current(task.base_model)
        if generator is None:
            raise DataError(f"there is no generator for task {task.name!r}", hint="`icm train` makes it")
        present, final = self._store.codes.get(task.name, generator.id), self._store.tasks.final(task.name)
        if final.is_evicted:
            return _as_it_is(task, "evicted", present)
        if not self._request.again and (known := self._known(task, present)) is not None:
            return known
        try:
            original = read_original(self._store, final)
            if self._request.residual:
                return (yield from self._beside(task, generator, original, present, stop))
            return (yield from self._anew(task, generator, final, original, present, stop))
        except IcmLoraError as error:
            return _as_it_is(task, "unmeasured", present, str(error))

    def _known(self, task: TaskRecord, present: CodeRecord | None) -> TaskEncoded | None:
        """Return what there is to say of a code that was made for the very same; None where it has to be made.

        A run that was stopped goes on by this.
        """
        beside = present is not None and present.residual is not None
        if present is None or present.asked is None or beside != self._request.residual:
            return None  # a code that needs no residual is looked at anew: that takes no search
        if present.asked != self._request.asked(is_kept=present.asked.is_kept):
            return None
        of_code = (row for row in self._store.evaluations.all(task.name) if row.generator_id == present.generator_id)
        gains = [row.retained_gain for row in of_code if (row.rung, row.data) == (present.rung, task.eval_data)]
        if self._request.min_gain is not None and not gains:
            return None  # its held-out text is another one now
        as_it_is = _as_it_is(task, "known" if present.asked.is_kept else "below", present)
        return replace(as_it_is, retained_gain=gains[0] if gains else None)

    def _anew(
        self,
        task: TaskRecord,
        generator: GeneratorRecord,
        encoded: AdapterRecord,
        original: Adapter,
        present: CodeRecord | None,
        stop: StopFlag,
    ) -> Generator[Event, None, TaskEncoded | None]:
        """Give a task another code."""
        search = self._search(task, generator, original, present)
        found = yield from search.run(self._request, stop)
        if found is None:
            return None
        best, keeps = found
        data, asked = best.encoded.data, self._request.asked(is_kept=keeps)
        error = best.encoded.dw_error
        code = NewCode(encoded, self._store.blobs.put(data), 8.0 * len(data), error, asked, data=data)
        self._store.codes.replace(generator.id, code, search.evaluations(best))
        status: EncodeStatus = "encoded" if keeps else "below"
        return TaskEncoded(task.name, status, len(data), None, _size_of(present), error, best.gain)

    def _beside(
        self,
        task: TaskRecord,
        generator: GeneratorRecord,
        original: Adapter,
        present: CodeRecord | None,
        stop: StopFlag,
    ) -> Generator[Event, None, TaskEncoded | None]:
        """Leave a task's code as it is, and put beside it what it lacks."""
        if present is None:
            raise DataError("it has no code that a residual could be put beside", hint="`icm train` makes it")
        evaluation = None if self._request.min_gain is None else self._evaluation(task, generator)
        code = self._bytes_of(present)
        search = ResidualSearch(self._models.generator_file(generator).codec_of(code), original, code, evaluation)
        found = yield from search.run(self._request, stop)
        if found is None:
            return None
        new, measured = None, evaluations_of(evaluation, found.residual)
        if found.residual is not None:
            made = found.residual.encoded
            new = NewResidual(self._store.blobs.put(made.data), made.dw_error, data=made.data)
        self._store.codes.replace_residual(present, new, self._request.asked(is_kept=found.keeps), measured)
        status: EncodeStatus = "below" if not found.keeps else "enough" if found.residual is None else "encoded"
        size, best = None if found.residual is None else len(found.residual.encoded.data), found.best
        return TaskEncoded(task.name, status, present.size, size, _size_of(present), best.encoded.dw_error, best.gain)

    def _bytes_of(self, present: CodeRecord) -> bytes:
        """Read a code, whose row may have been read minutes ago.

        Raises:
            CodeChanged: The task has another one by now.
        """
        try:
            return self._store.blobs.read(present.blob)
        except MissingBlob as missing:
            as_it_is_now(lambda: self._store.codes.get(present.task, present.generator_id), present, missing)
            fact = f"task {present.task!r} got another code meanwhile"
            raise CodeChanged(fact, hint="run the same command again") from missing

    def _search(
        self, task: TaskRecord, generator: GeneratorRecord, original: Adapter, present: CodeRecord | None
    ) -> CodeSearch:
        codec = codec_of_task(self._store, self._models.generator_file(generator), present, original.layout)
        vectors = mean_vectors(self._store, self._store.vectors.all(task.name))
        evaluation = None if self._request.min_gain is None else self._evaluation(task, generator)
        refiner = None if not self._request.refine else self._refiner(task)
        initial = self._seeds.find(original)
        return CodeSearch(codec, original, vectors, initial, evaluation, refiner)

    def _evaluation(self, task: TaskRecord, generator: GeneratorRecord) -> TaskEvaluation:
        if task.eval_data is None:
            raise DataError("it has no held-out text, so its retained gain cannot be measured")
        return on_own_text(self._store, self._models.base(task.base_model), task, generator)

    def _refiner(self, task: TaskRecord) -> Refiner:
        if task.samples is None:
            raise DataError("it has no samples, so its code cannot be refined")
        base = self._models.base(task.base_model, gradient_dtype(self._device))
        return Refiner(base, read_samples(self._store, task, base) or (), RefineConfig(steps=self._request.refine))


def _size_of(code: CodeRecord | None) -> int | None:
    """Return the bytes of a code with what lies beside it."""
    if code is None:
        return None
    return code.size + (0 if code.residual is None else code.residual.size)


def _as_it_is(
    task: TaskRecord, status: EncodeStatus, present: CodeRecord | None, reason: str | None = None
) -> TaskEncoded:
    if present is None:
        return TaskEncoded(task.name, status, reason=reason)
    beside = None if present.residual is None else present.residual.size
    error = present.best_error
    return TaskEncoded(task.name, status, present.size, beside, _size_of(present), error, reason=reason)
