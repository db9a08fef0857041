"""`icm eval`: measure the sources of tasks on held-out text."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from icm_cli.command import Call, command
from icm_cli.eval_report import MEASURE_REST, measured, print_measured, sum_up
from icm_cli.report import end
from icm_cli.session import Session
from icmlora.fleet.measure import evaluate as use_case
from icmlora.fleet.measure.metric_result import MAX_TOKENS

if TYPE_CHECKING:
    from icmlora.fleet.measure.report import EvaluateReport


@command(use_case.evaluate)
def evaluate(session: Session, call: Call[EvaluateReport]) -> None:
    report = call.run(partial(print_measured, session), "eval")
    sum_up(session, report)
    if report.done and call["max_tokens"] != MAX_TOKENS:
        fact = f"`icm stats` shows these figures until the next `icm eval` with the default of {MAX_TOKENS} tokens"
        session.out.note(fact)
    end(report, measured(report), hint=MEASURE_REST)
