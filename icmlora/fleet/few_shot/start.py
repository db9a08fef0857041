"""Meta-train the few-shot start of a generator: the start of `icm generate`, and the length of each of its steps.

    all adapters ──mean──▶ start ──episodes over tasks with samples──▶ lengths of its steps ──▶ few-shot start file

It is recorded in one transaction; until then the generator keeps its earlier few-shot start, if it has one. Codes do
not change.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from icmlora.adapter.model import Adapter
from icmlora.base_models.modality import BaseModel, Prepared
from icmlora.base_models.running.modules import not_matrix
from icmlora.errors import DataError
from icmlora.fewshot.meta_training import MetaConfig, meta_train
from icmlora.fewshot.start import FewShotStart, encodable_part, untrained_fewshot_start
from icmlora.fewshot.start_file import fewshot_start_from_bytes, fewshot_start_to_bytes, mean_code
from icmlora.fleet.context import Context, GeneratorCache
from icmlora.fleet.failures import FAILURES, as_error
from icmlora.fleet.few_shot.generated import SAMPLE_TOKENS
from icmlora.fleet.resources.adapter_source import refuse_large
from icmlora.fleet.resources.decoding import decode_code
from icmlora.fleet.resources.loading import open_base, read_original
from icmlora.fleet.resources.texts import read_samples
from icmlora.fleet.train.report import EpisodeDone, FewShotTrained
from icmlora.generator.codec.codec import Codec
from icmlora.generator.codec.generator_file import GeneratorFile
from icmlora.io.devices import gradient_dtype
from icmlora.io.text import counted
from registry.errors import GeneratorConflict
from registry.filters import Selection
from registry.manifests import File, Generator, StoredAdapter, Task

if TYPE_CHECKING:
    from registry.store import Store

_MIN_SAMPLES = 2  # an episode adapts to one and is judged on another
_MIN_TASKS = 2
_PROBED_SAMPLES, _EPISODE_SAMPLES = 8, 1024  # read of a task: to see whether enough are usable, and in an episode


class StoreEpisodeSource:
    """The tasks of a base model with enough samples; implements `icmlora.fewshot.meta_training.EpisodeSource`.

    Only LoRAs of linear layers and plain convolutions are used: no step reaches anything else. Tasks that cannot be
    read are in `left_out`, with the reason.
    """

    def __init__(self, store: Store, base_model: str, files: GeneratorCache, base: BaseModel) -> None:
        self._store, self._files, self._base = store, files, base
        # A generated task would only confirm the few-shot start that made it.
        plain = (
            task
            for task in store.tasks(Selection(base_model=base_model))
            if not task.final.is_generated and _is_plain(task.final, base)
        )
        self.left_out: dict[str, str] = {}
        self._all = [task for task in plain if self._is_usable(task)]
        self._tasks = [task for task in self._all if len(self._read_samples(task, _PROBED_SAMPLES)) >= _MIN_SAMPLES]
        self._samples: dict[int, Sequence[Prepared]] = {}

    def adapters(self) -> Iterator[Adapter]:
        """Read the adapters of all tasks, also of those without samples, one after the other."""
        return map(self._adapter_of, self._all)

    def tasks(self) -> int:
        """Return the number of tasks with enough samples."""
        return len(self._tasks)

    def name(self, task: int) -> str:
        """Return the name of a task."""
        return self._tasks[task].name

    def load(self, task: int) -> Adapter:
        """Read the original of a task, or decode its code if that is evicted."""
        return self._adapter_of(self._tasks[task])

    def samples(self, task: int) -> Sequence[Prepared]:
        """Read the samples of a task, at most 1,024 of them, spread evenly over its file."""
        if task not in self._samples:  # a chat template of an adapter's own takes seconds
            self._samples[task] = self._read_samples(self._tasks[task], _EPISODE_SAMPLES)
        return self._samples[task]

    def _is_usable(self, task: Task) -> bool:
        try:
            refuse_large(self._adapter_of(task))
        except FAILURES as error:
            self.left_out[task.name] = as_error(error).message
            return False
        return True

    def _adapter_of(self, task: Task) -> Adapter:
        if not task.final.is_evicted:
            return read_original(self._store, task.final)
        if task.code is None:
            fact = f"task {task.name!r} has neither an original nor a code"
            raise DataError(fact, hint="run `icm verify` to check the store for damage")
        file = self._files.get(task.code.generator, self._store.blobs.read)
        return decode_code(self._store, file, task.code)

    def _read_samples(self, task: Task, most: int) -> Sequence[Prepared]:
        try:
            some = read_samples(self._store, task, self._base, most=most)
            return () if some is None else self._base.modality.prepare(self._base, some.items, SAMPLE_TOKENS)
        except FAILURES:
            return ()  # damaged, single letters without a token to predict, or chats that the chat template refuses


def _is_plain(final: StoredAdapter, base: BaseModel) -> bool:
    if final.original_only is not None or any(extra.file is None for extra in final.extras):
        return False
    return not_matrix(base, final.layout) is None


def read_few_shot_start(store: Store, generator: Generator, file: GeneratorFile) -> FewShotStart:
    """Read the few-shot start of a generator that has one."""
    data = store.blobs.read(str(generator.start))
    return fewshot_start_from_bytes(data, lambda code: file.codec_of(code).decode(code))


def train_start(context: Context, store: Store, label: str, config: MetaConfig, device: torch.device) -> FewShotTrained:
    generator = store.generator(label)
    if generator is None:
        raise DataError(f"{label} has no generator", hint="run `icm train` to train one")
    base = open_base(store, label, device, gradient_dtype(device), cache=context.cache)
    began = time.monotonic()
    files = GeneratorCache()
    file = files.get(generator.blob, store.blobs.read)
    source = StoreEpisodeSource(store, label, files, base)
    _refuse_few(label, source.tasks())
    context.progress(0, config.episodes, "averaging the adapters")
    start, codec = _encodable(untrained_fewshot_start(source.adapters()), file)
    code = mean_code(start, codec)
    decoded = replace(start, adapter=codec.decode(code))  # `icm generate` reads the decoded one
    trained, losses = decoded, list[float]()  # only the lengths of its steps are trained
    for at, taught in meta_train(base, decoded, source, config):
        trained = taught
        losses.append(at.loss)
        context.on_event(EpisodeDone(label, source.name(at.task), at))
        context.progress(at.number, at.episodes, source.name(at.task))
    data = fewshot_start_to_bytes(trained, code)
    blob = File(store.blobs.put(data), len(data))
    _record(store, generator, blob)
    last = losses[len(losses) // 2 :]
    return FewShotTrained(
        base_model=label,
        generator=str(generator.blob),
        start=str(blob),
        size=len(data),
        tasks=start.tasks,
        episodes=len(losses),
        loss=sum(last) / max(len(last), 1),
        seconds=round(time.monotonic() - began, 3),
        precision=base.dtype,
        left_out=source.left_out,
    )


def _record(store: Store, generator: Generator, start: File) -> None:
    """Record a few-shot start of the generator that it was trained for, if it is still in use."""

    def change(present: Generator | None) -> Generator:
        if present is None or present.blob != generator.blob:
            fact = "another process replaced the current generator"
            raise GeneratorConflict(fact, hint="run the same command again")
        return replace(present, start=start)

    store.update_generator(generator.base_model, change)


def _refuse_few(base_model: str, tasks: int) -> None:
    if tasks < _MIN_TASKS:
        needed = f"a few-shot start needs {_MIN_TASKS} tasks with {_MIN_SAMPLES} or more samples each"
        hint = "run `icm ingest PATH --samples FILE` to add samples to a task"
        raise DataError(f"{needed}; {base_model} has {counted(tasks, 'such task')}", hint=hint)


def _encodable(start: FewShotStart, file: GeneratorFile) -> tuple[FewShotStart, Codec]:
    """Return the part of a few-shot start that a generator can encode, and the codec that covers most of it."""
    shapes = [shape._replace(rank=1) for shape in start.adapter.layout]
    covered = [sum(config.covers([shape]) for shape in shapes) for config in file.configs]
    best = max(range(len(covered)), key=lambda number: (covered[number], number))  # of equal ones the newest
    return encodable_part(start, file.configs[best]), file.codec(best)
