"""Train the generators of a store: `icm train`."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Annotated

from icmlora.fleet.context import Context, reporting, use_case
from icmlora.fleet.failures import one_of_several
from icmlora.fleet.params import BaseModelName, Device, Keep, MaxError, Param, Quality, Refine, Workers
from icmlora.fleet.train.report import TrainReport
from icmlora.training import config
from icmlora.training.ranks import joined

_MODEL = "Model"

Seed = Annotated[int, Param("Seed for all random numbers.", "--seed N", _MODEL)]
Resume = Annotated[bool, Param("Resume an interrupted training.", "--resume/--no-resume")]
Evaluate = Annotated[
    bool, Param("Evaluate the codes afterwards, if the base model is on this machine.", "--eval/--no-eval")
]
Steps = Annotated[
    int | None,
    Param(
        f"Training steps. Default: {config.SMALL_STEPS_PER_TASK} per task, at least {config.MIN_SMALL_STEPS}; "
        f"with {config.SMALL_FLEET} tasks or more, {config.STEPS_PER_ADAPTER} per adapter, "
        f"{config.MIN_STEPS:,} to {config.MAX_STEPS:,}, and fewer for very small adapters.",
        "--steps N",
        _MODEL,
        min=1,
    ),
]
LearningRate = Annotated[
    float | None,
    Param(
        f"Peak learning rate. Default: {config.RATE:g}; {config.SMALL_RATE:g} for fewer than {config.SMALL_FLEET} "
        "tasks without --steps.",
        "--lr X",
        _MODEL,
        min=1e-6,
        max=1.0,
    ),
]


@use_case
def train(
    context: Context,
    *,
    device: Device = "auto",
    quality: Quality = None,
    keep: Keep = None,
    max_error: MaxError = None,
    base_model: BaseModelName = None,
    resume: Resume = True,
    fresh: Annotated[bool, Param("Train a new generator from scratch.")] = False,
    evaluate: Evaluate = True,
    refine: Refine = None,
    workers: Workers = None,
    steps: Steps = None,
    learning_rate: LearningRate = None,
    width: Annotated[
        int | None,
        Param(
            "Hidden width of a new decoder. Default: chosen by the number of tasks.",
            "--width N",
            _MODEL,
            min=4,
            max=4096,
        ),
    ] = None,
    seed: Seed = 0,
) -> TrainReport:
    """Train a generator per base model, encode every task and evaluate the codes.

    Run the same command again to resume an interrupted training. If a generator exists, training continues from it and
    encodes every task again. Evicted tasks keep their codes and the earlier generator that decodes them.

    After adding tasks, use --update. It encodes only the new tasks, needs no other originals and leaves existing codes
    unchanged.

    To train on several GPUs or machines, start icm with torchrun.

    `icm generate` needs a few-shot start as well: train it afterwards with --few-shot.

    Example:
      icm train --device cuda
      icm train --few-shot --device cuda
      torchrun --nproc-per-node 4 $(command -v icm) train --device cuda

    Raises:
        OptionsConflict: The limits contradict each other.
        DataError: There is nothing to train on.
        GeneratorError: The training diverged, or no task could be encoded.
    """
    from icmlora.fleet.resources.workers import check_place  # imports torch, as those below do
    from icmlora.fleet.train.finish import finish
    from icmlora.fleet.train.generator import train_base
    from icmlora.fleet.train.run import TrainOptions, base_models_with_tasks, help_train
    from icmlora.generator.codec.limits import Limits

    limits = Limits(quality=quality, keep=keep, max_error=max_error, refine=refine)
    if workers is not None:  # a typing error is reported now, not after hours
        check_place(device, workers)
    options = TrainOptions(quality, width, steps, learning_rate, seed, resume)
    report = TrainReport()
    with reporting(report), ExitStack() as opened:
        # The others of the launcher's processes train with this one; it writes to the store, encodes and measures.
        with joined() as ranks:
            place = ranks.device(device)
            if not ranks.is_first:
                help_train(context, ranks, place)
                return report
            store = opened.enter_context(context.open())
            labels = base_models_with_tasks(store, base_model)
            for label in labels:
                with one_of_several(context, report.failed_bases, label, labels if ranks.count == 1 else [label]):
                    with store.job(label):
                        previous = None if fresh else store.generator(label)
                        report.done.append(train_base(context, store, label, place, ranks, report, previous, options))
                    context.on_event(report.done[-1])
            ranks.share()  # nothing: the others may leave
        finish(context, store, report, (), limits, only=base_model, measure=evaluate, device=device, workers=workers)
    return report
