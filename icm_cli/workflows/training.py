"""Fit the generator of each base model, encode its tasks, and make both current in one step.

    fleet --fit (resumable)--> network --file--> generator --encode--> code per task
                                                     `---- one transaction: generator + all codes ----> current

Until that transaction the store answers with the earlier generator, or with none.
"""

from __future__ import annotations

import hashlib
import json
import resource
import sys
import time
from collections.abc import Generator
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

import torch

from icm_cli.workflows.events import Event, Step, StopFlag
from icm_cli.workflows.opening import Place
from icm_cli.workflows.store_fleet import StoreFleet
from icmlora.device import resolve_device
from icmlora.errors import DataError
from icmlora.generator.codec import Codec
from icmlora.generator.config import GeneratorConfig, config_for
from icmlora.generator.generator_file import generator_from_bytes, generator_to_bytes
from icmlora.layout import ModuleShape
from icmlora.training.config import TrainConfig, steps_for
from icmlora.training.loop import TrainStep, fit
from icmlora.training.start import fresh_network, grown_network
from icmlora.training.state import TrainState, new_state, state_from_bytes
from registry.records import GeneratorRecord, NewCode, NewGenerator, TrainRunRecord

if TYPE_CHECKING:
    from registry.store import Store

_CHECKPOINT_SECONDS = 20.0


@dataclass(frozen=True)
class TrainRequest:
    """What `icm train` was asked for; None takes the default of the quality or of the present generator."""

    device: str
    quality: int
    seed: int = 0
    base_model: str | None = None
    tolerance: float | None = None
    width: int | None = None
    steps: int | None = None
    learning_rate: float | None = None
    resume: bool = True
    fresh: bool = False
    """Do not start from the present generator."""


@dataclass(frozen=True)
class Progressed(Event):
    """One optimiser step; `bits` and its parts are bits per parameter of the adapter that was seen."""

    base_model: str
    at: TrainStep


@dataclass(frozen=True)
class Resumed(Event):
    """A run goes on where it was stopped."""

    base_model: str
    step: int


@dataclass(frozen=True)
class CodeMade(Event):
    """One task is encoded; it becomes current with all the others."""

    task: str
    size: int
    dw_error: float


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


@dataclass
class TrainReport:
    """What a training did."""

    trained: list[Trained] = field(default_factory=list)
    stopped_at: int | None = None
    """The step of the checkpoint that was kept when the user stopped."""


def train(place: Place, request: TrainRequest, stop: StopFlag) -> Generator[Event, None, TrainReport]:
    """Train one generator per base model.

    Raises:
        DeviceUnavailable: The device is not there; nothing was opened or changed.
        DataError: There is nothing to train on.
    """
    device = resolve_device(request.device)
    report = TrainReport()
    with place.open() as store:
        labels = sorted({row.task.base_model for row in store.summaries()})
        if request.base_model is not None:
            labels = [label for label in labels if label == request.base_model]
        if not labels:
            raise DataError("there is nothing to train on", hint="`icm ingest PATH` takes adapters in")
        for label in labels:
            trained = yield from _train_base(store, label, request, device, stop)
            if isinstance(trained, int):
                report.stopped_at = trained
                break
            report.trained.append(trained)
            yield trained
    return report


def _train_base(
    store: Store, label: str, request: TrainRequest, device: torch.device, stop: StopFlag
) -> Generator[Event, None, Trained | int]:
    fleet = StoreFleet(store, label)
    previous = None if request.fresh else store.current_generator(label)
    started = time.monotonic()
    state, run = _begin(store, fleet, label, request, device, previous)
    if state.step:
        yield Resumed(label, state.step)
    first, saved, recent = state.step, time.monotonic(), 0.0
    for at in fit(state, fleet):
        recent = at.bits if not recent else 0.98 * recent + 0.02 * at.bits
        yield Progressed(label, at)
        yield Step(at.step, at.steps, f"{recent:.3f} bits per parameter")
        if stop.requested or time.monotonic() - saved > _CHECKPOINT_SECONDS:
            _save(store, run, state)
            saved = time.monotonic()
        if stop.requested:
            return state.step
    _save(store, run, state)
    metrics: dict[str, object] = {
        "bits_per_parameter": recent,
        "steps": state.step,
        "resumed_from": first,
        "fit_seconds": round(time.monotonic() - started, 3),
        "device": _device_name(device),
        **_peak_memory(device),
        "torch": torch.__version__,
    }
    return (yield from _publish(store, fleet, label, state, run, previous, metrics))


def _begin(
    store: Store,
    fleet: StoreFleet,
    label: str,
    request: TrainRequest,
    device: torch.device,
    previous: GeneratorRecord | None,
) -> tuple[TrainState, TrainRunRecord]:
    """Go on with the run that was stopped if it is the same one, else start a new one."""
    present = None if previous is None else generator_from_bytes(store.read_blob(previous.blob)).net
    config = _config(fleet, label, request, None if present is None else present.config)
    adapters = sum(1 + fleet.checkpoints(task) for task in range(fleet.tasks()))
    rate = {} if request.learning_rate is None else {"learning_rate": request.learning_rate}
    options = TrainConfig(steps=request.steps or steps_for(adapters), seed=request.seed, **rate)
    identity: dict[str, object] = {
        "generator": json.loads(config.to_json()),
        "train": json.loads(options.to_json()),
        "fleet": _fleet_digest(fleet),
        "parent": None if previous is None else previous.blob,
    }
    running = store.running_train_run(label)
    if running is not None and request.resume and running.config == identity and running.weights and running.optimizer:
        weights, optimizer = store.read_blob(running.weights), store.read_blob(running.optimizer)
        return state_from_bytes(weights, optimizer, device), running
    if present is None:
        net = fresh_network(config, fleet, request.seed)
    else:
        net = grown_network(config, present, fleet, request.seed)
    return new_state(net.to(device), options), store.start_train_run(label, identity)


def _config(
    fleet: StoreFleet, label: str, request: TrainRequest, previous: GeneratorConfig | None
) -> GeneratorConfig:
    rows = [fleet.final(task) for task in range(fleet.tasks())]
    return config_for(
        label,
        ([ModuleShape(*entry) for entry in row.layout] for row in rows),
        condition_size=fleet.condition_size(),
        quality=request.quality,
        tolerance=request.tolerance,
        width=request.width,
        previous=previous,
    )


def _publish(
    store: Store,
    fleet: StoreFleet,
    label: str,
    state: TrainState,
    run: TrainRunRecord,
    previous: GeneratorRecord | None,
    metrics: dict[str, object],
) -> Generator[Event, None, Trained]:
    """Write the generator, encode every task under the file as it is read back, and make both current."""
    started = time.monotonic()
    data = generator_to_bytes(state.net)
    blob = store.put_blob(data)
    codec = Codec(generator_from_bytes(data))
    codes: list[NewCode] = []
    total = 0
    for task, name in enumerate(fleet.names):
        encoded = codec.encode(fleet.load(task, None), fleet.mean_vectors(task))
        code = store.put_blob(encoded.data)
        codes.append(NewCode(name, fleet.final(task).id, code, 8.0 * len(encoded.data), encoded.dw_error))
        total += len(encoded.data)
        yield CodeMade(name, len(encoded.data), encoded.dw_error)
        yield Step(task + 1, fleet.tasks(), f"encoding {name}")
    metrics |= {"encode_seconds": round(time.monotonic() - started, 3)}
    config = json.loads(state.net.config.to_json()) | {"train": asdict(state.config)}
    parent = None if previous is None else previous.id
    record = store.add_generator(NewGenerator(label, blob, config, metrics, parent, codes, run.id))
    return Trained(label, record.version, blob, len(data), len(codes), total, metrics)


def _save(store: Store, run: TrainRunRecord, state: TrainState) -> None:
    network, optimizer = state.network_bytes(), state.optimizer_bytes()
    store.save_checkpoint(run.id, step=state.step, weights=network, optimizer=optimizer)


def _fleet_digest(fleet: StoreFleet) -> str:
    rows = [[name, fleet.final(task).weights, fleet.checkpoints(task)] for task, name in enumerate(fleet.names)]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def _peak_memory(device: torch.device) -> dict[str, int]:
    """Return the peak memory of the process and, on CUDA, of the device, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    peak = {"peak_memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    if device.type == "cuda":
        peak["peak_device_memory"] = torch.cuda.max_memory_allocated(device)
    return peak
