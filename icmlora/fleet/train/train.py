"""Train the generator of each base model on all its tasks, and publish it with a code per task.

    adapters ──run (resumable)──▶ network ──▶ generator file ──encode──▶ a code per task
                                                    └── one transaction: generator and codes ──▶ current

Until that transaction the earlier generator stays current, if there is one.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import torch

from icmlora.errors import Cancelled, DataError, GeneratorError
from icmlora.fleet.context import Context, Event, reporting, use_case
from icmlora.fleet.failures import FAILURES, as_error, one_of_several
from icmlora.fleet.resources.adapter_source import StoreAdapterSource
from icmlora.fleet.resources.workers import check_place
from icmlora.fleet.train.finish import FinishReport, check_finish, finish
from icmlora.fleet.train.run import (
    SAVED_AFTER,
    TrainingRun,
    base_models_with_tasks,
    help_train,
    open_run,
    options_of,
    run_metrics,
    share_run,
    train_network,
    usable_source,
    wanted_config,
)
from icmlora.generator.codec import Codec
from icmlora.generator.encoding import Encoded
from icmlora.generator.limits import Limits
from icmlora.generator.network_file import generator_from_bytes, generator_to_bytes
from icmlora.generator.versions import GeneratorFile
from icmlora.training.ranks import Ranks, joined
from registry.names import some
from registry.records import AdapterRecord, CodeLimits, GeneratorRecord, NewCode, NewGenerator, WithRelativeError
from registry.tables.codes import restore_hint

if TYPE_CHECKING:
    from icmlora.generator.config import GeneratorConfig
    from icmlora.generator.cvae import CVAE
    from icmlora.training.config import TrainConfig
    from registry.store import Store

REPLACED = "its adapter was replaced during training"
"""Why a task has no code although its adapter was encoded: an ingest replaced the adapter during the training."""


@dataclass(frozen=True)
class Resumed(Event):
    """A run that was stopped goes on from its checkpoint."""

    base_model: str
    step: int


@dataclass(frozen=True)
class Continued(Event):
    """Training starts from the current generator, which has no code of `new_tasks` tasks."""

    base_model: str
    version: int
    new_tasks: int


@dataclass(frozen=True)
class CodeMade(WithRelativeError, Event):
    """One task is encoded; its code becomes current together with all others."""

    task: str
    size: int
    squared_error: float


@dataclass(frozen=True)
class Trained(Event):
    """A generator and its codes are current."""

    base_model: str
    version: int
    generator: str
    generator_size: int
    tasks: int
    codes_size: int
    metrics: dict[str, object]
    # Whether the earlier generator had a few-shot start. That is a code of the earlier generator, so the new one
    # has none.
    start_dropped: bool
    left_out: Mapping[str, str]


@dataclass
class TrainReport(FinishReport):
    """What a training did, and what was done with the codes."""

    trained: list[Trained] = field(default_factory=list)
    stopped_at: int | None = None
    """The step of the checkpoint of the run that was stopped, if any: 0 before its first step."""

    @property
    def is_partial(self) -> bool:
        """Whether something was left out, at any stage."""
        return super().is_partial or any(one.left_out for one in self.trained)


@use_case
def train(
    context: Context,
    *,
    device: str = "auto",
    base_model: str | None = None,
    quality: int | None = None,
    tolerance: float | None = None,
    width: int | None = None,
    steps: int | None = None,
    learning_rate: float | None = None,
    seed: int = 0,
    resume: bool = True,
    fresh: bool = False,
    refine: int | None = None,
    keep: float | None = None,
    min_gain: float | None = None,
    max_error: float | None = None,
    evaluate: bool = True,
    workers: str | None = None,
) -> TrainReport:
    """Train one generator per base model on all its tasks, store a code for every task, and measure the codes.

    Training starts from the current generator if there is one. All originals are needed; after evicting some, use
    `update` to add tasks. The same call resumes a training that was stopped, and ends with the same generator.

    Then codes are encoded again to keep limits, if there are any, or else refined where the base model is at hand. At
    last they are measured where that is possible. The store is complete before and after each of these.

    Several processes of PyTorch's launcher train together. The first one writes to the store, does what comes after the
    training, and returns the report; that of the others is empty.

    Args:
        context: The store, and who listens.
        device: Where to compute.
        base_model: Train only the generator of this base model.
        quality: 1 (smallest codes) to 8 (most accurate); by default that of the current generator, at first 4.
        tolerance: The same as a number: the largest squared error, weighted by how sensitive each channel is. Codes of
            a tolerance are not refined.
        width: Hidden width of a new generator's decoder; by default it depends on the number of tasks.
        steps: Adapters to draw; by default it depends on the number of tasks and adapters, and on the device.
        learning_rate: Peak learning rate.
        seed: Seed for all random numbers: the same seed on the same machine gives the same bytes.
        resume: Resume a training that was stopped.
        fresh: Start from scratch instead of from the current generator.
        refine: Steps that fit each code to what its adapter does; 0 for none, by default as in `encode`.
        keep: Encode again to keep this share of each adapter's effect, as `encode` does.
        min_gain: Encode again to keep this retained gain, as `encode` does.
        max_error: Encode again to keep this relative error, as `encode` does.
        evaluate: Measure the codes, as `evaluate` does.
        workers: Where to encode and measure, as described for `Fleet`.

    Returns:
        One entry per base model; its `left_out` names tasks that have no code, and why.

    Raises:
        DataError: There is nothing to train on, or a task is evicted.
        GeneratorError: The training diverged, or no task could be encoded.
        OptionsConflict: Limits that do not go together.
    """
    limits = Limits(quality, min_gain, max_error, tolerance, refine=refine, keep=keep)
    check_finish(limits)
    if workers is not None:  # a typing error is told now, not after hours
        check_place(device, workers)
    report = TrainReport()
    config_of = partial(wanted_config, quality=quality, tolerance=tolerance, width=width)
    schedule_of = partial(options_of, steps=steps, learning_rate=learning_rate, seed=seed)
    with reporting(report):
        with joined() as ranks:
            place = ranks.device(device)
            if not ranks.is_first:
                help_train(context, ranks, place)
                return report
            with context.open() as store:
                labels = base_models_with_tasks(store, base_model)
                for label in labels:
                    with one_of_several(context, report, label, labels if ranks.count == 1 else [label]):
                        with store.job(label):
                            kept = None if fresh else store.generators.current(label)
                            trained = _train_base(
                                context, store, label, place, ranks, report, kept, config_of, schedule_of, resume=resume
                            )
                        report.trained.append(trained)
                        context.on_event(trained)
                ranks.share()  # nothing: the others may leave
        labels = [trained.base_model for trained in report.trained]
        finish(context, report, labels, (), limits, only=base_model, measure=evaluate, device=device, workers=workers)
    return report


def _train_base(
    context: Context,
    store: Store,
    label: str,
    device: torch.device,
    ranks: Ranks,
    report: TrainReport,
    previous: GeneratorRecord | None,
    config_of: Callable[[StoreAdapterSource, CVAE | None, float | None], GeneratorConfig],
    schedule_of: Callable[[StoreAdapterSource, torch.device], TrainConfig],
    *,
    resume: bool,
) -> Trained:
    """Train the generator of one base model, and make it and its codes current."""
    _refuse_evicted(store, label)
    source = usable_source(context, store, label)
    _refuse_lost(store, label, source.left_out)
    _refuse_none(source.names, source.left_out)
    started = time.monotonic()
    # The first version was trained on a whole fleet; later ones are for the tasks that they were added for.
    network = before = parent = None
    if previous is not None:
        before, parent = float(str(previous.config["tolerance"])), previous.blob
        network = GeneratorFile(store.blobs.read(parent)).codec(0).generator.net
    config, options = config_of(source, network, before), schedule_of(source, device)
    run = open_run(context, store, source, device, network, config, options, parent=parent, resume=resume)
    first = run.state.step
    try:
        if first:
            context.on_event(Resumed(label, first))
        elif previous is not None:
            new = [row for row in store.tasks.summaries() if row.task.base_model == label and row.code is None]
            context.on_event(Continued(label, previous.version, len(new)))
        share_run(run, source, ranks)
        fitted = train_network(context, source, run.state, run.save, ranks)
        metrics: dict[str, object] = {
            "bits_per_parameter": None if fitted is None else fitted.after,
            "bits_per_parameter_before": None if fitted is None else fitted.before,
            "measured_adapters": 0 if fitted is None else fitted.adapters,
            "steps": run.state.step,
            "resumed_from": first,
            "processes": ranks.count,
            "fit_seconds": round(time.monotonic() - started, 3),
            **run_metrics(device),
        }
        return _publish(context, store, source, run, previous, metrics)
    except Cancelled:
        report.stopped_at = run.state.step
        raise


def _refuse_evicted(store: Store, label: str) -> None:
    """Raise if a task is evicted: only the current generator decodes its code, and it cannot be encoded again."""
    rows = [row for row in store.tasks.summaries() if row.task.base_model == label]
    evicted = [row.task.name for row in rows if row.final.is_evicted]
    if evicted:
        fact = f"a new generator would leave evicted tasks without a code: {some([repr(name) for name in evicted])}"
        made = {row.task.name: row.final.is_generated for row in rows if row.task.name in evicted}
        hint = f"run `icm train --update` to add only new tasks, or {restore_hint(made)}"
        raise DataError(fact, hint=hint)


def _refuse_lost(store: Store, label: str, left_out: Mapping[str, str]) -> None:
    """Raise if a task cannot be encoded again that has a code: its original may be damaged, and the code is not."""
    rows = [row for row in store.tasks.summaries() if row.task.base_model == label and row.code is not None]
    lost = [row.task.name for row in rows if row.task.name in left_out]
    if lost:
        fact = f"a new generator would leave {some([repr(name) for name in lost])} without a code: {left_out[lost[0]]}"
        made = {row.task.name: row.final.is_generated for row in rows if row.task.name in left_out}
        raise DataError(fact, hint=f"run `icm train --update` to add only new tasks, or {restore_hint(made)}")


def _refuse_none(encodable: Sequence[object], left_out: Mapping[str, str]) -> None:
    """Raise if there are tasks, and none of them can be encoded."""
    if left_out and not encodable:
        name, reason = next(iter(left_out.items()))
        hint = "run `icm rm TASK` to remove a task; its original folder is not changed"
        raise GeneratorError(f"no task could be encoded; {name!r}: {reason}", hint=hint)


def _publish(
    context: Context,
    store: Store,
    source: StoreAdapterSource,
    run: TrainingRun,
    previous: GeneratorRecord | None,
    metrics: Mapping[str, object],
) -> Trained:
    """Write the generator, encode every task with the file as it is read back, and make both current."""
    started = time.monotonic()
    label, data = source.base_model, generator_to_bytes(run.state.net)
    blob = store.blobs.put(data)
    codec = Codec(generator_from_bytes(data))
    codes, left_out, known_seeds = _encode_all(context, source, run, codec)
    _refuse_none(codes, left_out)
    seconds = round(time.monotonic() - started, 3)
    metrics = {**metrics, "encode_seconds": seconds, "initial_a_known": known_seeds}
    config = json.loads(run.state.net.config.to_json()) | {"train": asdict(run.state.config)}
    before, parent = store.generators.current(label), None if previous is None else previous.id
    record = store.generators.add(NewGenerator(label, blob, config, metrics, parent, codes, run.id))
    recorded = {code.task: code.size for code in store.codes.all(record.id)}
    left_out |= {code.adapter.task: REPLACED for code in codes if code.adapter.task not in recorded}
    return Trained(
        base_model=label,
        version=record.version,
        generator=blob,
        generator_size=len(data),
        tasks=len(recorded),
        codes_size=sum(recorded.values()),
        metrics=metrics,
        start_dropped=before is not None and before.start is not None,
        left_out=left_out,
    )


def _encode_all(
    context: Context, source: StoreAdapterSource, run: TrainingRun, codec: Codec
) -> tuple[list[NewCode], dict[str, str], int]:
    """Encode every task and store the codes; those that this run made before it was stopped are taken as they are."""
    generator, left_out = codec.generator.digest, dict(source.left_out)
    made = run.codes(generator)
    waiting, last = list[tuple[AdapterRecord, Encoded, bool]](), time.monotonic()
    try:
        for task, name in enumerate(source.names):
            final = source.final(task)
            if final.id not in made:
                initial = source.initial(task)
                try:
                    code = codec.encode(source.load(task, None), source.mean_vectors(task), initial)
                except FAILURES as error:  # such as an adapter of numbers too small to be divided
                    left_out[name] = as_error(error).message
                    continue
                waiting.append((final, code, initial is not None))
                context.on_event(CodeMade(name, len(code.data), code.squared_error))
            context.progress(task + 1, source.tasks(), f"encoding {name}")
            if time.monotonic() > last + SAVED_AFTER:
                made |= run.save_codes(generator, waiting)
                waiting, last = [], time.monotonic()
    finally:
        made |= run.save_codes(generator, waiting)
    pairs = [(final, made[final.id]) for final in map(source.final, range(source.tasks())) if final.id in made]
    asked = CodeLimits(tolerance=codec.config.tolerance)
    codes = [NewCode(final, code.blob, 8.0 * code.size, code.squared_error, asked) for final, code in pairs]
    return codes, left_out, sum(code.initial_is_known for _, code in pairs)
