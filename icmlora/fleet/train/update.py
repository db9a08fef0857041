"""Add new tasks to a trained generator; earlier tasks are neither read nor changed.

    new tasks ──candidates──▶ the smallest ─┬─ same file: codes of the new tasks
                                            └─ longer file: a new generator with the codes of all tasks, current

Either way it is one transaction; until it commits, nothing has changed. The codes that are made until then are kept in
a training run. The same update continues from there if it is stopped.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import torch

from icmlora.errors import DataError
from icmlora.fleet.context import Context, Event, reporting, use_case
from icmlora.fleet.failures import one_of_several
from icmlora.fleet.resources.adapter_source import StoreAdapterSource
from icmlora.fleet.resources.workers import check_place
from icmlora.fleet.train.candidates import Candidate, UpdateCandidates
from icmlora.fleet.train.finish import FinishReport, check_finish, finish
from icmlora.fleet.train.run import base_models_with_tasks, run_metrics, usable_source
from icmlora.fleet.train.train import REPLACED, CodeMade
from icmlora.generator.config import tolerance_of
from icmlora.generator.limits import Limits
from icmlora.generator.versions import GeneratorFile
from icmlora.io.devices import resolve_device
from registry.records import CodeLimits, GeneratorRecord, NewCode, NewGenerator, TrainRunRecord

if TYPE_CHECKING:
    from registry.store import Store


@dataclass(frozen=True)
class Updated(Event):
    """The new tasks of a base model have codes."""

    base_model: str
    version: int
    generator: str
    generator_size: int
    epochs: int
    added: Sequence[str]  # what was appended to it: `tuned` for a tuned decoder, `fresh` for a new network
    tasks: Sequence[str]
    codes_size: int
    kept_size: int | None  # bytes of the codes that the networks of before make; None if they cover no new task
    tuned_size: int | None  # bytes of the codes under the tuned decoder and of that decoder; None if none was tuned
    metrics: dict[str, object]
    left_out: Mapping[str, str]


@dataclass
class UpdateReport(FinishReport):
    """What an update did, and what was done with the new codes; base models that are not listed did not change."""

    updated: list[Updated] = field(default_factory=list)

    @property
    def tasks(self) -> list[str]:
        """All tasks that got a code."""
        return [name for one in self.updated for name in one.tasks]

    @property
    def is_partial(self) -> bool:
        """Whether something was left out, at any stage."""
        return super().is_partial or any(one.left_out for one in self.updated)


@use_case
def update(
    context: Context,
    *,
    device: str = "auto",
    base_model: str | None = None,
    quality: int | None = None,
    tolerance: float | None = None,
    steps: int | None = None,
    learning_rate: float | None = None,
    seed: int = 0,
    resume: bool = True,
    refine: int | None = None,
    keep: float | None = None,
    min_gain: float | None = None,
    max_error: float | None = None,
    evaluate: bool = True,
    workers: str | None = None,
) -> UpdateReport:
    """Store codes for the tasks that have none, and let the generator grow if that makes them smaller.

    Only the new tasks are read. Existing codes decode to the same adapters as before, and their originals may be
    evicted. It takes as long as the new tasks take. Then the new codes are encoded again or refined, and measured, as
    `train` does.

    `device`, `base_model`, `learning_rate`, `seed`, `resume`, `refine`, `keep`, `min_gain`, `max_error`, `evaluate` and
    `workers` are as in `train`. `quality` and `tolerance` default to the first training's values, and `steps` depends
    on the number of new tasks.

    Raises:
        DataError: The store has no tasks, or a base model has no generator yet.
        GeneratorError: The training diverged; nothing changed.
        GeneratorConflict: Another generator became current in the meantime; nothing changed.
        OptionsConflict: Limits that do not go together.
    """
    limits = Limits(quality, min_gain, max_error, tolerance, refine=refine, keep=keep)
    check_finish(limits)
    check_place(device, workers)
    report, place = UpdateReport(), resolve_device(device)
    candidates_of = partial(
        UpdateCandidates, context, device=place, steps=steps, learning_rate=learning_rate, seed=seed
    )
    with reporting(report):
        with context.open() as store:
            labels = base_models_with_tasks(store, base_model)
            # Those without a generator first: that is told now, not after an hour of work for the others.
            for label in sorted(labels, key=lambda label: store.generators.current(label) is not None):
                with one_of_several(context, report, label, labels):
                    with store.job(label):
                        updated, codes = _update_base(
                            context, store, label, place, quality, tolerance, candidates_of, resume=resume
                        )
                    report.updated.append(updated)
                    for code in codes:
                        context.on_event(code)
                    context.on_event(updated)
        tasks, done = report.tasks, [updated.base_model for updated in report.updated if updated.tasks]
        finish(context, report, done, tasks, limits, only=base_model, measure=evaluate, device=device, workers=workers)
    return report


def _update_base(
    context: Context,
    store: Store,
    label: str,
    device: torch.device,
    quality: int | None,
    tolerance: float | None,
    candidates_of: Callable[..., UpdateCandidates],
    *,
    resume: bool,
) -> tuple[Updated, Sequence[CodeMade]]:
    """Encode the new tasks of one base model, and make their codes current."""
    started = time.monotonic()
    generator = store.generators.current(label)
    if generator is None:
        hint = f"run `icm train --base-model {label}` to train the first one"
        raise DataError(f"{label} has no generator to add tasks to", hint=hint)
    data = store.blobs.read(generator.blob)
    present = GeneratorFile(data)
    new = [row.task.name for row in store.tasks.summaries() if row.task.base_model == label and row.code is None]
    source = usable_source(context, store, label, new)
    if tolerance is None:  # that of the generator's first training
        tolerance = present.configs[0].tolerance if quality is None else tolerance_of(quality)
    run = _open_run(store, source, generator, tolerance, resume=resume)
    run_id = None if run is None else run.id
    candidates = candidates_of(store, source, run=run, tolerance=tolerance)
    best = candidates.best(data)
    metrics: dict[str, object] = {
        "steps": candidates.steps,
        "update_seconds": round(time.monotonic() - started, 3),
        **run_metrics(device),
    }
    codes = _new_codes(store, source, best, tolerance)
    file = GeneratorFile(best.data)
    if best.data == data:
        recorded = store.codes.add(generator.id, codes, run_id)
    else:
        config, blob = json.loads(file.configs[-1].to_json()), store.blobs.put(best.data)
        grown = NewGenerator(label, blob, config, metrics, generator.id, codes, run_id)
        generator = store.generators.extend(grown)
        recorded = [code for code in store.codes.all(generator.id) if code.task in best.codes]
    left_out = {name: reason for name, reason in candidates.left_out.items() if name not in best.codes}
    left_out |= dict.fromkeys(sorted(set(best.codes) - {code.task for code in recorded}), REPLACED)
    updated = Updated(
        base_model=label,
        version=generator.version,
        generator=generator.blob,
        generator_size=len(best.data),
        epochs=len(file.digests),
        added=candidates.added,
        tasks=[code.task for code in recorded],
        codes_size=sum(code.size for code in recorded),
        kept_size=candidates.kept_size,
        tuned_size=candidates.tuned_size,
        metrics=metrics,
        left_out=left_out,
    )
    encoded = [(code.task, best.codes[code.task]) for code in recorded]
    return updated, [CodeMade(name, len(code.data), code.squared_error) for name, code in encoded]


def _open_run(
    store: Store, source: StoreAdapterSource, generator: GeneratorRecord, tolerance: float, *, resume: bool
) -> TrainRunRecord | None:
    """Resume the update that was stopped if it is the same one, else start a new one; return None without tasks."""
    if not source.names:
        return None
    identity: dict[str, object] = {"update": generator.blob, "tolerance": tolerance, "fleet": source.digest()}
    stopped = store.runs.running(source.base_model) if resume else None
    if stopped is not None and stopped.config == identity:
        return stopped
    return store.runs.start(source.base_model, identity)


def _new_codes(store: Store, source: StoreAdapterSource, best: Candidate, tolerance: float) -> list[NewCode]:
    """Store the files of codes, and return the rows that are to be recorded."""
    adapters = {name: source.final(task) for task, name in enumerate(source.names)}
    blobs = store.blobs.put_all([code.data for code in best.codes.values()])
    asked = CodeLimits(tolerance=tolerance)
    return [
        NewCode(adapters[name], blob, 8.0 * len(code.data), code.squared_error, asked)
        for (name, code), blob in zip(best.codes.items(), blobs, strict=True)
    ]
