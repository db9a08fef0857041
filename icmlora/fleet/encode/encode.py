"""Make the codes of tasks again with the current generator, or add residuals to them. Nothing is trained.

task ──search──▶ code      ──one transaction──▶ replaces the present code and what was measured of it
  └────search──▶ residual  ──one transaction──▶ stored with the present code, which stays
       Encoder             _recorded
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING, Literal

from icmlora.adapter.model import Adapter
from icmlora.errors import BaseModelNotFound, BaseModelUnsuited, Cancelled, DataError, OutOfMemory
from icmlora.fleet.context import Context, Event, Shard, base_record, reporting, select_tasks
from icmlora.fleet.encode.search import CodeSearch, Refiner, ResidualSearch, Tell, Trial, refine_all, stoppable
from icmlora.fleet.failures import FAILURES, Failed, as_error
from icmlora.fleet.measure.measure import Measurement, TaskLosses, losses_on_own_text, record_measurements
from icmlora.fleet.resources.adapter_source import mean_vectors
from icmlora.fleet.resources.decoding import codec_of_task
from icmlora.fleet.resources.loading import Models, read_original
from icmlora.fleet.resources.texts import read_samples
from icmlora.fleet.resources.workers import check_place, naming, open_workers
from icmlora.formats.catalogue import format_named
from icmlora.generator.config import quality_of, tolerance_of
from icmlora.generator.encoding import Encoded, Limits
from icmlora.generator.initial_a.search import SeedSearch
from icmlora.io.devices import gradient_dtype
from icmlora.training.refinement import WITHOUT_REFINE, RefineConfig
from registry.errors import TaskNotFound
from registry.records import (
    AdapterRecord,
    Asked,
    CodeRecord,
    GeneratorRecord,
    NewCode,
    NewEvaluation,
    NewResidual,
    TaskRecord,
    WithRelativeError,
)

if TYPE_CHECKING:
    from registry.store import Store

_REFINED_TOGETHER = 4
"""Tasks whose codes a card refines side by side: a pass of one alone is too small to keep it busy."""

EncodeStatus = Literal["encoded", "enough", "below", "known", "evicted", "unmeasured", "changed", "original_only"]


@dataclass(frozen=True)
class EncodeRequest:
    """What to encode, and which limits to meet. `max_error` is the relative error.

    Without limits, `quality` sets the tolerance and codes are refined where that is possible. `refine` is the number of
    steps; None stands for as many as the quality is meant for, or for none under other limits. Under `size`, the bytes
    of a code, each code is as accurate as they allow, and the other limits are checked.
    """

    names: Sequence[str] = ()
    quality: int | None = None
    max_error: float | None = None
    min_gain: float | None = None
    tolerance: float | None = None
    refine: int | None = None
    residual: bool = False
    base_model: str | None = None
    device: str = "auto"
    again: bool = False
    workers: str | None = None
    shard: Shard | None = None
    size: int | None = None

    @property
    def is_by_quality(self) -> bool:
        """Whether a quality takes the place of limits."""
        return all(limit is None for limit in (self.max_error, self.min_gain, self.tolerance, self.size))

    def check(self) -> None:
        """Raise `DataError` for what does not go together."""
        if self.size is not None and self.refine:
            hint = "leave out the size, or the refinement"
            raise DataError("refinement changes how many bytes a code takes, so it cannot keep a size", hint=hint)
        if self.size is not None and self.residual:
            hint = "a residual brings a code to an error: give max_error or min_gain"
            raise DataError("a size limits codes, and residuals are not part of them", hint=hint)


@dataclass(frozen=True)
class _Plan:
    """Which limits the code of one task has to meet, and how many steps it is refined for."""

    min_gain: float | None
    max_error: float | None
    tolerance: float | None
    steps: int
    size: int | None = None

    @classmethod
    def of(cls, request: EncodeRequest, generator: GeneratorRecord, *, refined: bool) -> _Plan:
        """Return the plan for a plain or refined code; other limits than a quality have one plan only."""
        if not request.is_by_quality:
            return cls(request.min_gain, request.max_error, request.tolerance, request.refine or 0, request.size)
        quality = request.quality or quality_of(float(generator.config["tolerance"]))  # type: ignore[arg-type]
        if quality is None:
            fact = "the generator was trained with a tolerance of its own, so its codes have no quality"
            raise DataError(fact, hint="give --quality or another limit")
        steps = RefineConfig.steps if request.refine is None else request.refine
        return cls(None, None, tolerance_of(quality, refined=refined), steps if refined else 0)

    @property
    def limits(self) -> Limits:
        """The limits of the error."""
        return Limits(self.tolerance, None if self.max_error is None else self.max_error * self.max_error)

    def asked(self, *, is_kept: bool) -> Asked:
        """Return what the store records of the limits."""
        return Asked(self.min_gain, self.max_error, self.tolerance, is_kept, self.steps, self.size)


@dataclass(frozen=True)
class TaskEncoded(WithRelativeError, Event):
    """One task is done."""

    task: str
    # `encoded`: it has a new code, or a new residual, the smallest found that meets the limits. `known`: it had
    # one already. `enough`: its code meets them without a residual. `below`: nothing does, so it should keep its
    # original; it has its most accurate code, and no residual. `evicted`: its original is gone, so its code
    # stays. `unmeasured`: see `reason`; its code stays. `original_only`: there can be no code, see `reason`.
    # `changed`: it got another adapter or code meanwhile, which it keeps; see `reason`.
    status: EncodeStatus
    size: int | None = None  # bytes of its code
    residual_size: int | None = None  # bytes of its residual, if it has one
    before: int | None = None  # bytes of the code and residual that it had before, if any
    squared_error: float | None = None
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


def encode(context: Context, request: EncodeRequest) -> EncodeReport:
    """Encode tasks one after the other, or on several workers; each new code is recorded at once."""
    request.check()
    check_place(request.device, request.workers)
    report = EncodeReport(is_named=bool(request.names))
    with context.open() as store, reporting(report):
        tasks = select_tasks(store, request.names, request.base_model, request.shard)
        if tasks and not any(store.generators.current(label) for label in {task.base_model for task in tasks}):
            raise DataError(f"there is no generator for task {tasks[0].name!r}", hint="`icm train` makes one")
        context.progress(0, len(tasks))

        def tell(note: str) -> None:
            context.progress(len(report.tasks), len(tasks), note)

        make = partial(Encoder, request)
        for base_model, of_base in groupby(tasks, key=lambda task: task.base_model):
            with (
                store.job(base_model, shared=True),
                # Only now: while this waits for the job, no process of its own may hold the store.
                open_workers(context, store, make, device=request.device, workers=request.workers) as workers,
            ):
                for task, made in workers.each(list(of_base), tell):
                    report.tasks.append(_recorded(store, task.name, made))
                    context.on_event(report.tasks[-1])
                    tell(task.name)
    return report


def _recorded(store: Store, name: str, made: TaskEncoded | MadeCode | MadeResidual | Failed) -> TaskEncoded:
    """Record what was made of a task, and return what became of it."""
    if isinstance(made, TaskEncoded):
        return made
    if isinstance(made, Failed):
        return TaskEncoded(name, "unmeasured", reason=made.error.message)
    try:
        record_measurements(store, made.measured)
        return made.outcome if made.record(store) else _changed(name, "it got another adapter or code in the meantime")
    except TaskNotFound:  # `icm rm` does not wait for this job
        return _changed(name, "it was removed in the meantime")


@dataclass(frozen=True)
class _Made:
    """What was made of one task, before it is recorded."""

    data: bytes
    squared_error: float
    asked: Asked
    measured: Sequence[Measurement]  # on the way, of other sources
    evaluations: Sequence[NewEvaluation]  # of itself
    outcome: TaskEncoded  # once it is recorded


@dataclass(frozen=True)
class MadeCode(_Made):
    """A code that is to replace the present one."""

    adapter: AdapterRecord
    generator: int

    def record(self, store: Store) -> bool:
        """Record it, and return whether its task still has the adapter."""
        blob = store.blobs.put(self.data)
        code = NewCode(self.adapter, blob, 8.0 * len(self.data), self.squared_error, self.asked)
        return store.codes.replace(self.generator, code, self.evaluations) is not None


@dataclass(frozen=True)
class MadeResidual(_Made):
    """A residual of the present code; of no bytes if the code needs none, or none is good enough."""

    code: CodeRecord

    def record(self, store: Store) -> bool:
        """Record it, and return whether its task still has the code."""
        new = NewResidual(store.blobs.put(self.data), self.squared_error) if self.data else None
        return store.codes.replace_residual(self.code, new, self.asked, self.evaluations) is not None


@dataclass(frozen=True)
class _Turn:
    """What the store knows of a task when its turn comes, and where to report progress."""

    task: TaskRecord
    generator: GeneratorRecord
    final: AdapterRecord
    code: CodeRecord | None
    tell: Callable[[str], None]

    def unchanged(self, status: EncodeStatus, reason: str | None = None) -> TaskEncoded:
        """Return the outcome of a task whose code stays."""
        if self.code is None:
            return TaskEncoded(self.task.name, status, reason=reason)
        residual = None if self.code.residual is None else self.code.residual.size
        error = self.code.best_squared_error
        return TaskEncoded(self.task.name, status, self.code.size, residual, self.size_before, error, reason=reason)

    @property
    def size_before(self) -> int | None:
        """Bytes of the present code and residual."""
        if self.code is None:
            return None
        return self.code.size + (0 if self.code.residual is None else self.code.residual.size)


@dataclass(frozen=True)
class _Begun:
    """A task whose code is about to be made."""

    turn: _Turn
    plan: _Plan
    search: CodeSearch
    reason: str | None  # why its code is not refined although a quality asks for it

    @property
    def is_refined_once(self) -> bool:
        """Whether its code is made once and refined, so that other codes can be refined with it."""
        return self.search.refiner is not None and self.plan.min_gain is None and self.plan.size is None


class Encoder:
    """Encodes tasks; the latest generator and base model stay loaded, adapters do not.

    On a card, the codes of several tasks are refined side by side: they share the base model and each pass through it.
    """

    def __init__(self, request: EncodeRequest, models: Models) -> None:
        self._store, self._request, self._models = models.store, request, models
        self._gradients = gradient_dtype(models.device)
        self._at_once = 1 if models.device.type == "cpu" else _REFINED_TOGETHER
        self._seeds = SeedSearch()

    def __call__(self, planned: TaskRecord, tell: Tell) -> TaskEncoded | MadeCode | MadeResidual:
        """Make the code or the residual of a task, or say why there is nothing to record."""
        begun = self._begin(planned, tell)
        return self._made(begun, None) if isinstance(begun, _Begun) else begun

    def each(
        self, tasks: Sequence[TaskRecord], tell: Tell
    ) -> Iterator[tuple[TaskRecord, TaskEncoded | MadeCode | MadeResidual]]:
        """Do the same for tasks of one base model, several side by side."""
        for start in range(0, len(tasks), self._at_once):
            some = tasks[start : start + self._at_once]
            begun = [self._begin(task, naming(task, tell)) for task in some]
            refined = self._refined([one for one in begun if isinstance(one, _Begun) and one.is_refined_once], tell)
            for task, one in zip(some, begun, strict=True):
                yield task, self._made(one, refined.get(task.name)) if isinstance(one, _Begun) else one

    def _refined(self, begun: Sequence[_Begun], tell: Tell) -> dict[str, Encoded]:
        """Refine the codes of several tasks together; nothing is returned where that fails, so each is made alone."""
        if len(begun) < 2:
            return {}
        try:
            codes = [one.search.coarse(one.plan.limits) for one in begun]
            names = f"{len(begun)} tasks"
            refined = refine_all(codes, lambda note: tell(f"{names}: {note}"))
        except Cancelled:
            raise
        except FAILURES as error:
            as_error(error)  # frees the memory, if that is what ran out: one alone may fit
            return {}
        return {one.turn.task.name: encoded for one, encoded in zip(begun, refined, strict=True)}

    def _begin(self, planned: TaskRecord, tell: Tell) -> TaskEncoded | MadeResidual | _Begun:
        """Read what it takes to make the code of a task; return the outcome where that needs none."""
        name, base_model = planned.name, planned.base_model
        generator = self._store.generators.current(base_model)
        try:
            task, final = self._store.tasks.get(name), self._store.tasks.final(name)
            if generator is None:
                reason = final.original_only or "there is no generator for it; `icm train` makes one"
                return TaskEncoded(name, "original_only" if final.original_only else "unmeasured", reason=reason)
            turn = _Turn(task, generator, final, self._store.codes.get(name, generator.id), tell)
            if task.base_model != base_model:
                return _changed(name, f"it belongs to base model {task.base_model!r} now")
            return self._planned(turn)
        except TaskNotFound:  # `icm rm` does not wait for this job
            return _changed(name, "it was removed in the meantime")

    def _planned(self, turn: _Turn) -> TaskEncoded | MadeResidual | _Begun:
        if turn.final.is_evicted:
            reason = "its original was evicted, so its code stays (`icm ingest --restore PATH` brings it back)"
            return turn.unchanged("evicted", reason if self._request.names else None)
        if turn.final.original_only is not None:
            return turn.unchanged("original_only", turn.final.original_only)
        request = self._request
        wanted = _Plan.of(request, turn.generator, refined=request.refine != 0 and not request.residual)
        if (known := self._known(turn, wanted)) is not None:
            return known
        try:
            if request.residual:
                return self._residual(turn, read_original(self._store, turn.final), wanted)
            return self._search(turn, wanted)
        except Cancelled:
            raise
        except FAILURES as error:
            return self._unmeasured(turn, error)

    def _unmeasured(self, turn: _Turn, error: Exception) -> TaskEncoded:
        failure = as_error(error, self._models.loaded(turn.task.base_model))
        told = failure.message if failure.hint is None else f"{failure.message} ({failure.hint})"
        return turn.unchanged("unmeasured", told if isinstance(failure, OutOfMemory) else failure.message)

    def _known(self, turn: _Turn, plan: _Plan) -> TaskEncoded | None:
        """Return the outcome if the code was made with the same limits already, so that a stopped run can continue."""
        code = turn.code
        if self._request.again or code is None or code.asked is None:
            return None
        # With --residual this measures a code again that needs no residual; that takes no search.
        if (code.residual is not None) != self._request.residual or code.asked != plan.asked(
            is_kept=code.asked.is_kept
        ):
            return None
        base = base_record(self._store, turn.task.base_model)
        wanted = (code.generator_id, code.rung, turn.task.eval_data, None if base is None else base.load_in)
        rows = [
            row
            for row in self._store.evaluations.all(turn.task.name)
            if (row.generator_id, row.rung, row.data, row.load_in) == wanted
        ]
        if plan.min_gain is not None and not rows:
            return None  # its held-out text has changed, or how its base model is loaded
        outcome = turn.unchanged("known" if code.asked.is_kept else "below")
        if not rows:
            return outcome
        return replace(outcome, retained_gain=rows[0].retained_gain, precision=rows[0].precision)

    def _search(self, turn: _Turn, wanted: _Plan) -> TaskEncoded | _Begun:
        """Prepare to search for the code of a task."""
        original = read_original(self._store, turn.final)
        plan, refiner, reason = self._refined_or_plain(turn, original, wanted)
        if reason is not None and (known := self._known(turn, plan)) is not None:
            return replace(known, reason=reason)
        generator_file = self._models.generator_file(turn.generator)
        codec = codec_of_task(self._store, generator_file, turn.code, original.layout)
        vectors = mean_vectors(self._store, self._store.vectors.all(turn.task.name))
        initial, losses = self._seeds.find(original), self._losses(turn)
        return _Begun(turn, plan, CodeSearch(codec, original, vectors, initial, losses, refiner, turn.tell), reason)

    def _made(self, begun: _Begun, refined: Encoded | None) -> TaskEncoded | MadeCode:
        try:
            return self._code(begun, refined)
        except Cancelled:
            raise
        except FAILURES as error:
            return self._unmeasured(begun.turn, error)

    def _code(self, begun: _Begun, refined: Encoded | None) -> MadeCode:
        """Make the smallest code that meets the limits, or the most accurate one of a size."""
        turn, plan, search, reason = begun.turn, begun.plan, begun.search, begun.reason
        if refined is not None:
            best, is_kept = Trial(replace(refined, decoded=None)), True
        elif plan.size is None:
            best, is_kept = search.smallest(plan.limits, plan.min_gain)
        else:
            best, is_kept = search.most_accurate(plan.size, plan.limits, plan.min_gain)
        data, error = best.encoded.data, best.encoded.squared_error
        if plan.size is not None and len(data) > plan.size:
            reason = f"its smallest code takes {len(data):,} bytes"
        status: EncodeStatus = "encoded" if is_kept else "below"
        return MadeCode(
            data,
            error,
            plan.asked(is_kept=is_kept),
            [] if search.losses is None else search.losses.made,
            _records(search.losses, best),
            TaskEncoded(
                turn.task.name,
                status,
                len(data),
                None,
                turn.size_before,
                error,
                best.gain,
                reason,
                _precision(search.losses),
            ),
            turn.final,
            turn.generator.id,
        )

    def _refined_or_plain(
        self, turn: _Turn, original: Adapter, wanted: _Plan
    ) -> tuple[_Plan, Refiner | None, str | None]:
        """Return the plan for what is possible, what refines, and why nothing does although a quality asks for it."""
        if not wanted.steps:
            return wanted, None, None
        try:
            return wanted, self._refiner(turn, original, wanted.steps), None
        except (BaseModelNotFound, BaseModelUnsuited, DataError) as error:
            if not self._request.is_by_quality:
                raise
            return _Plan.of(self._request, turn.generator, refined=False), None, f"not refined: {error.message}"

    def _residual(self, turn: _Turn, original: Adapter, plan: _Plan) -> TaskEncoded | MadeResidual:
        """Make the smallest residual that lets the current code meet the limits, if it needs one."""
        present, task = turn.code, turn.task
        if present is None:
            raise DataError("it has no code that a residual could be added to; `icm train --update` makes one")
        losses, code = self._losses(turn), self._store.blobs.read(present.blob)
        result = None if losses is None else losses.measure(("code",)).get("code")
        if losses is not None and result is None:
            return _changed(task.name, "it got another adapter in the meantime")
        codec = self._models.generator_file(turn.generator).codec_of(code)
        search = ResidualSearch(codec, original, code, result, losses, turn.tell)
        found = search.smallest(plan.limits, plan.min_gain)
        data = b"" if found.residual is None else found.residual.encoded.data
        status: EncodeStatus = "below" if not found.is_kept else "encoded" if data else "enough"
        error, gain = found.best.encoded.squared_error, found.best.gain
        return MadeResidual(
            data,
            error,
            plan.asked(is_kept=found.is_kept),
            [] if losses is None else losses.made,
            _records(losses, found.residual),
            TaskEncoded(
                task.name,
                status,
                present.size,
                len(data) or None,
                turn.size_before,
                error,
                gain,
                precision=_precision(losses),
            ),
            present,
        )

    def _losses(self, turn: _Turn) -> TaskLosses | None:
        if self._request.min_gain is None:
            return None
        return losses_on_own_text(self._store, self._models, turn.task, turn.generator)

    def _refiner(self, turn: _Turn, original: Adapter, steps: int) -> Refiner:
        task, final = turn.task, turn.final
        if format_named(final.format).is_for_images:
            raise DataError("icm does not run the models that image adapters are for", hint=WITHOUT_REFINE)
        if any(extra.file is None for extra in final.extras):
            raise DataError("its adapter is more than a LoRA, so its code cannot be refined", hint=WITHOUT_REFINE)
        base = self._models.base(task.base_model, self._gradients)
        samples = read_samples(self._store, task, base)
        with stoppable(base, lambda: turn.tell("preparing to refine")):
            return Refiner.of(base, original, () if samples is None else samples.items, RefineConfig(steps=steps))


def _changed(name: str, reason: str) -> TaskEncoded:
    return TaskEncoded(name, "changed", reason=reason)


def _precision(losses: TaskLosses | None) -> str | None:
    return None if losses is None else losses.precision


def _records(losses: TaskLosses | None, trial: Trial | None) -> Sequence[NewEvaluation]:
    """Return what the store records of a trial."""
    return () if losses is None or trial is None or trial.result is None else (losses.record_of(trial.result),)
