"""`icm encode`: re-encode tasks without training."""

from __future__ import annotations

from typing import TYPE_CHECKING

from icm_cli.command import Call, command
from icm_cli.encode_report import print_evict_hint, sum_up
from icm_cli.report import end
from icm_cli.session import Session
from icmlora.fleet.encode import encode as use_case
from icmlora.io.text import counted

if TYPE_CHECKING:
    from icmlora.fleet.encode.encode import EncodeReport


@command(use_case.encode)
def encode(session: Session, call: Call[EncodeReport]) -> None:
    report = call.run()
    sum_up(session, report)
    if not report.stopped:
        print_evict_hint(session, report, call["max_error"])
    end(report, f"encoded {counted(len(report.done), 'task')}")
