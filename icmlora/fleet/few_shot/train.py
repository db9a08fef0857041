"""Train the few-shot starts that `icm generate` needs: `icm train --few-shot`."""

from __future__ import annotations

from typing import Annotated

from icmlora.fleet.context import Context, reporting, use_case
from icmlora.fleet.failures import one_of_several
from icmlora.fleet.params import RARE, BaseModelName, Device, Param
from icmlora.fleet.train.report import TrainReport
from icmlora.fleet.train.train import Seed

EPISODES = 48
Episodes = Annotated[
    int | None,
    Param(
        f"Training episodes of the few-shot start. In each, one task is treated as new. Default: {EPISODES}.",
        "--episodes N",
        RARE,
        min=1,
    ),
]


@use_case
def train_few_shot(
    context: Context,
    *,
    device: Device = "auto",
    base_model: BaseModelName = None,
    episodes: Episodes = None,
    seed: Seed = 0,
) -> TrainReport:
    """Meta-train the few-shot start that `generate` needs; generators and codes do not change.

    Raises:
        DataError: A base model has no generator, or fewer than two tasks with samples.
        BaseModelNotFound: A base model is not on this machine.
        GeneratorError: The training diverged; nothing changed.
    """
    from icmlora.fewshot.meta_training import MetaConfig  # imports torch, as those below do
    from icmlora.fleet.few_shot.start import train_start
    from icmlora.fleet.train.run import base_models_with_tasks
    from icmlora.io.devices import resolve_device

    chosen = resolve_device(device)
    config = MetaConfig(episodes=EPISODES if episodes is None else episodes, seed=seed)
    report = TrainReport()
    with reporting(report), context.open() as store:
        labels = base_models_with_tasks(store, base_model)
        for label in labels:
            with one_of_several(context, report.failed_bases, label, labels):
                with store.job(label):
                    report.done.append(train_start(context, store, label, config, chosen))
                context.on_event(report.done[-1])
    return report
