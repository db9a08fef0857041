"""Every task of a base model as an adapter, whatever the store has of it: its original, or what stands in for that.

Learn where adapters for unseen tasks start, from the tasks that are known, and keep it beside the generator.

    all adapters ──mean──▶ start ──episodes over tasks with samples──▶ lengths of its steps ──▶ start file

The file and the row that names it are one transaction. Until then the generator has the start that it had, or none.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from icmlora.adapter.model import Adapter
from icmlora.base_models.examples import spread
from icmlora.base_models.modality import BaseModel, Prepared
from icmlora.errors import DataError
from icmlora.fewshot.meta_training import Episode, MetaConfig, meta_train
from icmlora.fewshot.start import FewShotStart, encodable_part, untrained_fewshot_start
from icmlora.fewshot.start_file import fewshot_start_from_bytes, fewshot_start_to_bytes, mean_code
from icmlora.fleet.context import Context, Event, Progress, StopFlag, locate_base, with_files
from icmlora.fleet.decoding import decode_code
from icmlora.fleet.loading import open_base, read_original
from icmlora.fleet.train import labels_of
from icmlora.generator.codec import Codec
from icmlora.generator.versions import GeneratorFile
from icmlora.io.devices import gradient_dtype, resolve_device
from icmlora.io.text import counted
from registry.records import GeneratorRecord

if TYPE_CHECKING:
    from registry.store import Store


class StoreEpisodeSource:
    """The tasks of one base model, evicted ones included (see `icmlora.fewshot.meta_training.EpisodeSource`).

    Rows are in memory, adapters are not. What a start made is not among them: it would only confirm that start.

    Args:
        store: The open store.
        generator: The current generator.
        generator_file: Its file, which decodes what was evicted.
    """

    def __init__(self, store: Store, generator: GeneratorRecord, generator_file: GeneratorFile) -> None:
        self._store, self._generator, self._generator_file = store, generator, generator_file
        rows = [row for row in store.tasks.summaries() if row.task.base_model == generator.base_model]
        self._rows = [row for row in rows if not row.final.is_generated]
        self.names = [row.task.name for row in self._rows]

    def __iter__(self) -> Iterator[Adapter]:
        """Read all adapters, one after the other."""
        return (self.load(task) for task in range(len(self._rows)))

    def load(self, task: int) -> Adapter:
        """Read the original of a task, or decode what stands in for it.

        Raises:
            DataError: It has neither.
        """
        row = self._rows[task]
        if not row.final.is_evicted:
            return read_original(self._store, row.final)
        code = self._store.codes.get(row.task.name, self._generator.id)
        if code is None:
            raise DataError(f"task {row.task.name!r} has neither an original nor a code", hint="`icm verify` says more")
        return decode_code(self._store, self._generator_file, code, code.rung)

    def samples(self, task: int, base: BaseModel, max_tokens: int, most: int) -> Sequence[Prepared]:
        """Return some of a task's samples as the base model reads them, spread evenly; none where it has no samples.

        Args:
            task: Which task.
            base: The base model that is to read them.
            max_tokens: Tokens read of a sample.
            most: Samples: a file may hold a hundred thousand.
        """
        digest = self._rows[task].task.samples
        if digest is None:
            return ()
        some = spread(base.modality.read_examples(self._store.blobs.read(digest)), most)
        try:
            return base.modality.prepare(base, some, max_tokens)
        except DataError:
            return ()  # single letters: nothing to predict


SAMPLE_TOKENS = 128
"""Tokens read of a sample, here and when an adapter is generated."""
_FEWEST = 2
"""Samples that a task needs for an episode: one to adapt to and one to judge by."""
_TRIED, _MOST = 8, 1024
"""Samples read of a task, to see whether it has so many that can be used, and in an episode."""


@dataclass(frozen=True)
class StartRequest:
    """What is asked for."""

    device: str
    base_model: str | None = None
    episodes: int = MetaConfig.episodes
    seed: int = 0


@dataclass(frozen=True)
class EpisodeDone(Event):
    """One episode; what it measured is in `icmlora.fewshot.meta_training.Episode`."""

    base_model: str
    task: str
    at: Episode


@dataclass(frozen=True)
class StartLearned(Event):
    """A generator has a start.

    Attributes:
        base_model: Whose generator it is.
        generator: Its digest.
        start: The start file's digest.
        size: Its length in bytes.
        tasks: Tasks that the mean was made of.
        episodes: Episodes that the lengths of steps were learned in.
        loss: Mean over the last half of the episodes: 0 as good as a task's own adapter, 1 as good as none.
        seconds: How long it took.
    """

    base_model: str
    generator: str
    start: str
    size: int
    tasks: int
    episodes: int
    loss: float
    seconds: float


@dataclass
class StartReport:
    """What was learned."""

    learned: list[StartLearned] = field(default_factory=list)
    stopped: bool = False


class _Episodes:
    """The tasks of a fleet that have samples; of one task at a time they are in memory."""

    def __init__(self, fleet: StoreEpisodeSource, base: BaseModel) -> None:
        self._fleet, self._base = fleet, base
        self._places = [task for task in range(len(fleet.names)) if len(self._samples(task, _TRIED)) >= _FEWEST]

    def tasks(self) -> int:
        """Return the number of tasks."""
        return len(self._places)

    def name(self, task: int) -> str:
        """Return the name of a task."""
        return self._fleet.names[self._places[task]]

    def load(self, task: int) -> Adapter:
        """Read a task's adapter."""
        return self._fleet.load(self._places[task])

    def samples(self, task: int) -> Sequence[Prepared]:
        """Read a task's samples."""
        return self._samples(self._places[task], _MOST)

    def _samples(self, context: int, most: int) -> Sequence[Prepared]:
        return self._fleet.samples(context, self._base, SAMPLE_TOKENS, most)


def check_learnable(context: Context, base_model: str | None) -> None:
    """Check what learning a start needs, before hours are spent on what comes first. Reads rows only.

    Raises:
        DataError: There is no task, or fewer than two tasks of a base model have samples.
        BaseModelNotFound: A base model is not on this machine.
    """
    with context.open() as store:
        for label in labels_of(store, base_model):
            tasks = [row.task for row in store.tasks.summaries() if row.task.base_model == label]
            _must_be_enough(label, sum(task.samples is not None for task in tasks))
            locate_base(store, label)


def read_fewshot_start(store: Store, generator: GeneratorRecord, generator_file: GeneratorFile) -> FewShotStart:
    """Read the start that a generator has now; another process may have learned it anew.

    Raises:
        GeneratorError: The file is no start of this generator.
        DamagedStore: Its bytes are not those that were stored.
    """

    def present() -> str:
        rows = store.generators.all(generator.base_model)
        return str(next((row.start for row in rows if row.id == generator.id), generator.start))

    data = with_files(present, store.blobs.read)
    return fewshot_start_from_bytes(data, lambda code: generator_file.codec_of(code).decode(code))


def learn_starts(context: Context, request: StartRequest, stop: StopFlag) -> Generator[Event, None, StartReport]:
    """Learn a start for the generator of each base model.

    Raises:
        DeviceUnavailable: The device is not there; nothing was opened.
        DataError: There is no task or no generator, or fewer than two tasks have samples.
        BaseModelNotFound: A base model is not on this machine.
        GeneratorConflict: Another process made another generator current meanwhile.
        GeneratorError: An episode diverged; the start is as it was.
    """
    device = resolve_device(request.device)
    report = StartReport()
    with context.open() as store:
        for label in labels_of(store, request.base_model):
            generator = store.generators.current(label)
            if generator is None:
                raise DataError(f"there is no generator of {label}", hint="`icm train` makes one")
            base = open_base(store, label, device, gradient_dtype(device), cache=context.cache)
            learned = yield from _learn(store, generator, base, request, stop)
            if learned is None:
                report.stopped = True
                break
            report.learned.append(learned)
            yield learned
            del base  # before the next one is loaded: an accelerator may have no room for two
    return report


def _learn(
    store: Store, generator: GeneratorRecord, base: BaseModel, request: StartRequest, stop: StopFlag
) -> Generator[Event, None, StartLearned | None]:
    """Return what was learned, or None if the user stopped; then nothing is kept."""
    began = time.monotonic()
    generator_file = GeneratorFile(store.blobs.read(generator.blob))
    fleet = StoreEpisodeSource(store, generator, generator_file)
    episodes = _Episodes(fleet, base)
    _must_be_enough(generator.base_model, episodes.tasks())
    yield Progress(0, request.episodes, "averaging the fleet")
    start, codec = _encodable(untrained_fewshot_start(fleet), generator_file)
    code = mean_code(start, codec)
    learned = replace(start, adapter=codec.decode(code))
    losses: list[float] = []
    config = MetaConfig(episodes=request.episodes, seed=request.seed)
    for at, state in meta_train(base, learned, episodes, config):
        learned = state
        losses.append(at.loss)
        yield EpisodeDone(generator.base_model, episodes.name(at.task), at)
        yield Progress(at.number, at.episodes, episodes.name(at.task))
        if stop.requested:
            return None
    return _publish(store, generator, fewshot_start_to_bytes(learned, code), start.tasks, losses, began)


def _must_be_enough(base_model: str, tasks: int) -> None:
    if tasks < _FEWEST:
        fact = f"{counted(tasks, 'task')} of {base_model} with {_FEWEST} samples or more: learning to start takes two"
        raise DataError(fact, hint="`icm ingest PATH --samples FILE` gives a task its samples")


def _encodable(start: FewShotStart, generator_file: GeneratorFile) -> tuple[FewShotStart, Codec]:
    """Return what a generator can encode of a start, under the version that has most of its modules, newest first."""
    shapes = [shape._replace(rank=1) for shape in start.adapter.layout]
    known = [sum(config.covers([shape]) for shape in shapes) for config in generator_file.configs]
    best = max(range(len(known)), key=lambda number: (known[number], number))
    return encodable_part(start, generator_file.configs[best]), generator_file.codec(best)


def _publish(
    store: Store, generator: GeneratorRecord, data: bytes, tasks: int, losses: Sequence[float], began: float
) -> StartLearned:
    blob = store.blobs.put(data)
    store.generators.set_start(generator.id, blob)
    last = losses[len(losses) // 2 :]
    return StartLearned(
        base_model=generator.base_model,
        generator=generator.blob,
        start=blob,
        size=len(data),
        tasks=tasks,
        episodes=len(losses),
        loss=sum(last) / max(len(last), 1),
        seconds=round(time.monotonic() - began, 3),
    )
