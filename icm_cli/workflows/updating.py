"""Add tasks to a trained generator; what was there before is neither read nor changed.

    new tasks ──ways to take them in (growing)──▶ the smallest ──┬─ same generator: codes of the new tasks
                                                                └─ longer file: codes of all tasks, linked, current

Either way it is one transaction. Until it commits, every task answers as before.
"""

from __future__ import annotations

import json
import time
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from icm_cli.workflows.events import Event, StopFlag
from icm_cli.workflows.growing import Candidate, Growth, Stopped
from icm_cli.workflows.opening import Place
from icm_cli.workflows.publishing import CodeMade
from icm_cli.workflows.store_fleet import StoreFleet
from icm_cli.workflows.training import labels_of, run_metrics
from icm_cli.workflows.training_run import TrainRequest
from icmlora.device import resolve_device
from icmlora.errors import DataError
from icmlora.generator.config import tolerance_of
from icmlora.generator.lineage import Lineage
from registry.records import Asked, GeneratorRecord, NewCode, NewGenerator

if TYPE_CHECKING:
    from registry.store import Store


@dataclass(frozen=True)
class Updated(Event):
    """New tasks have codes under the current generator.

    Attributes:
        base_model: Whose generator it is.
        version: Its version; that of before where no epoch was appended.
        generator: Its digest.
        generator_size: Bytes of its file.
        epochs: How many it has.
        added: The epochs that were appended: `tuned`, `fresh`.
        tasks: The tasks that got a code.
        codes_size: Bytes of these codes.
        kept_size: Bytes of the codes that the network as it was would give the tasks that it covers, if there are any.
        tuned_size: The same under the tuned network, with the epoch.
        metrics: What was measured meanwhile.
        left_out: The tasks that have no code, with the reason: they keep their originals.
    """

    base_model: str
    version: int
    generator: str
    generator_size: int
    epochs: int
    added: Sequence[str]
    tasks: Sequence[str]
    codes_size: int
    kept_size: int | None
    tuned_size: int | None
    metrics: dict[str, object]
    left_out: Mapping[str, str]


@dataclass
class UpdateReport:
    """What an update did."""

    updated: list[Updated] = field(default_factory=list)
    stopped: bool = False
    """Whether the user stopped: then the base models that are not listed are as they were."""

    @property
    def tasks(self) -> list[str]:
        """All tasks that got a code."""
        return [name for one in self.updated for name in one.tasks]


@dataclass(frozen=True)
class _Chosen:
    """The smallest of the ways that were tried."""

    candidate: Candidate
    added: Sequence[str]
    kept_size: int | None
    tuned_size: int | None


def update(place: Place, request: TrainRequest, stop: StopFlag) -> Generator[Event, None, UpdateReport]:
    """Give every task that has no code one, under the present generator of its base model or one that continues it.

    Raises:
        DeviceUnavailable: The device is not there; nothing was opened or changed.
        DataError: There is no task, or a base model has no generator yet.
        GeneratorError: Training diverged; nothing of this base model was changed.
        GeneratorConflict: Another process made another generator current meanwhile; likewise.
    """
    device = resolve_device(request.device)
    report = UpdateReport()
    with place.open() as store:
        labels = labels_of(store, request.base_model)
        for label in labels:
            _present(store, label)  # before an hour is spent on the others
        for label in labels:
            try:
                # Read now: while the others took their time, another process may have made a new one current.
                updated = yield from _update_base(store, _present(store, label), request, device, stop)
            except Stopped:
                report.stopped = True
                break
            report.updated.append(updated)
            yield updated
    return report


def _present(store: Store, label: str) -> GeneratorRecord:
    generator = store.current_generator(label)
    if generator is None:
        hint = f"`icm train --base-model {label}` makes the first one"
        raise DataError(f"there is no generator of {label} that tasks could be added to", hint=hint)
    return generator


def _update_base(
    store: Store, generator: GeneratorRecord, request: TrainRequest, device: torch.device, stop: StopFlag
) -> Generator[Event, None, Updated]:
    started = time.monotonic()
    label, data = generator.base_model, store.read_blob(generator.blob)
    names = [row.task.name for row in store.summaries() if row.task.base_model == label and row.code is None]
    fleet = StoreFleet(store, label, names)
    tolerance = _tolerance(request, data)
    growth = Growth(store, fleet, request, tolerance, device, stop)
    chosen = yield from _choose(growth, data, fleet)
    best = chosen.candidate
    for name, code in best.codes.items():
        yield CodeMade(name, len(code.data), code.dw_error)
    metrics: dict[str, object] = {
        "steps": growth.steps,
        "update_seconds": round(time.monotonic() - started, 3),
        **run_metrics(device),
    }
    if stop.requested:
        raise Stopped
    codes = _stored(store, fleet, best, tolerance)
    if best.data == data:
        recorded = store.add_codes(generator.id, codes)
    else:
        config, blob = json.loads(Lineage(best.data).configs[-1].to_json()), store.put_blob(best.data)
        new = NewGenerator(label, blob, config, metrics, parent_id=generator.id, codes=codes)
        generator = store.extend_generator(new)
        recorded = [code for code in store.codes(generator.id) if code.task in best.codes]
    return Updated(
        base_model=label,
        version=generator.version,
        generator=generator.blob,
        generator_size=len(best.data),
        epochs=len(Lineage(best.data).digests),
        added=chosen.added,
        tasks=[code.task for code in recorded],
        codes_size=sum(code.size for code in recorded),
        kept_size=chosen.kept_size,
        tuned_size=chosen.tuned_size,
        metrics=metrics,
        left_out=growth.left_out,
    )


def _tolerance(request: TrainRequest, data: bytes) -> float:
    """Return what new codes may lose: what was asked for, or what the generator was first trained for."""
    if request.tolerance is not None:
        return request.tolerance
    return Lineage(data).configs[0].tolerance if request.quality is None else tolerance_of(request.quality)


def _choose(growth: Growth, data: bytes, fleet: StoreFleet) -> Generator[Event, None, _Chosen]:
    """Take the new tasks in with the fewest bytes."""
    kept = yield from growth.kept(data)
    best, added, kept_size, tuned_size = kept, list[str](), None, None
    if kept.codes:
        tuned = yield from growth.tuned(kept)
        kept_size, tuned_size = kept.cost(data), tuned.cost(data)
        if tuned_size < kept_size:
            best, added = tuned, ["tuned"]
    others = [name for name in fleet.names if name not in kept.codes and name not in growth.left_out]
    if others:
        fresh = yield from growth.fresh(best.data, others)
        best, added = Candidate(fresh.data, {**best.codes, **fresh.codes}), [*added, "fresh"]
    return _Chosen(best, added, kept_size, tuned_size)


def _stored(store: Store, fleet: StoreFleet, best: Candidate, tolerance: float) -> list[NewCode]:
    """Store the files of codes and return what is to be recorded."""
    adapters = {name: fleet.final(task) for task, name in enumerate(fleet.names)}
    blobs = store.put_blobs([code.data for code in best.codes.values()])
    asked = Asked(tolerance=tolerance)
    return [
        NewCode(adapters[name], blob, 8.0 * len(code.data), code.dw_error, asked, data=code.data)
        for (name, code), blob in zip(best.codes.items(), blobs, strict=True)
    ]
