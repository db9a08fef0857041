"""Where a training begins: the run that was stopped, the present generator, or nothing."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import TYPE_CHECKING

import torch

from icm_cli.workflows.base_access import open_base
from icm_cli.workflows.chosen import sample_texts
from icm_cli.workflows.rereading import with_files
from icm_cli.workflows.store_fleet import StoreFleet
from icmlora.channel_statistics import channel_statistics
from icmlora.errors import BaseModelNotFound, DataError
from icmlora.generator.config import GeneratorConfig, config_for
from icmlora.generator.lineage import Lineage
from icmlora.generator.sensitivity import Sensitivity, sensitivity_of
from icmlora.layout import ModuleShape
from icmlora.probes import PROBES
from icmlora.training.config import TrainConfig, steps_for
from icmlora.training.start import fresh_network, grown_network
from icmlora.training.state import TrainState, new_state, state_from_bytes
from registry.records import GeneratorRecord, TrainRunRecord

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
    store: Store, fleet: StoreFleet, request: TrainRequest, device: torch.device, previous: GeneratorRecord | None
) -> tuple[TrainState, TrainRunRecord]:
    """Go on with the run that was stopped if it is the same one, else start a new one.

    Args:
        store: The open store.
        fleet: What to train on.
        request: What was asked for.
        device: Where to train.
        previous: The generator to start from, if any.

    Raises:
        DataError: A width that the present generator does not have.
    """
    # The first epoch is the one that was trained on a whole fleet; later ones suit the tasks they were made for.
    present = None if previous is None else Lineage(store.read_blob(previous.blob)).codec(0).generator.net
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
    sensitivity = measured_sensitivity(store, fleet, config, None if present is None else present.config, device)
    if present is None:
        net = fresh_network(config, fleet, request.seed, sensitivity)
    else:
        net = grown_network(config, present, fleet, request.seed, sensitivity)
    return new_state(net.to(device), options), store.start_train_run(fleet.base_model, identity)


def _stopped(
    store: Store, label: str, identity: Mapping[str, object], device: torch.device
) -> tuple[TrainState, TrainRunRecord] | None:
    """Read the checkpoint of a run that was stopped and is the same one; another train may go on with it just now."""

    def read(running: TrainRunRecord | None) -> tuple[TrainState, TrainRunRecord] | None:
        if running is None or running.config != identity or not (running.weights and running.optimizer):
            return None
        weights, optimizer = store.read_blob(running.weights), store.read_blob(running.optimizer)
        return state_from_bytes(weights, optimizer, device), running

    return with_files(lambda: store.running_train_run(label), read)


def measured_sensitivity(
    store: Store, fleet: StoreFleet, config: GeneratorConfig, present: GeneratorConfig | None, device: torch.device
) -> Sensitivity | None:
    """Measure the channels of the base model where they are not known yet and it is on this machine."""
    if present is not None and (present.kinds, present.layers) == (config.kinds, config.layers):
        return None
    try:
        base = open_base(store, fleet.base_model, device)
    except BaseModelNotFound:
        return None
    modules = [kind.module(layer) for kind in config.kinds for layer in range(config.layers)]
    statistics = channel_statistics(base, _texts(store, fleet.names), modules, max_tokens=_STATISTICS_TOKENS)
    return sensitivity_of(config, statistics)


def _texts(store: Store, names: Sequence[str]) -> list[str]:
    """Return the first samples of each task in turn, or neutral texts where no task has any."""
    samples = (sample_texts(store, store.task(name)) for name in names[:_STATISTICS_TASKS])
    texts = (some[:_SAMPLES_EACH] for some in samples if some is not None)
    return [text for row in zip_longest(*texts) for text in row if text is not None] or list(PROBES)


def _config(fleet: StoreFleet, request: TrainRequest, previous: GeneratorConfig | None) -> GeneratorConfig:
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
