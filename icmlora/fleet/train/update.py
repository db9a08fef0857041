"""Add new tasks to a trained generator; earlier tasks are neither read nor changed.

    new tasks ──candidates──▶ the smallest ─┬─ same file: codes of the new tasks
                                            └─ longer file: a new generator, which decodes the codes of all tasks

Either is published in one transaction; until it commits, nothing has changed. The codes made until then are kept in a
training run, and an interrupted update continues from there.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import torch

from icmlora.errors import DataError, GeneratorError
from icmlora.fleet.context import Context, Event, reporting, use_case
from icmlora.fleet.failures import one_of_several
from icmlora.fleet.resources.workers import check_place
from icmlora.fleet.train.candidates import UpdateCandidates
from icmlora.fleet.train.finish import FinishReport, finish
from icmlora.fleet.train.publish import publish, put_files
from icmlora.fleet.train.run import TrainingRun, base_models_with_tasks, run_metrics, usable_source
from icmlora.fleet.train.train import CodeMade
from icmlora.generator.codec.generator_file import GeneratorFile
from icmlora.generator.codec.limits import Limits
from icmlora.generator.config import tolerance_of
from icmlora.io.devices import resolve_device
from registry.filters import Selection
from registry.manifests import CodeLimits, Generator

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
    added: Sequence[str]  # `tuned` for an appended decoder, `fresh` for an appended network
    tasks: Sequence[str]
    codes_size: int
    kept_size: int | None  # bytes of the codes of the earlier networks; None if they cover no new task
    tuned_size: int | None  # bytes of the codes under the tuned decoder and of that decoder; None if none was tuned
    metrics: dict[str, object]
    left_out: Mapping[str, str]
    replaced_bytes: int = 0  # of codes and networks that no code needs any more


@dataclass
class UpdateReport(FinishReport):
    """The results of an update, and of encoding and measuring after it; other base models did not change."""

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
    steps: int | None = None,
    learning_rate: float | None = None,
    seed: int = 0,
    resume: bool = True,
    refine: int | None = None,
    keep: float | None = None,
    max_error: float | None = None,
    evaluate: bool = True,
    workers: str | None = None,
) -> UpdateReport:
    """Encode tasks without a code of the current generator, which grows if that makes the codes smaller.

    Only the new tasks are read. Existing codes decode to the same adapters as before, and their originals may be
    evicted. It takes as long as the new tasks take. Then the new codes are encoded again or refined, and measured, as
    `train` does.

    `device`, `base_model`, `learning_rate`, `seed`, `resume`, `refine`, `keep`, `max_error`, `evaluate` and `workers`
    are as in `train`. `quality` defaults to that of the first training, and `steps` depends on the number of new tasks.

    Raises:
        DataError: The store has no tasks, or a base model has no generator yet.
        GeneratorError: The training diverged; nothing changed.
        OptionsConflict: Limits that do not go together.
    """
    limits = Limits(quality=quality, keep=keep, max_error=max_error, refine=refine)
    check_place(device, workers)
    report, place = UpdateReport(), resolve_device(device)
    candidates_of = partial(
        UpdateCandidates, context, device=place, steps=steps, learning_rate=learning_rate, seed=seed
    )
    with reporting(report), context.open() as store:
        labels = base_models_with_tasks(store, base_model)
        # Those without a generator first: their error is reported now, not after an hour of work for the others.
        for label in sorted(labels, key=lambda label: store.generator(label) is not None):
            with one_of_several(context, report, label, labels):
                with store.job(label):
                    updated, codes = _update_base(context, store, label, place, quality, candidates_of, resume=resume)
                report.updated.append(updated)
                for code in codes:
                    context.on_event(code)
                context.on_event(updated)
        finish(
            context,
            store,
            report,
            [updated.base_model for updated in report.updated if updated.tasks],
            report.tasks,
            limits,
            only=base_model,
            measure=evaluate,
            device=device,
            workers=workers,
        )
    return report


def _update_base(
    context: Context,
    store: Store,
    label: str,
    device: torch.device,
    quality: int | None,
    candidates_of: Callable[..., UpdateCandidates],
    *,
    resume: bool,
) -> tuple[Updated, Sequence[CodeMade]]:
    """Encode the new tasks of one base model, and publish their codes."""
    started = time.monotonic()
    generator = store.generator(label)
    if generator is None:
        hint = f"run `icm train --base-model {label}` to train the first one"
        raise DataError(f"{label} has no generator to add tasks to", hint=hint)
    data = store.blobs.read(generator.blob)
    present = GeneratorFile(data)
    tasks = (task for task in store.tasks(Selection(base_model=label)) if task.code_under(generator) is None)
    source = usable_source(context, store, label, tasks)
    # By default as in the generator's first training.
    tolerance = present.configs[0].tolerance if quality is None else tolerance_of(quality)
    identity: dict[str, object] = {"update": str(generator.blob), "tolerance": tolerance, "fleet": source.digest()}
    run = TrainingRun.open(store, label, identity, resume=resume) if source.names else None
    candidates = candidates_of(store, source, run=run, tolerance=tolerance)
    best = candidates.best(data)
    metrics: dict[str, object] = {
        "steps": candidates.steps,
        "update_seconds": round(time.monotonic() - started, 3),
        **run_metrics(device),
    }
    file, decodes = GeneratorFile(best.data), frozenset[str]()
    if best.data != data:
        if file.digests[: len(present.digests)] != present.digests:
            raise GeneratorError("the generator file does not continue the earlier one")
        (blob,) = put_files(store, [best.data])
        generator = Generator(
            base_model=label,
            blob=blob,
            start=generator.start,  # its mean is a code as others are
            trained_from=str(generator.blob),
            config=json.loads(file.configs[-1].to_json()),
            metrics=metrics,
        )
        decodes = frozenset(present.digests)
    asked, ends_run = CodeLimits(tolerance=tolerance), run is not None
    published = publish(store, source, generator, best.codes, asked, decodes=decodes, ends_run=ends_run)
    left_out = {name: reason for name, reason in candidates.left_out.items() if name not in best.codes}
    updated = Updated(
        base_model=label,
        version=published.generator.version,
        generator=str(generator.blob),
        generator_size=len(best.data),
        epochs=len(file.digests),
        added=candidates.added,
        tasks=list(published.codes),
        codes_size=sum(len(code.data) for code in published.codes.values()),
        kept_size=candidates.kept_size,
        tuned_size=candidates.tuned_size,
        metrics=metrics,
        left_out=left_out | published.left_out,
        replaced_bytes=published.replaced_bytes,
    )
    made = [CodeMade(name, len(code.data), code.squared_error) for name, code in published.codes.items()]
    return updated, made
