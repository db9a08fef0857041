"""Take what a bundle holds into a store: generator, codes and tasks, without their originals.

    bundle --check every byte--> --decide--> blobs, durable --> one transaction: generator, tasks, codes

Until the transaction the store is as it was; a killed import leaves blobs without rows, which `icm prune` removes.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from icm_cli.workflows.bundled import find_task, open_lineage
from icm_cli.workflows.events import Event, Step
from icm_cli.workflows.opening import Place
from icmlora.adapter_config import AdapterConfig
from icmlora.bundle import Bundle, open_bundle
from icmlora.bundle_index import BundledTask, BundleIndex
from icmlora.errors import BundleError
from registry.arrivals import Arrival, ArrivalOutcome, ArrivingTask
from registry.errors import StoreNotFound
from registry.records import NewAdapter, NewEvaluation, NewGenerator

if TYPE_CHECKING:
    from registry.store import Store

_BATCH_BYTES = 64 << 20


@dataclass(frozen=True)
class ImportRequest:
    """What `icm import` was asked for."""

    file: Path
    names: Sequence[str] = ()
    """Tasks of the bundle; all if there is none."""
    on_conflict: Literal["skip", "fail"] = "fail"
    dry_run: bool = False


@dataclass(frozen=True)
class Imported:
    """What was taken in, or would be."""

    index: BundleIndex
    digest: str
    """Stands for the whole bundle."""
    tasks: tuple[ArrivalOutcome, ...]


def take_in(place: Place, request: ImportRequest) -> Generator[Event, None, Imported]:
    """Record the tasks of a bundle with their codes, in a store that is made if there is none.

    Raises:
        BundleError: The bundle is damaged, cut short, of another format, or its parts contradict each other.
        DataError: It has no task of a name that was given.
        GeneratorConflict: The store uses another generator for this base model.
        TaskConflict: A task is in the store with another adapter, and `on_conflict` is `fail`.
    """
    with open_bundle(request.file) as bundle:
        index = bundle.index
        names = {find_task(index, name).name for name in request.names}
        tasks = [task for task in index.tasks if not names or task.name in names]
        yield Step(0, None, "checking")
        bundle.check()
        _check_parts(bundle, tasks)
        arrival = _arrival(bundle, tasks, request)
        if request.dry_run:
            return Imported(index, bundle.digest, tuple(_plan(place, arrival)))
        with place.open(create=True) as store:
            planned = store.plan_arrival(arrival)
            new = {outcome.name.lower() for outcome in planned if outcome.status in ("added", "encoded")}
            yield from _put(store, bundle, [task for task in tasks if task.name.lower() in new])
            # Decided once more under the write lock, which sees what another process did meanwhile: a task that was to
            # be skipped may get its code after all, and then its bytes come out of the bundle.
            outcomes = store.take_arrival(arrival) if new else planned
    return Imported(index, bundle.digest, tuple(outcomes))


def _check_parts(bundle: Bundle, tasks: Sequence[BundledTask]) -> None:
    """Check what the format itself does not look into: every epoch opens, and codes and configurations go with it."""
    from icmlora.generator.code import generator_of

    index = bundle.index
    lineage = open_lineage(bundle)
    for number in range(len(lineage.digests)):
        lineage.codec(number)
    for task in tasks:
        if generator_of(bundle.read(task.code)) not in lineage.digests:
            raise BundleError(f"the code of {task.name!r} belongs to another generator")
        if AdapterConfig.parse(bundle.read(task.config)).base_model != index.base_model:
            raise BundleError(f"the configuration of {task.name!r} names another base model")


def _plan(place: Place, arrival: Arrival) -> list[ArrivalOutcome]:
    try:
        with place.open(read_only=True) as store:
            return store.plan_arrival(arrival)
    except StoreNotFound:
        return [ArrivalOutcome(task.name, "added") for task in arrival.tasks]


def _put(store: Store, bundle: Bundle, tasks: Sequence[BundledTask]) -> Iterator[Event]:
    """Store the parts that some tasks need, a few at a time."""
    if not tasks:
        return
    digests = list(dict.fromkeys([bundle.index.generator.blob, *(part for task in tasks for part in task.parts)]))
    batch: list[bytes] = []
    for done, digest in enumerate(digests, 1):
        batch.append(bundle.read(digest))
        if done == len(digests) or sum(map(len, batch)) >= _BATCH_BYTES:
            store.put_blobs(batch)
            batch = []
            yield Step(done, len(digests))


def _arrival(bundle: Bundle, tasks: Sequence[BundledTask], request: ImportRequest) -> Arrival:
    index = bundle.index
    generator = NewGenerator(index.base_model, index.generator.blob, index.generator.config, index.generator.metrics)
    source = f"bundle {bundle.digest}"
    arriving = [_task(task, source) for task in tasks]
    return Arrival(generator, index.generator.version, arriving, request.on_conflict, bundle.read)


def _task(task: BundledTask, source: str) -> ArrivingTask:
    original = NewAdapter(
        weights=task.weights,
        config=task.config,
        card=task.card,
        step=task.step,
        is_final=True,
        dtype=task.dtype,
        rank_max=task.rank_max,
        parameters=task.parameters,
        target_modules=task.target_modules,
        layout=[(shape.module, shape.rank, shape.inputs, shape.outputs) for shape in task.layout],
        source=source,
        is_generated=task.is_generated,
    )
    measured = None
    if task.measured is not None:
        measured = NewEvaluation(task=task.name, rung="code", generator_id=None, **asdict(task.measured))
    return ArrivingTask(task.name, original, task.weights_size, task.code, task.dw_error, measured)
