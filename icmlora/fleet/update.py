"""Ways to take new tasks into a generator whose earlier tasks are not looked at.

    new tasks ─┬─ covered by a version ┬─ encoded as it is ─────────────────────────────┬─▶ fewer bytes
               │                      └─ decoder tuned on them: a version of differences ┘
               └─ with modules or ranks that none has ──▶ a small network of their own: one more version

A version is only ever appended, so every code made before decodes to the same adapter, whatever is chosen.

Add tasks to a trained generator; what was there before is neither read nor changed.

    new tasks ──ways to take them in (growing)──▶ the smallest ──┬─ same generator: codes of the new tasks
                                                                └─ longer file: codes of all tasks, linked, current

Either way it is one transaction. Until it commits, every task answers as before.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from icmlora.adapter.layout import ModuleShape
from icmlora.errors import DataError, GeneratorError
from icmlora.fleet.adapter_source import StoreAdapterSource
from icmlora.fleet.context import Context, Event, Progress, StopFlag
from icmlora.fleet.train import fit_all, labels_of, run_metrics
from icmlora.fleet.training_run import CodeMade, TrainRequest, measured_sensitivity
from icmlora.generator.code import generator_of
from icmlora.generator.codec import Codec
from icmlora.generator.config import config_for, tolerance_of
from icmlora.generator.differences import differences_to_words
from icmlora.generator.encoding import Encoded
from icmlora.generator.file import append_version
from icmlora.generator.network_file import generator_to_bytes
from icmlora.generator.versions import GeneratorFile
from icmlora.io.devices import resolve_device
from icmlora.training.config import TrainConfig, steps_for
from icmlora.training.initialisation import fresh_network, tunable_network
from icmlora.training.state import TrainState, new_state
from registry.records import Asked, GeneratorRecord, NewCode, NewGenerator

if TYPE_CHECKING:
    from registry.store import Store

_TUNING_STEPS = 50
"""Of the decoder, per new task."""
_TUNING_RATE = 2e-3
_COARSENESS = 2.0
"""What the changes of tuning are rounded to, in terms of their root mean square."""


class Stopped(Exception):
    """The user stopped; nothing was written."""


@dataclass(frozen=True)
class Candidate:
    """A generator file, with codes of new tasks by name: each names a version of the file."""

    data: bytes
    codes: Mapping[str, Encoded] = field(default_factory=dict)

    def cost(self, before: bytes) -> int:
        """Return the bytes that its codes take, and its file beyond an earlier one."""
        return len(self.data) - len(before) + sum(len(code.data) for code in self.codes.values())


class Growth:
    """Takes new tasks in; reads no other task.

    Attributes:
        steps: How many were trained.
        left_out: Tasks that no code can have, with the reason.

    Args:
        store: The open store.
        fleet: The new tasks' final adapters.
        request: What was asked for.
        tolerance: What their codes may lose.
        device: Where to train.
        stop: Looked at between steps and between tasks.
    """

    def __init__(
        self,
        store: Store,
        fleet: StoreAdapterSource,
        request: TrainRequest,
        tolerance: float,
        device: torch.device,
        stop: StopFlag,
        cache: Path,
    ) -> None:
        self._cache = cache
        self._store, self._fleet, self._request = store, fleet, request
        self._tolerance, self._device, self._stop = tolerance, device, stop
        self.steps = 0
        self.left_out = dict(fleet.left_out)

    def kept(self, data: bytes) -> Generator[Event, None, Candidate]:
        """Encode the tasks that some version of a file covers, each under the one that gives the smallest code."""
        generator_file, codes = GeneratorFile(data), dict[str, Encoded]()
        for task, name in enumerate(self._fleet.names):
            numbers = generator_file.covering([ModuleShape(*entry) for entry in self._fleet.final(task).layout])
            made = [self._encoded(generator_file.codec(number), self._fleet, task) for number in numbers]
            found = [code for code in made if code is not None]
            if found:
                codes[name] = reduce(_smaller, found)
            yield Progress(task + 1, self._fleet.tasks(), f"encoding {name}")
        return Candidate(data, codes)

    def tuned(self, kept: Candidate) -> Generator[Event, None, Candidate]:
        """Tune the decoder of the version that most codes of a candidate name, and encode their tasks under it.

        A task keeps the code that it has where that is not larger. Nothing that reads adapters or vectors is tuned.
        """
        generator_file, named = (
            GeneratorFile(kept.data),
            {name: generator_of(code.data) for name, code in kept.codes.items()},
        )
        ((digest, _),) = Counter(named.values()).most_common(1)
        base = generator_file.digests.index(digest)
        net = generator_file.codec(base).generator.net
        fleet = StoreAdapterSource(
            self._store, self._fleet.base_model, [name for name in named if named[name] == digest]
        )
        steps = self._request.steps or _TUNING_STEPS * fleet.tasks()
        rate = self._request.learning_rate or _TUNING_RATE
        options = TrainConfig(steps=steps, learning_rate=rate, weight_decay=0.0, seed=self._request.seed)
        state = yield from self._fit(fleet, new_state(tunable_network(net).to(self._device), options))
        words = differences_to_words(net.state_dict(), state.net.state_dict(), _COARSENESS)
        found = yield from self._under_last(append_version(kept.data, words, base), fleet)
        smaller = {name: _smaller(kept.codes[name], code) for name, code in found.codes.items()}
        return Candidate(found.data, {**kept.codes, **smaller})

    def fresh(self, data: bytes, names: list[str]) -> Generator[Event, None, Candidate]:
        """Fit a network of their own to some tasks, and encode them under it.

        It reads no task vectors: from so few tasks nobody learns how adapters follow from them.
        """
        fleet = StoreAdapterSource(self._store, self._fleet.base_model, names)
        config = config_for(
            fleet.base_model,
            ([ModuleShape(*entry) for entry in row.layout] for row in fleet.rows()),
            tasks=fleet.tasks(),
            condition_size=0,
            quality=1,
            tolerance=self._tolerance,
        )
        rate = {} if self._request.learning_rate is None else {"learning_rate": self._request.learning_rate}
        options = TrainConfig(steps=self._request.steps or steps_for(len(names)), seed=self._request.seed, **rate)
        sensitivity = measured_sensitivity(self._store, fleet, config, None, self._device, self._cache)
        net = fresh_network(config, fleet, self._request.seed, sensitivity)
        state = yield from self._fit(fleet, new_state(net.to(self._device), options))
        return (yield from self._under_last(append_version(data, generator_to_bytes(state.net), None), fleet))

    def _fit(self, fleet: StoreAdapterSource, state: TrainState) -> Generator[Event, None, TrainState]:
        yield from fit_all(fleet, state, self._stop, lambda: None)
        self._look()
        self.steps += state.step
        return state

    def _under_last(self, data: bytes, fleet: StoreAdapterSource) -> Generator[Event, None, Candidate]:
        generator_file, codes = GeneratorFile(data), dict[str, Encoded]()
        codec = generator_file.codec(len(generator_file.digests) - 1)
        for task, name in enumerate(fleet.names):
            if (code := self._encoded(codec, fleet, task)) is not None:
                codes[name] = code
            yield Progress(task + 1, fleet.tasks(), f"encoding {name}")
        return Candidate(data, codes)

    def _encoded(self, codec: Codec, fleet: StoreAdapterSource, task: int) -> Encoded | None:
        """Return the code of a task, or None where there is none; then the task is left out."""
        self._look()
        vectors = fleet.mean_vectors(task)
        try:
            return codec.encode(fleet.load(task, None), vectors, fleet.initial(task), tolerance=self._tolerance)
        except GeneratorError as error:
            self.left_out[fleet.names[task]] = str(error)
            return None

    def _look(self) -> None:
        if self._stop.requested:
            raise Stopped


def _smaller(earlier: Encoded, later: Encoded) -> Encoded:
    """Return the smaller of two codes; of equal ones that of the earlier version."""
    return later if len(later.data) < len(earlier.data) else earlier


@dataclass(frozen=True)
class Updated(Event):
    """New tasks have codes under the current generator.

    Attributes:
        base_model: Whose generator it is.
        version: Its version; that of before where no version was appended.
        generator: Its digest.
        generator_size: Bytes of its file.
        epochs: How many versions it has.
        added: The versions that were appended: `tuned`, `fresh`.
        tasks: The tasks that got a code.
        codes_size: Bytes of these codes.
        kept_size: Bytes of the codes that the network as it was would give the tasks that it covers, if there are any.
        tuned_size: The same under the tuned network, with the version.
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


def update(context: Context, request: TrainRequest, stop: StopFlag) -> Generator[Event, None, UpdateReport]:
    """Give every task that has no code one, under the present generator of its base model or one that continues it.

    Raises:
        DeviceUnavailable: The device is not there; nothing was opened or changed.
        DataError: There is no task, or a base model has no generator yet.
        GeneratorError: Training diverged; nothing of this base model was changed.
        GeneratorConflict: Another process made another generator current meanwhile; likewise.
    """
    device = resolve_device(request.device)
    report = UpdateReport()
    with context.open() as store:
        labels = labels_of(store, request.base_model)
        for label in labels:
            _present(store, label)  # before an hour is spent on the others
        for label in labels:
            try:
                # Read now: while the others took their time, another process may have made a new one current.
                updated = yield from _update_base(store, _present(store, label), request, device, stop, context.cache)
            except Stopped:
                report.stopped = True
                break
            report.updated.append(updated)
            yield updated
    return report


def _present(store: Store, label: str) -> GeneratorRecord:
    generator = store.generators.current(label)
    if generator is None:
        hint = f"`icm train --base-model {label}` makes the first one"
        raise DataError(f"there is no generator of {label} that tasks could be added to", hint=hint)
    return generator


def _update_base(
    store: Store, generator: GeneratorRecord, request: TrainRequest, device: torch.device, stop: StopFlag, cache: Path
) -> Generator[Event, None, Updated]:
    started = time.monotonic()
    label, data = generator.base_model, store.blobs.read(generator.blob)
    names = [row.task.name for row in store.tasks.summaries() if row.task.base_model == label and row.code is None]
    fleet = StoreAdapterSource(store, label, names)
    tolerance = _tolerance(request, data)
    growth = Growth(store, fleet, request, tolerance, device, stop, cache)
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
        recorded = store.codes.add(generator.id, codes)
    else:
        config, blob = json.loads(GeneratorFile(best.data).configs[-1].to_json()), store.blobs.put(best.data)
        new = NewGenerator(label, blob, config, metrics, parent_id=generator.id, codes=codes)
        generator = store.generators.extend(new)
        recorded = [code for code in store.codes.all(generator.id) if code.task in best.codes]
    return Updated(
        base_model=label,
        version=generator.version,
        generator=generator.blob,
        generator_size=len(best.data),
        epochs=len(GeneratorFile(best.data).digests),
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
    return GeneratorFile(data).configs[0].tolerance if request.quality is None else tolerance_of(request.quality)


def _choose(growth: Growth, data: bytes, fleet: StoreAdapterSource) -> Generator[Event, None, _Chosen]:
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


def _stored(store: Store, fleet: StoreAdapterSource, best: Candidate, tolerance: float) -> list[NewCode]:
    """Store the files of codes and return what is to be recorded."""
    adapters = {name: fleet.final(task) for task, name in enumerate(fleet.names)}
    blobs = store.blobs.put_all([code.data for code in best.codes.values()])
    asked = Asked(tolerance=tolerance)
    return [
        NewCode(adapters[name], blob, 8.0 * len(code.data), code.dw_error, asked)
        for (name, code), blob in zip(best.codes.items(), blobs, strict=True)
    ]
