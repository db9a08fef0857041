"""Train a network step by step; an interrupted run resumes from its checkpoint in the store.

interrupted run (same options, same adapters) ───────┐
current generator ───────────────────────────────────┼──▶ network and optimiser ──steps──▶ trained network
nothing ─────────────────────────────────────────────┘         └── checkpoint: every 20 s, at a stop, at the end
"""

from __future__ import annotations

import base64
import math
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

import torch

from icmlora.base_models.running.channel_statistics import channel_statistics
from icmlora.errors import Cancelled, DataError, GeneratorError, OtherProcessFailed
from icmlora.fleet.context import Context, check_base_model
from icmlora.fleet.failures import FAILURES
from icmlora.fleet.resources.adapter_source import StoreAdapterSource
from icmlora.fleet.resources.loading import open_base
from icmlora.fleet.resources.texts import read_samples
from icmlora.fleet.train.publish import put_files
from icmlora.fleet.train.report import StepDone
from icmlora.generator.codec.encoding import Encoded
from icmlora.generator.config import GeneratorConfig
from icmlora.generator.sensitivity import Sensitivity, sensitivity_of
from icmlora.io.devices import gradient_dtype
from icmlora.training.config import TrainConfig
from icmlora.training.loop import Probe, draws_of, fit
from icmlora.training.ranks import ALONE, Ranks
from icmlora.training.state import TrainState, state_from_bytes
from registry.encoding import packed, unpacked
from registry.errors import DamagedStore
from registry.filters import Selection, parse_filter
from registry.manifests import Run, Task

if TYPE_CHECKING:
    from registry.store import Store

_BATCH_SECONDS = 5.0  # between two batches of codes: storing each code alone would wait for the disk
_CHECKPOINT_SECONDS = 20.0
_MEASUREMENTS = 5  # of the mean code length during a training
# Four times as many take four times as long and give no smaller codes (docs/results/LOG.md).
_STATISTICS_TOKENS = 2048
_STATISTICS_TASKS = 64
_STATISTICS_SAMPLES = 8  # of each task


class TrainingRun:
    """A run in the store: its checkpoint, and the codes that are not published yet. Use it inside the job lock."""

    def __init__(self, store: Store, run: Run) -> None:
        self._store, self._run = store, run

    @classmethod
    def open(cls, store: Store, base_model: str, config: dict[str, object], *, resume: bool) -> TrainingRun:
        """Resume the run of a base model if it has the same configuration; else start one in its place."""
        run = store.run(base_model) if resume else None
        return cls(
            store, run if run is not None and run.config == config else Run(base_model=base_model, config=config)
        )

    def state(self, device: torch.device) -> TrainState | None:
        """Read the checkpoint; None if there is none."""
        run, read = self._run, self._store.blobs.read
        if run.weights is None or run.optimizer is None:
            return None
        return state_from_bytes(read(run.weights), read(run.optimizer), device)

    def save(self, state: TrainState) -> None:
        """Replace the checkpoint."""
        weights, optimizer = put_files(self._store, [state.network_bytes(), state.optimizer_bytes()])
        self._run = self._store.save_run(replace(self._run, step=state.step, weights=weights, optimizer=optimizer))

    def codes(self, generator: str) -> RunCodes:
        """Return the codes that the run made with a generator."""
        return RunCodes(self, generator, self._read(generator))

    def add(self, batch: object) -> None:
        """Save a batch of codes."""
        files = put_files(self._store, [packed(batch)])
        self._run = self._store.save_run(replace(self._run, codes=(*self._run.codes, *files)))

    def _read(self, generator: str) -> dict[_Key, tuple[Encoded, bool]]:
        """Read the codes of a generator; those in damaged batches are made again."""
        found = dict[_Key, tuple[Encoded, bool]]()
        for file in self._run.codes:
            with suppress(DamagedStore):
                batch = unpacked(self._store.blobs.read(file))
                if batch["generator"] == generator:
                    for name, weights, config, error, is_known, code in batch["codes"]:
                        # The weighted error is not needed again.
                        found[name, weights, config] = Encoded(base64.b64decode(code), error, math.nan), is_known
        return found


_Key = tuple[str, str, str]
"""Name of a task, and digests of the weights and the configuration of its final adapter."""


class RunCodes:
    """The codes that a run makes with one generator. They are saved every few seconds, and when the block ends."""

    def __init__(self, run: TrainingRun, generator: str, codes: dict[_Key, tuple[Encoded, bool]]) -> None:
        self._run, self._generator, self._codes = run, generator, codes
        self._unsaved: list[_Key] = []
        self._saved_at = time.monotonic()

    def __enter__(self) -> RunCodes:
        return self

    def __exit__(self, *error: object) -> None:
        self._save()

    def get(self, task: Task) -> tuple[Encoded, bool] | None:
        """Return the code of a task, and whether the seed of its adapter is known; None if there is no code."""
        return self._codes.get(_key(task))

    def add(self, task: Task, code: Encoded, *, seed_is_known: bool) -> None:
        """Keep a new code."""
        self._codes[_key(task)] = code, seed_is_known
        self._unsaved.append(_key(task))
        if time.monotonic() > self._saved_at + _BATCH_SECONDS:
            self._save()

    def _save(self) -> None:
        new = ((key, *self._codes[key]) for key in self._unsaved)
        codes = [
            [*map(str, key), code.squared_error, is_known, base64.b64encode(code.data).decode()]
            for key, code, is_known in new
        ]
        if codes:
            self._run.add({"generator": self._generator, "codes": codes})
        self._unsaved, self._saved_at = [], time.monotonic()


def _key(task: Task) -> _Key:
    return task.name, task.final.weights, task.final.config


def help_train(context: Context, ranks: Ranks, device: torch.device) -> None:
    """Join the runs of rank 0 until there are no more. Call it on the other ranks; nothing is written.

    Raises:
        DataError: The store changed while the training began.
    """
    while work := ranks.share(on_wait=lambda: context.progress(0, None, "waiting for the first process")):
        label, digest, network, optimizer = work
        # Only now: the first process may have waited for the job, while no process may hold the store.
        with context.open(read_only=True) as store:
            source = usable_source(context, store, label.decode())
            if source.digest() != digest.decode():
                raise DataError("the store changed while training started", hint="run the same command again")
            for at in fit(state_from_bytes(network, optimizer, device), source, ranks):
                context.progress(at.step, at.steps)


def usable_source(
    context: Context, store: Store, label: str, tasks: Iterable[Task] | None = None
) -> StoreAdapterSource:
    """Return the tasks of a base model that can be trained on, without those that are damaged or diverged.

    By default all, with their checkpoints.
    """
    if tasks is None:
        source = StoreAdapterSource.of_base(store, label)
    else:
        source = StoreAdapterSource(store, label, tasks, with_checkpoints=False)
    source.leave_out_unusable(lambda done, name: context.progress(done, source.tasks(), f"reading {name}"))
    return source


@dataclass(frozen=True)
class TrainOptions:
    """How a network is trained; None means the default."""

    quality: int | None
    width: int | None
    steps: int | None
    learning_rate: float | None
    seed: int
    resume: bool


def schedule_of(source: StoreAdapterSource, device: torch.device, options: TrainOptions) -> TrainConfig:
    """Choose how a network is trained on some adapters."""
    return TrainConfig.default(
        source.tasks(),
        source.adapters(),
        parameters=source.parameters(),
        steps=options.steps,
        learning_rate=options.learning_rate,
        seed=options.seed,
        stacked=draws_of(device),
    )


def train_network(
    context: Context, source: StoreAdapterSource, state: TrainState, run: TrainingRun, ranks: Ranks = ALONE
) -> dict[str, object]:
    """Train to the last step.

    Returns:
        The mean code length of a few adapters before and after, in bits per parameter, for the metrics of a generator.

    Raises:
        GeneratorError: The training diverged.
    """
    bits: dict[str, object] = {"bits_per_parameter": None, "bits_per_parameter_before": None, "measured_adapters": 0}
    if state.step == state.config.steps:
        return bits
    probe = Probe(state, source)
    saved, before = time.monotonic(), probe.bits()
    after, measured = before, state.step
    try:
        for at in fit(state, source, ranks):
            if not math.isfinite(at.bits):
                raise GeneratorError(f"training diverged at step {at.step}", hint="train again with a lower --lr")
            if at.step == at.steps or at.step - measured >= at.steps / _MEASUREMENTS:
                after, measured = probe.bits(), at.step
            context.on_event(StepDone(source.base_model, source.task(at.task).name, after, at))
            context.progress(at.step, at.steps, f"{after:.3f} bits per parameter")
            if time.monotonic() - saved > _CHECKPOINT_SECONDS:
                run.save(state)
                saved = time.monotonic()
    except (Cancelled, OtherProcessFailed):  # both come between two steps, so the state is whole
        run.save(state)
        raise
    run.save(state)
    return {
        "bits_per_parameter": after,
        "bits_per_parameter_before": before,
        "measured_adapters": probe.count,
    }


def base_models_with_tasks(store: Store, base_model: str | None) -> list[str]:
    """Return the base models that have tasks to train on, or only the given one; raises `DataError` without any."""
    found = sorted(store.task_counts())
    if not found:
        raise DataError("there are no tasks to train on", hint="run `icm ingest PATH` to add adapters")
    if base_model is not None:
        base_model = store.base_name(base_model)
        check_base_model(base_model, found)
        return [base_model]
    encodable = (parse_filter("status!=original-only"),)
    with_codes = [label for label in found if store.count(Selection(base_model=label, filters=encodable))]
    return with_codes or found  # if no task can have a code, training says why


def run_metrics(device: torch.device) -> dict[str, object]:
    """Return where a run took place, and its peak memory in bytes: of the process and, on CUDA, of the device."""
    found: dict[str, object] = {"device": str(device)}
    if sys.platform != "win32":
        import resource

        unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
        found["peak_memory"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    if device.type == "cuda":
        found["device"] = torch.cuda.get_device_name(device)
        found["peak_device_memory"] = torch.cuda.max_memory_allocated(device)
    return {**found, "torch": torch.__version__}


def measured_sensitivity(
    context: Context, store: Store, source: StoreAdapterSource, config: GeneratorConfig, device: torch.device
) -> Sensitivity | None:
    """Measure how strongly the base model reacts to each channel, or return None if it cannot be run for that here.

    It reads the first samples of each task in turn, or neutral ones if no task has any. `icm eval` says why a base
    model cannot be run.
    """
    try:
        base = open_base(store, source.base_model, device, gradient_dtype(device), cache=context.cache)
        firsts: list[Sequence[Any]] = []
        for number in range(min(source.tasks(), _STATISTICS_TASKS)):
            with suppress(*FAILURES):  # its chats do not go with the chat template, or its samples are damaged
                samples = read_samples(store, source.task(number), base)
                firsts.append(() if samples is None else samples.items[:_STATISTICS_SAMPLES])
        examples = [one for row in zip_longest(*firsts) for one in row if one is not None]
        # Kinds of different widths share names, and a name without a layer number means every layer.
        modules = dict.fromkeys(kind.module(layer) for kind in config.kinds for layer in range(config.layers))
        examples = examples or list(base.modality.probes)
        statistics = channel_statistics(base, examples, modules, max_tokens=_STATISTICS_TOKENS)
    except Cancelled:
        raise
    except FAILURES:
        return None
    return sensitivity_of(config, statistics)
