"""Where a training begins: the run that was stopped, the present generator, or nothing.

Turn a trained network into what the store answers with: one generator file and a code per task.

    network --file--> generator --encode--> code per task
                          `---- one transaction: generator + all codes ----> current

Until that transaction the store answers with the earlier generator, or with none.
"""

from __future__ import annotations

import json
import time
from collections.abc import Generator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from icmlora.adapter.layout import ModuleShape
from icmlora.base_models.channel_statistics import channel_statistics
from icmlora.base_models.modality import BaseModel
from icmlora.errors import BaseModelNotFound, DataError, GeneratorError
from icmlora.fleet.adapter_source import StoreAdapterSource
from icmlora.fleet.context import Event, Progress, StopFlag, read_samples, with_files
from icmlora.fleet.loading import open_base
from icmlora.generator.codec import Codec
from icmlora.generator.config import GeneratorConfig, config_for
from icmlora.generator.network_file import generator_from_bytes, generator_to_bytes
from icmlora.generator.sensitivity import Sensitivity, sensitivity_of
from icmlora.generator.versions import GeneratorFile
from icmlora.training.config import TrainConfig, steps_for
from icmlora.training.initialisation import fresh_network, grown_network
from icmlora.training.state import TrainState, new_state, state_from_bytes
from registry.records import Asked, GeneratorRecord, NewCode, NewGenerator, TrainRunRecord

if TYPE_CHECKING:
    from registry.store import Store

DEFAULT_QUALITY = 4

# Twice as many tokens change the weights by less than their grid (docs/results/LOG.md).
_STATISTICS_TOKENS = 8192
_STATISTICS_TASKS = 64
_SAMPLES_EACH = 8


@dataclass(frozen=True)
class TrainRequest:
    """What `icm train` was asked for; None takes that of the present generator, or the default where there is none."""

    device: str
    quality: int | None = None
    seed: int = 0
    base_model: str | None = None
    tolerance: float | None = None
    width: int | None = None
    steps: int | None = None
    learning_rate: float | None = None
    resume: bool = True
    fresh: bool = False
    """Do not start from the present generator."""


def begin(
    store: Store,
    fleet: StoreAdapterSource,
    request: TrainRequest,
    device: torch.device,
    previous: GeneratorRecord | None,
    cache: Path,
) -> tuple[TrainState, TrainRunRecord]:
    """Go on with the run that was stopped if it is the same one, else start a new one.

    Args:
        store: The open store.
        fleet: What to train on.
        request: What was asked for.
        device: Where to train.
        previous: The generator to start from, if any.
        cache: Where a GGUF base model is converted to.

    Raises:
        DataError: A width that the present generator does not have.
    """
    # The first version is the one that was trained on a whole fleet; later ones suit the tasks they were made for.
    present = None if previous is None else GeneratorFile(store.blobs.read(previous.blob)).codec(0).generator.net
    config = _config(fleet, request, None if present is None else present.config)
    adapters = sum(1 for _ in fleet.rows())
    rate = {} if request.learning_rate is None else {"learning_rate": request.learning_rate}
    options = TrainConfig(steps=request.steps or steps_for(adapters), seed=request.seed, **rate)
    identity: dict[str, object] = {
        "generator": json.loads(config.to_json()),
        "train": json.loads(options.to_json()),
        "fleet": fleet.digest(),
        "parent": None if previous is None else previous.blob,
    }
    if request.resume and (stopped := _stopped(store, fleet.base_model, identity, device)) is not None:
        return stopped
    sensitivity = measured_sensitivity(store, fleet, config, None if present is None else present.config, device, cache)
    if present is None:
        net = fresh_network(config, fleet, request.seed, sensitivity)
    else:
        net = grown_network(config, present, fleet, request.seed, sensitivity)
    return new_state(net.to(device), options), store.runs.start(fleet.base_model, identity)


def _stopped(
    store: Store, label: str, identity: Mapping[str, object], device: torch.device
) -> tuple[TrainState, TrainRunRecord] | None:
    """Read the checkpoint of a run that was stopped and is the same one; another train may go on with it just now."""

    def read(running: TrainRunRecord | None) -> tuple[TrainState, TrainRunRecord] | None:
        if running is None or running.config != identity or not (running.weights and running.optimizer):
            return None
        weights, optimizer = store.blobs.read(running.weights), store.blobs.read(running.optimizer)
        return state_from_bytes(weights, optimizer, device), running

    return with_files(lambda: store.runs.running(label), read)


def measured_sensitivity(
    store: Store,
    fleet: StoreAdapterSource,
    config: GeneratorConfig,
    present: GeneratorConfig | None,
    device: torch.device,
    cache: Path,
) -> Sensitivity | None:
    """Measure the channels of the base model where they are not known yet and it is on this machine."""
    if present is not None and (present.kinds, present.layers) == (config.kinds, config.layers):
        return None
    try:
        base = open_base(store, fleet.base_model, device, cache=cache)
    except BaseModelNotFound:
        return None
    modules = [kind.module(layer) for kind in config.kinds for layer in range(config.layers)]
    statistics = channel_statistics(base, _examples(store, fleet.names, base), modules, max_tokens=_STATISTICS_TOKENS)
    return sensitivity_of(config, statistics)


def _examples(store: Store, names: Sequence[str], base: BaseModel) -> list[Any]:
    """Return the first samples of each task in turn, or neutral ones where no task has any."""
    samples = (read_samples(store, store.tasks.get(name), base) for name in names[:_STATISTICS_TASKS])
    firsts = (some[:_SAMPLES_EACH] for some in samples if some is not None)
    return [one for row in zip_longest(*firsts) for one in row if one is not None] or list(base.modality.probes)


def _config(fleet: StoreAdapterSource, request: TrainRequest, previous: GeneratorConfig | None) -> GeneratorConfig:
    tolerance = request.tolerance
    if previous is not None:
        if request.width not in (None, previous.width):
            fact = f"the present generator has a width of {previous.width}, and training on keeps it"
            raise DataError(fact, hint="`icm train --fresh` starts anew, with any width")
        if tolerance is None and request.quality is None:
            tolerance = previous.tolerance
    return config_for(
        fleet.base_model,
        ([ModuleShape(*entry) for entry in row.layout] for row in fleet.rows()),
        tasks=fleet.tasks(),
        condition_size=fleet.condition_size(),
        quality=DEFAULT_QUALITY if request.quality is None else request.quality,
        tolerance=tolerance,
        width=request.width,
        previous=previous,
    )


@dataclass(frozen=True)
class CodeMade(Event):
    """One task is encoded; it becomes current with all the others."""

    task: str
    size: int
    dw_error: float


@dataclass(frozen=True)
class Trained(Event):
    """A generator and its codes are current.

    `start_dropped` says that the generator before knew where adapters for unseen tasks start: its start is a code of
    that generator, so this one has none. `left_out` says which tasks have no code, and why: they keep their originals.
    """

    base_model: str
    version: int
    generator: str
    generator_size: int
    tasks: int
    codes_size: int
    metrics: dict[str, object]
    start_dropped: bool
    left_out: Mapping[str, str]


def publish(
    store: Store,
    fleet: StoreAdapterSource,
    state: TrainState,
    run: TrainRunRecord,
    previous: GeneratorRecord | None,
    metrics: dict[str, object],
    stop: StopFlag,
) -> Generator[Event, None, Trained | None]:
    """Write the generator, encode every task under the file as it is read back, and make both current.

    Args:
        store: The open store.
        fleet: What was trained on.
        state: The trained network.
        run: The training run, which is done with this.
        previous: The generator that training started from.
        metrics: What training measured; stored with the generator.
        stop: Looked at between tasks.

    Returns:
        What became current, or None if the user stopped; then nothing is.

    Raises:
        GeneratorError: No task could be encoded.
    """
    started = time.monotonic()
    data = generator_to_bytes(state.net)
    blob = store.blobs.put(data)
    codec = Codec(generator_from_bytes(data))
    codes: list[NewCode] = []
    known, left_out = 0, dict(fleet.left_out)
    for task, name in enumerate(fleet.names):
        if stop.requested:
            return None
        initial = fleet.initial(task)
        try:
            encoded = codec.encode(fleet.load(task, None), fleet.mean_vectors(task), initial)
        except GeneratorError as error:  # such as an adapter of numbers too small to be divided
            left_out[name] = str(error)
            continue
        known += initial is not None
        code = store.blobs.put(encoded.data)
        size, asked = len(encoded.data), Asked(tolerance=codec.config.tolerance)
        codes.append(NewCode(fleet.final(task), code, 8.0 * size, encoded.dw_error, asked))
        yield CodeMade(name, len(encoded.data), encoded.dw_error)
        yield Progress(task + 1, fleet.tasks(), f"encoding {name}")
    must_have_codes(codes, left_out)
    metrics = metrics | {"encode_seconds": round(time.monotonic() - started, 3), "initial_a_known": known}
    config = json.loads(state.net.config.to_json()) | {"train": asdict(state.config)}
    parent, before = None if previous is None else previous.id, store.generators.current(run.base_model)
    record = store.generators.add(NewGenerator(run.base_model, blob, config, metrics, parent, codes, run.id))
    sizes = [code.size for code in store.codes.all(record.id)]
    dropped = before is not None and before.start is not None
    return Trained(run.base_model, record.version, blob, len(data), len(sizes), sum(sizes), metrics, dropped, left_out)


def must_have_codes(codes: Sequence[object], left_out: Mapping[str, str]) -> None:
    """Raise if no task of some could be encoded.

    Raises:
        GeneratorError: There are tasks that were left out, and no code.
    """
    if left_out and not codes:
        name, reason = next(iter(left_out.items()))
        hint = "`icm rm` forgets a task; their originals are as they were"
        raise GeneratorError(f"no task could be encoded; {name!r}: {reason}", hint=hint)
