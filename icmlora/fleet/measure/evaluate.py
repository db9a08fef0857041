"""Measure the sources of tasks on held-out text: `icm eval`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from icmlora.fleet.context import Context, Shard, use_case
from icmlora.fleet.measure.metric_result import MAX_TOKENS
from icmlora.fleet.measure.report import EvaluateReport, Measurable
from icmlora.fleet.params import Device, Param, ShardOf, Tasks, Workers


@use_case
def evaluate(
    context: Context,
    tasks: Tasks = (),
    *,
    data: Annotated[
        str | Path | None, Param("File with held-out text. Default: the text stored with the task.", "--data FILE")
    ] = None,
    sources: Annotated[
        Sequence[Literal["code", "recalled", "network"]],
        Param("Measure only this source, base model and original. Can be repeated.", "--source"),
    ] = ("code", "recalled"),
    device: Device = "auto",
    max_tokens: Annotated[int, Param("Number of tokens to score in each text.", "--max-tokens N", min=2)] = MAX_TOKENS,
    with_context: Annotated[
        bool, Param("Also measure with the context of each task (see `icm context`).", "--context")
    ] = False,
    again: Annotated[bool, Param("Repeat measurements already made on the same text.")] = False,
    workers: Workers = None,
    shard: ShardOf = None,
) -> EvaluateReport:
    """Measure base model, original, code and other sources on held-out text.

    GAIN is the retained gain: (loss of base - loss of source) / (loss of base - loss of original). Each adapter is
    written to disk and loaded with PEFT before it is measured. Needs the base model. For an evicted original, an
    earlier measurement on the same text is used. With --context, each task with a context has a second row. Its GAIN is
    relative to the gain of the original without the context, and is also shown for the base model.

    Example:
      icm eval shakespeare

    Raises:
        DataError: No task has held-out text, or the text cannot be used.
        BaseModelNotFound: None of the base models is on this machine. Otherwise the report names the missing ones.
    """
    from icmlora.fleet.measure.tasks import evaluate_in  # imports torch, as the next one does
    from icmlora.fleet.resources.workers import check_place

    check_place(device, workers)
    with context.open() as store:
        return evaluate_in(
            context,
            store,
            tasks,
            sources,
            device,
            workers,
            data=None if data is None else Path(data),
            max_tokens=max_tokens,
            with_context=with_context,
            again=again,
            shard=Shard.of(shard),
        )


@use_case
def measurable(context: Context, base_models: Sequence[str], tasks: Sequence[str] = ()) -> Measurable:
    """Return which `tasks` of some `base_models` this machine can measure, and why it cannot measure others."""
    from icmlora.fleet.measure.tasks import measurable_in  # imports torch

    with context.open(read_only=True) as store:
        return measurable_in(store, base_models, tasks)
