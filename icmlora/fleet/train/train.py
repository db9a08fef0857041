"""Train the generator of each base model on all its tasks, and publish it with a code per task.

    adapters ──run (resumable)──▶ network ──▶ generator file ──encode──▶ a code per task
                                                    └── one transaction: generator and codes ──▶ current

Until that transaction the earlier generator stays current, if there is one. Tasks that cannot be encoded, such as
evicted ones, keep their codes, and with them the generators that decode these.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import torch

from icmlora.errors import Cancelled, DataError, GeneratorError
from icmlora.fleet.context import Context, Event, reporting, use_case
from icmlora.fleet.failures import FAILURES, as_error, one_of_several
from icmlora.fleet.resources.adapter_source import StoreAdapterSource
from icmlora.fleet.resources.workers import check_place
from icmlora.fleet.train.finish import FinishReport, finish
from icmlora.fleet.train.publish import publish, put_files
from icmlora.fleet.train.run import (
    TrainingRun,
    base_models_with_tasks,
    help_train,
    open_run,
    options_of,
    run_metrics,
    share_state,
    train_network,
    usable_source,
    wanted_config,
)
from icmlora.generator.codec.codec import Codec
from icmlora.generator.codec.encoding import Encoded, encode_adapter
from icmlora.generator.codec.generator_file import GeneratorFile
from icmlora.generator.codec.limits import Limits
from icmlora.generator.files.network_file import generator_to_bytes
from icmlora.training.ranks import Ranks, joined
from registry.manifests import CodeLimits, Generator, WithRelativeError

if TYPE_CHECKING:
    from icmlora.generator.config import GeneratorConfig
    from icmlora.generator.network.cvae import CVAE
    from icmlora.training.config import TrainConfig
    from icmlora.training.state import TrainState
    from registry.store import Store


@dataclass(frozen=True)
class Resumed(Event):
    """An interrupted run continues from its checkpoint."""

    base_model: str
    step: int


@dataclass(frozen=True)
class Continued(Event):
    """Training starts from the current generator; `new_tasks` tasks have no code."""

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
    # Whether the earlier generator had a few-shot start: a code of the earlier generator, so the new one has none.
    start_dropped: bool
    left_out: Mapping[str, str]
    earlier_codes: int = 0  # tasks that keep the code of an earlier generator
    replaced_bytes: int = 0  # of codes and networks that no code needs any more


@dataclass
class TrainReport(FinishReport):
    """The results of a training, and of encoding and measuring after it."""

    trained: list[Trained] = field(default_factory=list)
    stopped_at: int | None = None
    """Step of the checkpoint of the interrupted run, if any: 0 before its first step."""

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
    width: int | None = None,
    steps: int | None = None,
    learning_rate: float | None = None,
    seed: int = 0,
    resume: bool = True,
    fresh: bool = False,
    refine: int | None = None,
    keep: float | None = None,
    max_error: float | None = None,
    evaluate: bool = True,
    workers: str | None = None,
) -> TrainReport:
    """Train one generator per base model on all its tasks, store a code for every task, and measure the codes.

    Training starts from the current generator if there is one, and needs the originals. Evicted tasks keep their codes
    and the generator that decodes them; use `update` to add tasks without that. The same call resumes an interrupted
    training, and ends with the same generator.

    Then tasks are encoded again to keep limits, if there are any, or else their codes are refined if the base model is
    on this machine. Finally they are measured where that is possible. The store is complete before and after each step.

    Several processes of PyTorch's launcher train together. The first one writes to the store, encodes and measures, and
    returns the report; the report of the others is empty.

    Args:
        context: The store, and who listens.
        device: Where to compute.
        base_model: Train only the generator of this base model.
        quality: 1 (smallest codes) to 8 (most accurate); by default the current generator's, at first 4.
        width: Hidden width of a new generator's decoder; by default it depends on the number of tasks.
        steps: Adapters to draw; by default it depends on the number of tasks and adapters, and on the device.
        learning_rate: Peak learning rate.
        seed: Seed for all random numbers: the same seed on the same machine gives the same bytes.
        resume: Resume an interrupted training.
        fresh: Start from scratch instead of from the current generator.
        refine: Steps that fit each code to what its adapter does; 0 for none, by default as in `encode`.
        keep: Encode again to keep this share of each adapter's effect, as `encode` does.
        max_error: Encode again to keep this relative error, as `encode` does.
        evaluate: Measure the codes, as `evaluate` does.
        workers: Where to encode and measure, as described for `Fleet`.

    Returns:
        One entry per base model; its `left_out` names tasks that were not encoded, and why.

    Raises:
        DataError: There is nothing to train on.
        GeneratorError: The training diverged, or no task could be encoded.
        OptionsConflict: Limits that do not go together.
    """
    limits = Limits(quality=quality, keep=keep, max_error=max_error, refine=refine)
    if workers is not None:  # a typing error is reported now, not after hours
        check_place(device, workers)
    report = TrainReport()
    config_of = partial(wanted_config, quality=quality, width=width)
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
                            previous = None if fresh else store.generator(label)
                            trained = _train_base(
                                context,
                                store,
                                label,
                                place,
                                ranks,
                                report,
                                previous,
                                config_of,
                                schedule_of,
                                resume=resume,
                            )
                        report.trained.append(trained)
                        context.on_event(trained)
                ranks.share()  # nothing: the others may leave
        with context.open() as store:
            finish(
                context,
                store,
                report,
                [trained.base_model for trained in report.trained],
                (),
                limits,
                only=base_model,
                measure=evaluate,
                device=device,
                workers=workers,
            )
    return report


def _train_base(
    context: Context,
    store: Store,
    label: str,
    device: torch.device,
    ranks: Ranks,
    report: TrainReport,
    previous: Generator | None,
    config_of: Callable[[StoreAdapterSource, CVAE | None, float | None], GeneratorConfig],
    schedule_of: Callable[[StoreAdapterSource, torch.device], TrainConfig],
    *,
    resume: bool,
) -> Trained:
    """Train the generator of one base model, and publish it with its codes."""
    source = usable_source(context, store, label)
    _refuse_none(label, source.names, source.left_out)
    started = time.monotonic()
    # The first version was trained on a whole fleet; later ones are for the tasks that they were added for.
    network = before = parent = None
    if previous is not None:
        before, parent = float(str(previous.config["tolerance"])), str(previous.blob)
        network = GeneratorFile(store.blobs.read(parent)).codec(0).net
    config, options = config_of(source, network, before), schedule_of(source, device)
    run, state = open_run(context, store, source, device, network, config, options, parent=parent, resume=resume)
    first = state.step
    try:
        if first:
            context.on_event(Resumed(label, first))
        elif previous is not None:
            new = sum(source.task(number).code is None for number in range(source.tasks()))
            context.on_event(Continued(label, previous.version, new))
        share_state(state, source, ranks)
        fitted = train_network(context, source, state, partial(run.save, state), ranks)
        metrics: dict[str, object] = {
            "bits_per_parameter": None if fitted is None else fitted.after,
            "bits_per_parameter_before": None if fitted is None else fitted.before,
            "measured_adapters": 0 if fitted is None else fitted.adapters,
            "steps": state.step,
            "resumed_from": first,
            "processes": ranks.count,
            "fit_seconds": round(time.monotonic() - started, 3),
            **run_metrics(device),
        }
        return _publish(context, store, source, run, state, parent, metrics)
    except Cancelled:
        report.stopped_at = state.step
        raise


def _refuse_none(label: str, encodable: Collection[str], left_out: Mapping[str, str]) -> None:
    """Raise if no task can be encoded."""
    if encodable:
        return
    if not left_out:
        hint = "run `icm ingest --restore PATH` with the original folders to train a new one"
        raise DataError(f"every original of {label} was evicted, so there is nothing to train on", hint=hint)
    name, reason = next(iter(left_out.items()))
    hint = "run `icm rm TASK` to remove a task; its original folder is not changed"
    raise GeneratorError(f"no task could be encoded; {name!r}: {reason}", hint=hint)


def _publish(
    context: Context,
    store: Store,
    source: StoreAdapterSource,
    run: TrainingRun,
    state: TrainState,
    parent: str | None,
    metrics: Mapping[str, object],
) -> Trained:
    """Write the generator, encode every task with the file as it is read back, and publish both."""
    started = time.monotonic()
    label, data = source.base_model, generator_to_bytes(state.net)
    codec = Codec.of(data)
    codes, left_out, known_seeds = _encode_all(context, source, run, codec)
    _refuse_none(label, codes, left_out)
    seconds = round(time.monotonic() - started, 3)
    metrics = {**metrics, "encode_seconds": seconds, "initial_a_known": known_seeds}
    config = json.loads(state.net.config.to_json()) | {"train": asdict(state.config)}
    (blob,) = put_files(store, [data])
    generator = Generator(base_model=label, blob=blob, config=config, metrics=metrics, trained_from=parent)
    published = publish(store, source, generator, codes, CodeLimits(tolerance=codec.config.tolerance))
    return Trained(
        base_model=label,
        version=published.generator.version,
        generator=str(blob),
        generator_size=blob.size,
        tasks=len(published.codes),
        codes_size=sum(len(code.data) for code in published.codes.values()),
        metrics=metrics,
        start_dropped=published.before is not None and published.before.start is not None,
        left_out=left_out | published.left_out,
        earlier_codes=sum(task.code is not None for task in source.others),
        replaced_bytes=published.replaced_bytes,
    )


def _encode_all(
    context: Context, source: StoreAdapterSource, run: TrainingRun, codec: Codec
) -> tuple[dict[str, Encoded], dict[str, str], int]:
    """Encode every task; codes that this run made before an interruption are taken as they are.

    Returns:
        The codes by task, the tasks without one with the reasons, and the number of adapters with a known seed.
    """
    codes, left_out, known_seeds = dict[str, Encoded](), dict(source.left_out), 0
    with run.codes(codec.digest) as saved:
        for number, name in enumerate(source.names):
            task = source.task(number)
            found = saved.get(task)
            if found is None:
                initial = source.initial(number)
                try:
                    code = encode_adapter(codec, source.load(number, None), source.mean_vectors(number), initial)
                except FAILURES as error:  # such as an adapter of numbers too small to be divided
                    left_out[name] = as_error(error).message
                    continue
                saved.add(task, code, seed_is_known=initial is not None)
                context.on_event(CodeMade(name, len(code.data), code.squared_error))
                found = code, initial is not None
            codes[name] = found[0]
            known_seeds += found[1]
            context.progress(number + 1, source.tasks(), f"encoding {name}")
    return codes, left_out, known_seeds
