"""The program as a whole: global options, usage errors, bugs, closed pipes, what it imports."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from icm_cli import app as program
from icm_cli.config import load_settings
from icm_cli.errors import ExitCode
from icm_cli.output import Output
from icm_cli.session import Session
from icmlora.fleet.context import Context, reporting
from tests.cli.conftest import Ran, modules_of
from tests.cli.homeless import leave_home

Icm = Callable[..., Ran]


def test_the_version_is_printed(icm: Icm) -> None:
    ran = icm("--version")
    assert (ran.code, ran.out.split()[0]) == (0, "icm")


def test_without_a_command_the_help_is_shown(icm: Icm) -> None:
    ran = icm()
    assert ran.code == ExitCode.USAGE
    assert "icm ingest ./loras" in ran.out


@pytest.mark.parametrize(
    "arguments",
    [
        ("--store", "/x", "doctor", "--path", "store"),
        ("doctor", "--store", "/x", "--path", "store"),
        ("doctor", "--path", "store", "--store", "/x"),
    ],
)
def test_global_options_stand_before_or_after_the_command(icm: Icm, arguments: tuple[str, ...]) -> None:
    assert icm(*arguments).out == "/x\n"


def test_the_option_nearest_to_the_command_wins(icm: Icm) -> None:
    assert icm("--store", "/x", "doctor", "--path", "store", "--store", "/y").out == "/y\n"


def test_an_unknown_command_is_a_usage_error_with_a_suggestion(icm: Icm) -> None:
    ran = icm("matrialize")
    assert ran.code == ExitCode.USAGE
    assert "Did you mean 'materialize'?" in ran.err
    assert "hint: run `icm --help` for usage" in ran.err


def test_an_unknown_option_names_the_help_of_its_command(icm: Icm) -> None:
    assert "`icm doctor --help`" in icm("doctor", "--frob").err


@pytest.mark.parametrize(
    ("line", "option", "fact"),
    [
        ("evict --max-error -1", "'--max-error'", "greater than or equal to 0"),
        ("ls --lock-timeout abc", "'--lock-timeout'", "a valid number"),
        ("materialize x -o a --dtype fp16", "'--dtype'", "'fp16' is not one of"),
        ("materialize x", "'--output' / '-o'", "Missing option"),
    ],
)
def test_a_usage_error_names_the_option(icm: Icm, line: str, option: str, fact: str) -> None:
    ran = icm(*line.split())
    message = icm(*line.split(), "--json").error["message"]
    assert ran.code == ExitCode.USAGE
    assert ran.err.startswith(f"error: {message}\n")
    assert (option in message, fact in message, "Value error" in message) == (True, True, False)


def test_a_group_without_a_command_shows_its_help_and_no_error(icm: Icm) -> None:
    ran = icm("base")
    assert (ran.code, ran.err) == (ExitCode.USAGE, "")
    assert "icm base [OPTIONS] COMMAND" in ran.out


def test_with_json_a_group_without_a_command_has_an_error_with_a_message(icm: Icm) -> None:
    error = icm("--json", "base").error
    assert (error["message"], error["hint"]) == ("no command given", "run `icm base --help` for usage")


def test_with_json_a_usage_error_is_json(icm: Icm) -> None:
    ran = icm("doctor", "--frob", "--json")
    assert (ran.out, ran.error["type"], ran.error["code"]) == ("", "error", 2)


def test_a_bug_leaves_its_traceback_in_the_log(icm: Icm, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ICM_LOG", str(tmp_path / "deep" / "errors.log"))
    monkeypatch.setattr(Context, "with_deadline", lambda context: 1 // 0)
    ran = icm("doctor")
    assert ran.code == ExitCode.FAILED
    assert "Traceback" not in ran.err
    assert str(tmp_path / "deep" / "errors.log") in ran.err
    assert "ZeroDivisionError" in (tmp_path / "deep" / "errors.log").read_text()


def test_without_a_home_a_bug_says_how_to_see_its_traceback(icm: Icm, monkeypatch: pytest.MonkeyPatch) -> None:
    leave_home(monkeypatch)
    monkeypatch.setattr(Context, "with_deadline", lambda context: 1 // 0)
    ran = icm("doctor")
    assert (ran.code, "unexpected ZeroDivisionError" in ran.err) == (ExitCode.FAILED, True)
    assert "ICM_DEBUG=1" in ran.err


def test_icm_debug_shows_tracebacks(icm: Icm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ICM_DEBUG", "1")
    monkeypatch.setattr(Context, "with_deadline", lambda context: 1 // 0)
    assert "Traceback" in icm("doctor").err


def test_ctrl_c_gives_one_line_and_130(icm: Icm, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(context: Context) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Context, "with_deadline", interrupt)
    ran = icm("doctor")
    assert (ran.code, ran.err) == (130, "error: interrupted; finished work is kept\n")


def test_a_closed_stdout_is_quiet() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    program = [sys.executable, "-c", "from icm_cli.app import main; main()", "doctor", "--path", "store"]
    ran = subprocess.run(program, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert (ran.returncode, ran.stderr) == (ExitCode.STDOUT_CLOSED, "")


@pytest.mark.one_case
@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&-", "<&- >&- 2>&-"])
def test_a_stream_that_is_closed_from_the_start_is_as_dev_null(closed: str) -> None:
    line = f"\"$0\" -c 'from icm_cli.app import main; main()' doctor --path store {closed}"
    ran = subprocess.run(["sh", "-c", line, sys.executable], capture_output=True, text=True, check=False)
    answer = "" if ">&-" in closed.split() else f"{os.environ['ICM_STORE']}\n"
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, answer, "")


def test_help_imports_nothing_heavy() -> None:
    assert not {"torch", "numpy", "sqlalchemy", "transformers", "peft"} & modules_of("--help")


def test_completion_never_raises(tmp_path: Path) -> None:
    from icm_cli.completion import complete_base, complete_task

    (tmp_path / "store").write_text("no store")
    assert complete_task("") == complete_base("") == []


def test_the_program_is_called_icm() -> None:
    assert program.app.info.name == "icm"


def test_a_stopped_job_reports_what_was_done_and_that_it_was_stopped() -> None:
    def work(context: Context) -> list[str]:
        done: list[str] = []
        with reporting(done):
            for name in ("first", "second"):
                done.append(name)
                signal.raise_signal(signal.SIGTERM)
                context.progress(1, 2)
        return done

    session = Session(Output(), load_settings(), "icm test")
    assert session.run("test", work) == (["first"], True)


def test_a_second_signal_stops_at_once() -> None:
    session = Session(Output(), load_settings(), "icm test")

    def work(context: Context) -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        session.run("test", work)


def test_the_signal_handlers_are_put_back_after_the_work() -> None:
    before = signal.getsignal(signal.SIGINT)
    session = Session(Output(), load_settings(), "icm test")
    assert session.run("test", lambda fleet: 1) == (1, False)
    assert signal.getsignal(signal.SIGINT) is before
