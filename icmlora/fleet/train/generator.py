"""Train the generator of one base model on all its tasks, and publish it with a code per task.

    adapters ──run (resumable)──▶ network ──▶ generator file ──encode──▶ a code per task
                                                    └── one transaction: generator and codes ──▶ current

Until that transaction the earlier generator stays current, if there is one. Tasks that cannot be encoded, such as
evicted ones, keep their codes, and with them the generators that decode these.
"""

from __future__ import annotations

import json
import time
from collections.abc import Collection, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING

import torch

from icmlora.errors import Cancelled, DataError, GeneratorError
from icmlora.fleet.context import Context
from icmlora.fleet.failures import FAILURES, as_error
from icmlora.fleet.resources.adapter_source import StoreAdapterSource
from icmlora.fleet.train.publish import publish, put_files
from icmlora.fleet.train.report import CodeMade, Continued, Resumed, Trained, TrainReport
from icmlora.fleet.train.run import (
    TrainingRun,
    TrainOptions,
    measured_sensitivity,
    run_metrics,
    schedule_of,
    train_network,
    usable_source,
)
from icmlora.generator.codec.codec import Codec
from icmlora.generator.codec.encoding import Encoded, encode_adapter
from icmlora.generator.codec.generator_file import GeneratorFile
from icmlora.generator.config import config_for
from icmlora.generator.files.network_file import generator_to_bytes
from icmlora.training.config import DEFAULT_QUALITY
from icmlora.training.initialisation import fresh_network, grown_network
from icmlora.training.ranks import Ranks
from icmlora.training.state import TrainState, new_state
from registry.manifests import CodeLimits, Generator

if TYPE_CHECKING:
    from registry.store import Store


def train_base(
    context: Context,
    store: Store,
    label: str,
    device: torch.device,
    ranks: Ranks,
    report: TrainReport,
    previous: Generator | None,
    options: TrainOptions,
) -> Trained:
    """Train the generator of one base model, and publish it with its codes. Call it inside the job lock.

    Raises:
        DataError: There is nothing to train on, or the current generator has another width.
        GeneratorError: The training diverged, or no task can be encoded.
    """
    source = usable_source(context, store, label)
    _refuse_none(label, source.names, source.left_out)
    started = time.monotonic()
    run, state = _begin(context, store, source, device, previous, options)
    first = state.step
    try:
        if first:
            context.on_event(Resumed(label, first))
        elif previous is not None:
            new = sum(source.task(number).code is None for number in range(source.tasks()))
            context.on_event(Continued(label, previous.version, new))
        if ranks.count > 1:  # the others train the same state on the same fleet
            fleet = label.encode(), source.digest().encode()
            ranks.share([*fleet, state.network_bytes(), state.optimizer_bytes()])
        metrics = {
            **train_network(context, source, state, run, ranks),
            "steps": state.step,
            "resumed_from": first,
            "processes": ranks.count,
            "fit_seconds": round(time.monotonic() - started, 3),
            **run_metrics(device),
        }
        return _publish(context, store, source, run, state, previous, metrics)
    except Cancelled:
        report.stopped_at = state.step
        raise


def _begin(
    context: Context,
    store: Store,
    source: StoreAdapterSource,
    device: torch.device,
    previous: Generator | None,
    options: TrainOptions,
) -> tuple[TrainingRun, TrainState]:
    """Resume the interrupted run if it is the same one, else start a new one from the current generator, if any."""
    network = tolerance = None
    if previous is not None:
        # The first version was trained on a whole fleet; later ones are for the tasks that they were added for.
        network = GeneratorFile(store.blobs.read(previous.blob)).codec(0).net
        tolerance, width = network.config.tolerance, network.config.width
        if options.width not in (None, width):
            fact = f"the current generator has width {width}, and training from it cannot change the width"
            raise DataError(fact, hint="run `icm train --fresh` to train from scratch with any width")
    config = config_for(
        source.base_model,
        source.layouts(),
        tasks=source.tasks(),
        condition_size=source.condition_size(),
        quality=DEFAULT_QUALITY if options.quality is None else options.quality,
        tolerance=tolerance if options.quality is None else None,
        width=options.width,
        previous=None if network is None else network.config,
    )
    schedule = schedule_of(source, device, options)
    identity: dict[str, object] = {
        "generator": json.loads(config.to_json()),
        "train": json.loads(schedule.to_json()),
        "fleet": source.digest(),
        "parent": None if previous is None else str(previous.blob),
    }
    run = TrainingRun.open(store, source.base_model, identity, resume=options.resume)
    state = run.state(device)
    if state is not None:
        return run, state
    sensitivity = None
    if network is None or (network.config.kinds, network.config.layers) != (config.kinds, config.layers):
        sensitivity = measured_sensitivity(context, store, source, config, device)
    if network is None:
        network = fresh_network(config, source, options.seed, sensitivity)
    else:
        network = grown_network(config, network, source, options.seed, sensitivity)
    return run, new_state(network.to(device), schedule)


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
    previous: Generator | None,
    metrics: dict[str, object],
) -> Trained:
    """Write the generator, encode every task with the file as it is read back, and publish both.

    Codes that this run made before an interruption are taken as they are.
    """
    started = time.monotonic()
    label, data = source.base_model, generator_to_bytes(state.net)
    codec = Codec.of(data)
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
    _refuse_none(label, codes, left_out)
    seconds = round(time.monotonic() - started, 3)
    metrics = {**metrics, "encode_seconds": seconds, "initial_a_known": known_seeds}
    config = json.loads(state.net.config.to_json()) | {"train": asdict(state.config)}
    (blob,) = put_files(store, [data])
    parent = None if previous is None else str(previous.blob)
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
