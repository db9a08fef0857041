"""Add new tasks to the generators of a store: `icm train --update`."""

from __future__ import annotations

from icmlora.fleet.context import Context, reporting, use_case
from icmlora.fleet.failures import one_of_several
from icmlora.fleet.params import BaseModelName, Device, Keep, MaxError, Quality, Refine, Workers
from icmlora.fleet.train.report import TrainReport
from icmlora.fleet.train.train import Evaluate, LearningRate, Resume, Seed, Steps


@use_case
def update(
    context: Context,
    *,
    device: Device = "auto",
    quality: Quality = None,
    keep: Keep = None,
    max_error: MaxError = None,
    base_model: BaseModelName = None,
    resume: Resume = True,
    evaluate: Evaluate = True,
    refine: Refine = None,
    workers: Workers = None,
    steps: Steps = None,
    learning_rate: LearningRate = None,
    seed: Seed = 0,
) -> TrainReport:
    """Encode tasks without a code of the current generator, which grows if that makes the codes smaller.

    Only the new tasks are read. Existing codes decode to the same adapters as before, and their originals may be
    evicted. It takes as long as the new tasks take. Then the new codes are encoded again or refined, and measured, as
    `train` does.

    Raises:
        OptionsConflict: The limits contradict each other.
        DataError: The store has no tasks, or a base model has no generator yet.
        GeneratorError: The training diverged; nothing changed.
    """
    from icmlora.fleet.resources.workers import check_place  # imports torch, as those below do
    from icmlora.fleet.train.finish import finish
    from icmlora.fleet.train.growth import update_base
    from icmlora.fleet.train.run import TrainOptions, base_models_with_tasks
    from icmlora.generator.codec.limits import Limits
    from icmlora.io.devices import resolve_device

    limits = Limits(quality=quality, keep=keep, max_error=max_error, refine=refine)
    check_place(device, workers)
    options = TrainOptions(quality, None, steps, learning_rate, seed, resume)
    report, place = TrainReport(), resolve_device(device)
    with reporting(report), context.open() as store:
        labels = base_models_with_tasks(store, base_model)
        # Those without a generator first: their error is reported now, not after an hour of work for the others.
        for label in sorted(labels, key=lambda label: store.generator(label) is not None):
            with one_of_several(context, report.failed_bases, label, labels):
                with store.job(label):
                    updated, codes = update_base(context, store, label, place, options)
                report.done.append(updated)
                for code in codes:
                    context.on_event(code)
                context.on_event(updated)
        finish(
            context,
            store,
            report,
            report.tasks,
            limits,
            only=base_model,
            measure=evaluate,
            device=device,
            workers=workers,
        )
    return report
