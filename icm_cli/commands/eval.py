"""`icm eval`: measure the sources of tasks on held-out text."""

from __future__ import annotations

from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from icm_cli.eval_report import MEASURE_REST, measured, sum_up, tell_measured
from icm_cli.options import DeviceOpt, ShardOpt, SomeTasksArg, WorkersOpt, option
from icm_cli.session import Session, command, end
from icmlora.fleet.measure.metric_result import MAX_TOKENS

if TYPE_CHECKING:
    from icmlora.fleet.context import Context
    from icmlora.fleet.measure.evaluate import EvaluateReport


class SourceName(StrEnum):
    """A source that can be measured; base model and original always are. Typer repeats no `Literal`."""

    RESIDUAL = "residual"
    CODE = "code"
    RECALLED = "recalled"
    GENERATE = "generate"  # what RECALLED was called before
    NETWORK = "network"


DataOpt = Annotated[Path | None, option("--data FILE", "File with held-out text. Default: the task's own.")]
SourceOpt = Annotated[
    list[SourceName] | None,
    option("--source", "Measure only this source, with base model and original. Can be repeated."),
]
OldSourceOpt = Annotated[list[SourceName] | None, option("--rung", "As --source.", hidden=True)]
TokensOpt = Annotated[int, option("--max-tokens N", "Tokens to score in each text.", min=2)]
ContextOpt = Annotated[bool, option("--context", "Measure also behind the tasks' contexts; see `icm context`.")]
AgainOpt = Annotated[bool, option("--again", "Measure again what was measured on the same text before.")]


@command
def evaluate(
    session: Session,
    tasks: SomeTasksArg = None,
    data: DataOpt = None,
    source: SourceOpt = None,
    device: DeviceOpt = None,
    max_tokens: TokensOpt = MAX_TOKENS,
    context: ContextOpt = False,
    again: AgainOpt = False,
    workers: WorkersOpt = None,
    shard: ShardOpt = None,
    rung: OldSourceOpt = None,
) -> None:
    """Measure how good the base model, original, residual, code and generated adapter are on held-out examples.

    GAIN is the retained gain: (loss of base - loss of source) / (loss of base - loss of original). Each adapter is
    written to disk and loaded with PEFT before it is measured. Needs the base model. For an evicted original, icm uses
    what it measured before on the same text. With --context, a second row of each task that has one: there, GAIN is a
    share of what the original gains without it, also for the base model.

    Example:
      icm eval shakespeare
    """
    from icmlora.fleet.measure.evaluate import evaluate

    if rung:
        session.out.note("`--rung` goes with the next version: use --source")

    def work(of: Context) -> EvaluateReport:
        return evaluate(
            of,
            tasks or (),
            sources=[name.value for name in (*(source or ()), *(rung or ()))] or ("residual", "code", "recalled"),
            data=data,
            max_tokens=max_tokens,
            with_context=context,
            device=session.device(device),
            again=again,
            workers=workers,
            shard=shard,
        )

    report, stopped = session.run("eval", work, partial(tell_measured, session))
    sum_up(session, report)
    if report.tasks and max_tokens != MAX_TOKENS:
        usual = f"`icm eval` without --max-tokens measures {MAX_TOKENS} tokens of each text"
        session.out.note(f"`icm stats` shows these figures until {usual}")
    end(measured(report), stopped=stopped, partly=report.is_partial, hint=MEASURE_REST)
