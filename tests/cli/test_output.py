"""The sink: what stands on stdout and stderr in each mode."""

import io
import json
import sys
import time

import pytest

from icm_cli.errors import ExitCode, Failure, UsageProblem
from icm_cli.output import Column, Mode, Output
from icm_cli.progress import PlainProgress, ProgressDisplay, RichProgress

COLUMNS = [Column("task", shrink=True), Column("size", right=True)]
SPARE = [Column("task", shrink=True), Column("vectors", spare=1), Column("checkpoints", spare=2)]


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


def test_a_pipe_gets_plain_output_and_a_terminal_human_output(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Output().mode is Mode.PLAIN
    monkeypatch.setattr(sys, "stdout", Terminal())
    assert Output().mode is Mode.HUMAN


def test_json_wins_over_quiet() -> None:
    assert Output(as_json=True, quiet=True).mode is Mode.JSON


def test_a_table_is_aligned(capsys: pytest.CaptureFixture[str]) -> None:
    Output().table(COLUMNS, [["rust", "1.0 KiB"], ["bible-kjv", "17 B"]])
    assert capsys.readouterr().out == "TASK          SIZE\nrust       1.0 KiB\nbible-kjv     17 B\n"


def test_wide_characters_are_aligned_by_cells(capsys: pytest.CaptureFixture[str]) -> None:
    Output().table(COLUMNS, [["料理", "1 B"], ["abcd", "2 B"]])
    assert capsys.readouterr().out.splitlines()[1:] == ["料理   1 B", "abcd   2 B"]


def test_a_narrow_terminal_cuts_only_the_column_that_may_shrink(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("COLUMNS", "24")
    Output().table(COLUMNS, [["a-rather-long-task-name", "1023.9 KiB"]])
    assert terminal.getvalue().splitlines()[1] == "a-ra…sk-name  1023.9 KiB"


def test_the_widest_column_gives_way_first(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("COLUMNS", "40")
    columns = [Column("task", shrink=True), Column("targets", shrink=True), Column("size", right=True)]
    Output().table(columns, [["shakespeare", ",".join(f"block.{number}" for number in range(200)), "17 B"]])
    line = terminal.getvalue().splitlines()[1]
    assert line.startswith("shakespeare  block")
    assert line.endswith("block.199  17 B")
    assert len(line) == 40


@pytest.mark.parametrize(
    ("columns", "headings"), [(80, "TASK VECTORS CHECKPOINTS"), (24, "TASK VECTORS"), (16, "TASK")]
)
def test_columns_that_do_not_fit_are_left_out_and_no_heading_is_cut(
    monkeypatch: pytest.MonkeyPatch, columns: int, headings: str
) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("NO_COLOR", "1")
    Output().table(SPARE, [["a-rather-long-task-name", "8", "2"]])
    assert terminal.getvalue().splitlines()[0].split() == headings.split()


def test_a_pipe_gets_full_values_however_narrow(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "10")
    Output().table(COLUMNS, [["a-rather-long-task-name", "1 B"]])
    assert "a-rather-long-task-name" in capsys.readouterr().out


def test_headings_are_bold_on_a_terminal_and_not_with_no_color(monkeypatch: pytest.MonkeyPatch) -> None:
    for bold in (True, False):
        terminal = Terminal()
        monkeypatch.setattr(sys, "stdout", terminal)
        if bold:
            monkeypatch.delenv("NO_COLOR")
            monkeypatch.setenv("TERM", "xterm")
        else:
            monkeypatch.setenv("NO_COLOR", "1")
        Output().record([("name", "x")])
        assert ("\x1b[1m" in terminal.getvalue()) is bold


def test_hostile_names_are_escaped_in_tables_and_records(capsys: pytest.CaptureFixture[str]) -> None:
    out = Output()
    out.table([Column("task")], [["\x1b[2J[red]x[/nope]"]])
    out.record([("task", "a\u202eb")])
    assert capsys.readouterr().out.splitlines() == ["TASK", r"\x1b[2J[red]x[/nope]", r"task  a\u202eb"]


def test_quiet_keeps_the_answer_and_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    out = Output(quiet=True)
    out.answer("rust")
    for say in (out.line, out.note, out.hint, out.detail):
        say("talk")
    out.record([("a", "b")])
    assert capsys.readouterr() == ("rust\n", "")


def test_json_puts_only_json_on_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    out = Output(as_json=True)
    out.event("ingested", task="rust", new=2)
    for say in (out.line, out.answer, out.note, out.hint):
        say("talk")
    out.warn("odd", kind="symlink", path="x")
    captured = capsys.readouterr()
    assert json.loads(captured.out) == {"type": "ingested", "task": "rust", "new": 2}
    assert json.loads(captured.err) == {"type": "warning", "kind": "symlink", "message": "odd", "path": "x"}


def test_json_refuses_numbers_that_json_does_not_have() -> None:
    with pytest.raises(ValueError, match="JSON"):
        Output(as_json=True).document({"loss": float("nan")})


def test_a_hint_is_printed_once(capsys: pytest.CaptureFixture[str]) -> None:
    out = Output()
    for text in ("do this", "do this", "do that"):
        out.hint(text)
    assert capsys.readouterr().err == "hint: do this\nhint: do that\n"


def test_details_are_printed_with_verbose_only(capsys: pytest.CaptureFixture[str]) -> None:
    Output(verbosity=1).detail("heard")
    Output().detail("not heard")
    assert capsys.readouterr().err == "heard\n"


def test_a_failure_is_a_fact_a_blank_line_and_a_hint(capsys: pytest.CaptureFixture[str]) -> None:
    failure = Failure(ExitCode.NO_STORE, "store_not_found", "no store at \x1bx", "`icm ingest` makes one")
    Output().failure(failure)
    Output(as_json=True).failure(failure)
    text, line = capsys.readouterr().err.rsplit("\n", 2)[:2]
    assert text == "error: no store at \\x1bx\n\nhint: `icm ingest` makes one"
    assert json.loads(line)["code"] == 10


def test_a_question_without_a_terminal_names_the_flag() -> None:
    with pytest.raises(UsageProblem) as caught:
        Output().confirm("Delete 3 blobs?", yes=False)
    assert "--yes" in str(caught.value.hint)


@pytest.mark.parametrize(("typed", "answer"), [("y\n", True), ("YES\n", True), ("\n", False), ("no\n", False)])
def test_a_question_is_answered_with_yes_or_no(monkeypatch: pytest.MonkeyPatch, typed: str, answer: bool) -> None:
    monkeypatch.setattr(sys, "stdin", Terminal(typed))
    assert Output().confirm("Delete?", yes=False) is answer


def test_progress_is_a_bar_on_a_terminal_only(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(Output().progress("x"), PlainProgress)
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setenv("TERM", "xterm")
    assert isinstance(Output().progress("x"), RichProgress)
    monkeypatch.setenv("TERM", "dumb")
    assert isinstance(Output().progress("x"), PlainProgress)


@pytest.mark.parametrize("silent", [{"as_json": True}, {"quiet": True}, {"progress": False}])
def test_progress_is_silent_if_it_is_switched_off(silent: dict[str, bool]) -> None:
    assert type(Output(**silent).progress("x")) is ProgressDisplay


def test_plain_progress_writes_a_line_with_the_note_escaped(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ICM_PROGRESS_INTERVAL", "0")
    with Output().progress("ingest") as display:
        display.update(3, 10, "\x1bx")
    assert capsys.readouterr().err == "ingest 3/10 \\x1bx\n"


def test_plain_progress_estimates_the_rest_from_the_pace_so_far(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ICM_PROGRESS_INTERVAL", "0")
    clock = iter([0.0, 0.0, 100.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    with Output().progress("train") as display:
        display.update(400, 1000)  # a run that goes on
        display.update(500, 1000)
    assert capsys.readouterr().err == "train 400/1000\ntrain 500/1000 eta 8:20\n"


def test_plain_progress_keeps_its_interval(capsys: pytest.CaptureFixture[str]) -> None:
    with Output().progress("ingest") as display:
        display.update(3, 10)
    assert capsys.readouterr().err == ""


def test_the_bar_goes_to_stderr_and_reads_no_markup(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    with Output().progress("ingest [b]x") as display:
        display.update(3, 10, "[/nope]")
    assert "[/nope]" in terminal.getvalue()
    assert capsys.readouterr().out == ""


def test_a_character_that_the_encoding_lacks_is_written_out(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    Output().answer("crème")
    stream.flush()
    assert stream.buffer.getvalue() == b"cr\\xe8me\n"  # type: ignore[attr-defined]


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
def test_json_is_json_in_every_encoding(monkeypatch: pytest.MonkeyPatch, encoding: str) -> None:
    value = {"path": "crème €料\U0001f600\udcff"}
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", stream)
    Output(as_json=True).document(value)
    Output(as_json=True).event("x", **value)
    stream.flush()
    document, event = stream.buffer.getvalue().decode(encoding).rsplit("\n", 2)[:2]  # type: ignore[attr-defined]
    assert json.loads(document) == value
    assert json.loads(event) == {"type": "x", **value}


def test_the_remaining_time_falls_during_a_long_step(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter([0.0, 0.0, 100.0, 130.0, 160.0])
    monkeypatch.setattr("icm_cli.progress.time.monotonic", lambda: next(clock))
    progress = PlainProgress("encode")
    for done in (0, 1, 1, 1):
        progress.update(done, 2)
    shown = [line.rpartition("eta ")[2] for line in capsys.readouterr().err.splitlines()]
    assert shown == ["1:40", "1:10", "40s"]
