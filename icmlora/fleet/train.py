"""Fit the generator of each base model over all its tasks, and publish it with a code per task.

fleet --fit (resumable)--> network --publish--> generator + codes, current together
"""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from icmlora.errors import DataError, GeneratorError
from icmlora.fleet.adapter_source import StoreAdapterSource
from icmlora.fleet.context import Context, Event, Progress, StopFlag, check_base_model
from icmlora.fleet.training_run import Trained, TrainRequest, begin, must_have_codes, publish
from icmlora.io.devices import resolve_device
from icmlora.training.loop import TrainStep, fit
from icmlora.training.state import TrainState
from registry.records import TrainRunRecord

if TYPE_CHECKING:
    from registry.store import Store

_CHECKPOINT_SECONDS = 20.0


@dataclass(frozen=True)
class Progressed(Event):
    """One optimiser step; `bits` and its parts are bits per parameter of the adapter that was seen."""

    base_model: str
    task: str
    at: TrainStep


@dataclass(frozen=True)
class Resumed(Event):
    """A run goes on where it was stopped."""

    base_model: str
    step: int


@dataclass(frozen=True)
class Continued(Event):
    """Training starts from the present generator, under which `new_tasks` tasks have no code."""

    base_model: str
    version: int
    new_tasks: int


@dataclass
class TrainReport:
    """What a training did."""

    trained: list[Trained] = field(default_factory=list)
    stopped_at: int | None = None
    """The step of the checkpoint that was kept when the user stopped."""


def train(context: Context, request: TrainRequest, stop: StopFlag) -> Generator[Event, None, TrainReport]:
    """Train one generator per base model.

    Raises:
        DeviceUnavailable: The device is not there; nothing was opened or changed.
        DataError: There is nothing to train on, or a task would lose its only copy.
        GeneratorError: Training diverged.
    """
    device = resolve_device(request.device)
    report = TrainReport()
    with context.open() as store:
        for label in labels_of(store, request.base_model):
            trained = yield from _train_base(store, label, request, device, stop, context.cache)
            if isinstance(trained, int):
                report.stopped_at = trained
                break
            report.trained.append(trained)
            yield trained
    return report


def labels_of(store: Store, base_model: str | None) -> list[str]:
    """Return the base models of all tasks, or the one that is asked for.

    Raises:
        DataError: It has no task, or there is no task at all.
    """
    labels = sorted({row.task.base_model for row in store.tasks.summaries()})
    if not labels:
        raise DataError("there is nothing to train on", hint="`icm ingest PATH` takes adapters in")
    if base_model is None:
        return labels
    check_base_model(base_model, labels)
    return [base_model]


def _train_base(
    store: Store, label: str, request: TrainRequest, device: torch.device, stop: StopFlag, cache: Path
) -> Generator[Event, None, Trained | int]:
    """Return what was published, or the step at which the user stopped."""
    _must_keep_codes(store, label)
    fleet = StoreAdapterSource(store, label)
    must_have_codes(fleet.names, fleet.left_out)
    previous = None if request.fresh else store.generators.current(label)
    started = time.monotonic()
    state, run = begin(store, fleet, request, device, previous, cache)
    if state.step:
        yield Resumed(label, state.step)
    elif previous is not None:
        bare = [row for row in store.tasks.summaries() if row.task.base_model == label and row.code is None]
        yield Continued(label, previous.version, len(bare))
    first = state.step
    recent = yield from fit_all(fleet, state, stop, partial(_save, store, run, state))
    if stop.requested:
        return state.step
    metrics: dict[str, object] = {
        "bits_per_parameter": recent,
        "steps": state.step,
        "resumed_from": first,
        "fit_seconds": round(time.monotonic() - started, 3),
        **run_metrics(device),
    }
    trained = yield from publish(store, fleet, state, run, previous, metrics, stop)
    return state.step if trained is None else trained


def _must_keep_codes(store: Store, label: str) -> None:
    """Raise if there are tasks that the present generator alone can decode: a new one would not have their code."""
    bare = [row.task.name for row in store.tasks.summaries() if row.task.base_model == label and row.final.is_evicted]
    if bare:
        shown = ", ".join(map(repr, bare[:3])) + (f" and {len(bare) - 3} more" if len(bare) > 3 else "")
        fact = f"a new generator would leave evicted tasks without a code: {shown}"
        hint = "`icm train --update` adds tasks to the present one; or `icm ingest --restore PATH` of their originals"
        raise DataError(fact, hint=hint)


def fit_all(
    fleet: StoreAdapterSource, state: TrainState, stop: StopFlag, save: Callable[[], None]
) -> Generator[Event, None, float | None]:
    """Train to the end or until the user stops.

    Args:
        fleet: What to train on.
        state: Where to go on; changed in place.
        stop: Looked at after each step.
        save: Called every 20 seconds and at the end, unless there was no step left to do.

    Returns:
        The running mean of the loss in bits per parameter, None if there was no step left to do.

    Raises:
        GeneratorError: Training diverged.
    """
    saved, recent = time.monotonic(), None
    for at in fit(state, fleet):
        if not math.isfinite(at.bits):
            raise GeneratorError(f"training diverged at step {at.step}", hint="train again with a lower --lr")
        recent = at.bits if recent is None else 0.98 * recent + 0.02 * at.bits
        yield Progressed(fleet.base_model, fleet.names[at.task], at)
        yield Progress(at.step, at.steps, f"{recent:.3f} bits per parameter")
        if stop.requested:
            break
        if time.monotonic() - saved > _CHECKPOINT_SECONDS:
            save()
            saved = time.monotonic()
    if recent is not None:
        save()
    return recent


def _save(store: Store, run: TrainRunRecord, state: TrainState) -> None:
    network, optimizer = state.network_bytes(), state.optimizer_bytes()
    try:
        store.runs.save_checkpoint(run.id, step=state.step, weights=network, optimizer=optimizer)
    except LookupError as error:
        fact = f"another `icm train` has taken over {run.base_model!r}"
        raise DataError(fact, hint="let that one finish; this one's steps are dropped") from error


def run_metrics(device: torch.device) -> dict[str, object]:
    """Return where a run took place, and its peak memory in bytes: of the process and, on CUDA, of the device."""
    unit = 1 if sys.platform == "darwin" else 1024
    peak = {"peak_memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    if device.type == "cuda":
        peak["peak_device_memory"] = torch.cuda.max_memory_allocated(device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    return {"device": name, **peak, "torch": torch.__version__}
