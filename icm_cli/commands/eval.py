"""`icm eval`: measure the sources of tasks on held-out text."""

from __future__ import annotations

from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from icm_cli.command import plain_command as command
from icm_cli.eval_report import MEASURE_REST, measured, print_measured, sum_up
from icm_cli.options import DeviceOpt, ShardOpt, SomeTasksArg, WorkersOpt, option
from icm_cli.session import Session, end
from icmlora.fleet.measure.metric_result import MAX_TOKENS

if TYPE_CHECKING:
    from icmlora.fleet.context import Context
    from icmlora.fleet.measure.evaluate import EvaluateReport


class SourceName(StrEnum):
    """A source to measure, besides base model and original. Typer cannot repeat a `Literal` option."""

    CODE = "code"
    RECALLED = "recalled"
    NETWORK = "network"


DataOpt = Annotated[
    Path | None, option("--data FILE", "File with held-out text. Default: the text stored with the task.")
]
SourceOpt = Annotated[
    list[SourceName] | None,
    option("--source", "Measure only this source, base model and original. Can be repeated."),
]
TokensOpt = Annotated[int, option("--max-tokens N", "Number of tokens to score in each text.", min=2)]
ContextOpt = Annotated[bool, option("--context", "Also measure with the context of each task (see `icm context`).")]
AgainOpt = Annotated[bool, option("--again", "Repeat measurements already made on the same text.")]


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
) -> None:
    """Measure base model, original, code and other sources on held-out text.

    GAIN is the retained gain: (loss of base - loss of source) / (loss of base - loss of original). Each adapter is
    written to disk and loaded with PEFT before it is measured. Needs the base model. For an evicted original, an
    earlier measurement on the same text is used. With --context, each task with a context has a second row. Its GAIN is
    relative to the gain of the original without the context, and is also shown for the base model.


    Example:
      icm eval shakespeare
    """
    from icmlora.fleet.measure.evaluate import evaluate

    def work(store: Context) -> EvaluateReport:
        return evaluate(
            store,
            tasks or (),
            sources=[name.value for name in source or ()] or ("code", "recalled"),
            data=data,
            max_tokens=max_tokens,
            with_context=context,
            device=session.device(device),
            again=again,
            workers=workers,
            shard=shard,
        )

    report, stopped = session.run("eval", work, partial(print_measured, session))
    sum_up(session, report)
    if report.done and max_tokens != MAX_TOKENS:
        fact = f"`icm stats` shows these figures until the next `icm eval` with the default of {MAX_TOKENS} tokens"
        session.out.note(fact)

    end(measured(report), stopped=stopped, partly=report.is_partial, hint=MEASURE_REST)
