"""Train a network step by step, with a checkpoint in the store from which a stopped run resumes.

run that was stopped (same options, same adapters) ──┐
current generator ───────────────────────────────────┼──▶ network and optimiser ──steps──▶ trained network
nothing ─────────────────────────────────────────────┘         └── checkpoint: every 20 s, at a stop, at the end
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import zip_longest
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from icmlora.base_models.modality import BaseModel
from icmlora.base_models.running.channel_statistics import channel_statistics
from icmlora.errors import Cancelled, DataError, GeneratorError, OtherProcessFailed
from icmlora.fleet.context import Context, Event, base_name, check_base_model
from icmlora.fleet.failures import FAILURES
from icmlora.fleet.resources.adapter_source import StoreAdapterSource
from icmlora.fleet.resources.loading import open_base
from icmlora.fleet.resources.texts import read_samples
from icmlora.generator.config import GeneratorConfig, config_for
from icmlora.generator.sensitivity import Sensitivity, sensitivity_of
from icmlora.io.devices import gradient_dtype
from icmlora.training.config import DEFAULT_QUALITY, TrainConfig
from icmlora.training.initialisation import fresh_network, grown_network
from icmlora.training.loop import Probe, TrainStep, draws_of, fit
from icmlora.training.ranks import ALONE, Ranks
from icmlora.training.state import TrainState, new_state, state_from_bytes
from registry.records import AdapterRecord, RunCode, TrainRunRecord

if TYPE_CHECKING:
    from icmlora.generator.cvae import CVAE
    from icmlora.generator.encoding import Encoded
    from registry.store import Store

SAVED_AFTER = 5.0  # seconds: codes made since then wait in memory, because storing each alone would wait for the disk
_CHECKPOINT_SECONDS = 20.0
_MEASUREMENTS = 5  # of the mean code length during a training
# Four times as many take four times as long and give no smaller codes (docs/results/LOG.md).
_STATISTICS_TOKENS = 2048
_STATISTICS_TASKS = 64
_STATISTICS_SAMPLES = 8  # of each task


@dataclass(frozen=True)
class StepDone(Event):
    """One optimiser step is done; `at` has the loss in bits per parameter of the adapter that this step drew."""

    base_model: str
    task: str
    mean_bits: float  # per parameter: the latest measurement of a few adapters, which are the same at every step
    at: TrainStep


class RunCodes:
    """The codes that a run has made and not published yet: a stop does not lose them."""

    def __init__(self, store: Store, row: TrainRunRecord) -> None:
        self._store, self.id = store, row.id

    def codes(self, generator: str) -> dict[int, RunCode]:
        """Return the codes that an earlier try has made under this generator file, by the row of the adapter."""
        return {code.adapter: code for code in self._store.runs.codes(self.id, generator)}

    def save_codes(self, generator: str, codes: Sequence[tuple[AdapterRecord, Encoded, bool]]) -> dict[int, RunCode]:
        """Store codes; each comes with its adapter and whether its seed is known."""
        if not codes:
            return {}
        blobs = self._store.blobs.put_all([code.data for _, code, _ in codes])
        made = [
            RunCode(adapter.id, blob, len(code.data), generator, code.squared_error, known)
            for (adapter, code, known), blob in zip(codes, blobs, strict=True)
        ]
        self._store.runs.save_codes(self.id, made)
        return {code.adapter: code for code in made}


class TrainingRun(RunCodes):
    """A network in training, with the row of the store that its checkpoint belongs to."""

    def __init__(self, store: Store, state: TrainState, row: TrainRunRecord) -> None:
        super().__init__(store, row)
        self.state = state

    def save(self) -> None:
        """Replace the run's checkpoint by one of the present step."""
        network, optimizer = self.state.network_bytes(), self.state.optimizer_bytes()
        self._store.runs.save_checkpoint(self.id, step=self.state.step, weights=network, optimizer=optimizer)


def open_run(
    context: Context,
    store: Store,
    source: StoreAdapterSource,
    device: torch.device,
    network: CVAE | None,
    config: GeneratorConfig,
    options: TrainConfig,
    *,
    parent: str | None,
    resume: bool,
) -> TrainingRun:
    """Resume the run that was stopped if it is the same one, else start a new one. Call it inside the job lock.

    `network` is the current one to start from, None to start from scratch, and `parent` the digest of its file.
    """
    identity: dict[str, object] = {
        "generator": json.loads(config.to_json()),
        "train": json.loads(options.to_json()),
        "fleet": source.digest(),
        "parent": parent,
    }
    stopped = store.runs.running(source.base_model) if resume else None
    if stopped is not None and stopped.config == identity and stopped.weights and stopped.optimizer:
        weights, optimizer = store.blobs.read(stopped.weights), store.blobs.read(stopped.optimizer)
        return TrainingRun(store, state_from_bytes(weights, optimizer, device), stopped)
    sensitivity = None
    if network is None or (network.config.kinds, network.config.layers) != (config.kinds, config.layers):
        sensitivity = measured_sensitivity(context, store, source, config, device)
    if network is None:
        network = fresh_network(config, source, options.seed, sensitivity)
    else:
        network = grown_network(config, network, source, options.seed, sensitivity)
    return TrainingRun(store, new_state(network.to(device), options), store.runs.start(source.base_model, identity))


def share_run(run: TrainingRun, source: StoreAdapterSource, ranks: Ranks) -> None:
    """Give the other ranks what they need to take part in a run. Call it on rank 0."""
    if ranks.count > 1:
        fleet = source.base_model.encode(), source.digest().encode()
        ranks.share([*fleet, run.state.network_bytes(), run.state.optimizer_bytes()])


def help_train(context: Context, ranks: Ranks, device: torch.device) -> None:
    """Take part in the runs of rank 0 until it has no more. Call it on the other ranks; nothing is written.

    Raises:
        DataError: The store changed while the training began.
    """
    while work := ranks.share(on_wait=lambda: context.progress(0, None, "waiting for the first process")):
        label, digest, network, optimizer = work
        # Only now: the first process may have waited for the job, and nobody may hold the store meanwhile.
        with context.open(read_only=True) as store:
            source = usable_source(context, store, label.decode())
            if source.digest() != digest.decode():
                raise DataError("the store changed while training started", hint="run the same command again")
            for at in fit(state_from_bytes(network, optimizer, device), source, ranks):
                context.progress(at.step, at.steps)


def usable_source(
    context: Context, store: Store, label: str, names: Collection[str] | None = None
) -> StoreAdapterSource:
    """Return the tasks of a base model that can be trained on, without those that are damaged or diverged."""
    source = StoreAdapterSource(store, label, names)
    source.leave_out_unusable(lambda done, name: context.progress(done, source.tasks(), f"reading {name}"))
    return source


def options_of(
    source: StoreAdapterSource, device: torch.device, *, steps: int | None, learning_rate: float | None, seed: int
) -> TrainConfig:
    """Choose how a network is trained on some adapters; None stands for the default."""
    return TrainConfig.default(
        source.tasks(),
        source.adapters(),
        parameters=source.parameters(),
        steps=steps,
        learning_rate=learning_rate,
        seed=seed,
        stacked=draws_of(device),
    )


class Fitted(NamedTuple):
    """Mean code length of the same adapters before and after a training, in bits per parameter."""

    before: float
    after: float
    adapters: int


def train_network(
    context: Context,
    source: StoreAdapterSource,
    state: TrainState,
    save: Callable[[], None] | None = None,
    ranks: Ranks = ALONE,
) -> Fitted | None:
    """Train to the last step; return None if no step was left.

    Raises:
        GeneratorError: The training diverged.
    """
    if state.step == state.config.steps:
        return None
    probe = Probe(state, source)
    saved, before = time.monotonic(), probe.bits()
    after, measured = before, state.step
    try:
        for at in fit(state, source, ranks):
            if not math.isfinite(at.bits):
                raise GeneratorError(f"training diverged at step {at.step}", hint="train again with a lower --lr")
            if at.step == at.steps or at.step - measured >= at.steps / _MEASUREMENTS:
                after, measured = probe.bits(), at.step
            context.on_event(StepDone(source.base_model, source.final(at.task).task, after, at))
            context.progress(at.step, at.steps, f"{after:.3f} bits per parameter")
            if save is not None and time.monotonic() - saved > _CHECKPOINT_SECONDS:
                save()
                saved = time.monotonic()
    except (Cancelled, OtherProcessFailed):  # both come between two steps, so the state is whole
        if save is not None:
            save()
        raise
    if save is not None:
        save()
    return Fitted(before, after, probe.count)


def base_models_with_tasks(store: Store, base_model: str | None) -> list[str]:
    """Return the base models that have tasks to train on, or only the given one; raises `DataError` without any."""
    base_model = base_name(store, base_model)
    rows = [(row.task.base_model, row.final.original_only is None) for row in store.tasks.summaries()]
    found = sorted({label for label, _ in rows})
    if not found:
        raise DataError("there are no tasks to train on", hint="run `icm ingest PATH` to add adapters")
    if base_model is None:
        # If no task can have a code, training says why.
        return sorted({label for label, can_have_code in rows if can_have_code}) or found
    check_base_model(base_model, found)
    return [base_model]


def run_metrics(device: torch.device) -> dict[str, object]:
    """Return where a run took place, and its peak memory in bytes: of the process and, on CUDA, of the device."""
    peak = _peak_memory()
    if device.type == "cuda":
        peak["peak_device_memory"] = torch.cuda.max_memory_allocated(device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    return {"device": name, **peak, "torch": torch.__version__}


def _peak_memory() -> dict[str, int]:
    if sys.platform == "win32":  # which does not tell this way
        return {}
    import resource

    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
    return {"peak_memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}


def measured_sensitivity(
    context: Context, store: Store, source: StoreAdapterSource, config: GeneratorConfig, device: torch.device
) -> Sensitivity | None:
    """Measure how strongly the base model reacts to each channel, or return None if it cannot be run for that here.

    Why it cannot is for `icm eval` to say, which runs each task.
    """
    try:
        base = open_base(store, source.base_model, device, gradient_dtype(device), cache=context.cache)
        # Kinds of different widths share names, and a name without a layer number is that of every layer.
        modules = dict.fromkeys(kind.module(layer) for kind in config.kinds for layer in range(config.layers))
        statistics = channel_statistics(
            base, _examples(store, source.names, base), modules, max_tokens=_STATISTICS_TOKENS
        )
    except Cancelled:
        raise
    except FAILURES:
        return None
    return sensitivity_of(config, statistics)


def _examples(store: Store, names: Sequence[str], base: BaseModel) -> list[Any]:
    """Return the first samples of each task in turn, or neutral ones if no task has any."""
    firsts: list[Sequence[Any]] = []
    for name in names[:_STATISTICS_TASKS]:
        with suppress(*FAILURES):  # its chats do not go with the chat template, or its samples are damaged
            samples = read_samples(store, store.tasks.get(name), base)
            firsts.append(() if samples is None else samples.items[:_STATISTICS_SAMPLES])
    return [one for row in zip_longest(*firsts) for one in row if one is not None] or list(base.modality.probes)


def wanted_config(
    source: StoreAdapterSource,
    network: CVAE | None,
    tolerance_before: float | None,
    *,
    quality: int | None,
    tolerance: float | None,
    width: int | None,
) -> GeneratorConfig:
    """Choose the network of a generator; None stands for what the current one has, or for the default.

    `network` is that of the current one if training starts from it, `tolerance_before` what it was trained with.

    Raises:
        DataError: The current one has another width.
    """
    previous = None if network is None else network.config
    if previous is not None:
        if width not in (None, previous.width):
            fact = f"the current generator has width {previous.width}, and training from it cannot change the width"
            raise DataError(fact, hint="run `icm train --fresh` to train from scratch with any width")
        tolerance_before = previous.tolerance
    if tolerance is None and quality is None:
        tolerance = tolerance_before
    return config_for(
        source.base_model,
        source.layouts(),
        tasks=source.tasks(),
        condition_size=source.condition_size(),
        quality=DEFAULT_QUALITY if quality is None else quality,
        tolerance=tolerance,
        width=width,
        previous=previous,
    )
