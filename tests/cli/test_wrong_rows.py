"""`icm ls` and `icm stats` show no figure that a wrong row had a part in, and say whose are missing."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from icm_cli.config import load_settings
from icm_cli.errors import ExitCode
from icm_cli.output import Output
from icm_cli.session import Session
from tests.cli.conftest import Ran

Icm = Callable[..., Ran]
ALL = {"poems", "rules", "silent"}
VERIFY = "hint: run `icm verify` to see what is damaged and how to repair it"
RULES = "task_id = (SELECT id FROM tasks WHERE name = 'rules')"
WRONG = {
    "a checkpoint counts as evicted": ("UPDATE adapters SET evicted_at = 0 WHERE step = 10", {"poems"}),
    "a final adapter is none": (f"UPDATE adapters SET is_final = 0 WHERE {RULES}", {"rules"}),
    "another error": (f"UPDATE codes SET dw_error = dw_error / 4 WHERE {RULES}", {"rules"}),
    "another code": (f"UPDATE codes SET blob_id = (SELECT min(blob_id) FROM codes) WHERE {RULES}", {"rules"}),
    "a vector": (f"UPDATE task_vectors SET support_set = 9 WHERE {RULES} AND support_set = 0 AND view = 0", {"rules"}),
    "a size": (
        f"UPDATE blobs SET size = size + 4096 WHERE id = (SELECT weights_id FROM adapters WHERE {RULES})",
        {"rules"},
    ),
    "no generator": ("UPDATE generators SET is_current = 0", ALL),
    "another base model": ("UPDATE base_models SET name = 'other'", ALL),
    "a run": ("UPDATE train_runs SET step = step + 1", {"a row without a task"}),
}


@pytest.mark.parametrize("case", WRONG)
@pytest.mark.parametrize("command", ["ls", "ls -f size>=8K --sort error", "stats"])
def test_a_wrong_row_costs_its_task_and_changes_no_other_figure(
    icm: Icm, trained: Path, case: str, command: str
) -> None:
    statement, tasks = WRONG[case]
    before = listed(icm(*command.split(), "--json"))
    with closing(sqlite3.connect(trained / "registry.db", isolation_level=None)) as connection:
        assert connection.execute(statement).rowcount > 0
    ran = icm(*command.split(), "--json")
    assert ran.code == ExitCode.DAMAGED
    assert {name for name in (*ALL, "a row without a task") if f"skipped {name}: " in ran.err} == tasks
    assert listed(ran) == {name: row for name, row in before.items() if name not in tasks}


@pytest.mark.parametrize("command", ["ls", "ls --limit 9", "ls -F rank>0 --sort rank"])
def test_text_that_is_none_costs_its_task_and_no_other(icm: Icm, trained: Path, command: str) -> None:
    before = listed(icm(*command.split(), "--json"))
    damage(trained, "UPDATE tasks SET note = CAST(x'ff61' AS TEXT) WHERE name = 'rules'")
    ran = icm(*command.split(), "--json")
    assert ran.code == ExitCode.DAMAGED
    assert "skipped rules: " in ran.err
    assert listed(ran) == {name: row for name, row in before.items() if name != "rules"}


def test_a_limit_looks_at_no_rows_of_others(icm: Icm, trained: Path) -> None:
    """The first by name is `poems`: only what is shown of it is checked, and what comes after it if it is wrong."""
    damage(trained, f"UPDATE codes SET dw_error = dw_error / 4 WHERE {RULES}")
    assert icm("ls", "--limit", "1").code == ExitCode.DONE
    assert icm("ls", "--limit", "1", "--sort", "name").code == ExitCode.DAMAGED
    damage(trained, "UPDATE tasks SET pinned = 1 WHERE name = 'poems'")
    ran = icm("ls", "--limit", "1", "--json")
    assert (ran.code, list(listed(ran))) == (ExitCode.DAMAGED, ["silent"])


@pytest.mark.parametrize(("flags", "hints"), [((), [VERIFY]), (("-q",), [])])
def test_one_warning_for_all_damaged_tasks(icm: Icm, trained: Path, flags: tuple[str, ...], hints: list[str]) -> None:
    damage(trained, "UPDATE tasks SET pinned = 1 WHERE name != 'silent'")
    ran = icm("ls", *flags)
    warning, *others = ran.err.splitlines()
    assert ran.code == ExitCode.DAMAGED
    reason = f"{trained / 'registry.db'}: checksum mismatch in row 1 of tasks"
    assert warning == f"warning: skipped 2 damaged tasks: poems, rules: {reason}"
    assert others == hints


def test_the_warning_about_a_single_damaged_task(icm: Icm, trained: Path) -> None:
    damage(trained, f"UPDATE codes SET dw_error = dw_error / 4 WHERE {RULES}")
    warning, *others = icm("stats").err.splitlines()
    assert warning.startswith(f"warning: skipped rules: {trained / 'registry.db'}: checksum mismatch in row ")
    assert others == [VERIFY]


def test_the_warning_names_three_tasks_and_counts_the_others(capsys: pytest.CaptureFixture[str]) -> None:
    names = [f"task-{number}" for number in range(12)]
    session = Session(Output(), load_settings(), "icm ls", damaged=dict.fromkeys(names, "row 7 of tasks is wrong"))
    session.warn_damaged()
    warning = "warning: skipped 12 damaged tasks: task-0, task-1, task-2, and 9 more: row 7 of tasks is wrong"
    assert capsys.readouterr().err.splitlines() == [warning]


def test_json_has_a_warning_for_each_damaged_task(icm: Icm, trained: Path) -> None:
    damage(trained, "UPDATE tasks SET pinned = 1")
    warnings = [json.loads(line) for line in icm("ls", "--json").err.splitlines()]
    assert [(line["type"], line["kind"], line["task"]) for line in warnings] == [
        ("warning", "task_damaged", task) for task in sorted(ALL)
    ]


def test_a_command_that_fails_prints_the_warning_too(icm: Icm, trained: Path) -> None:
    damage(trained, "UPDATE tasks SET pinned = 1 WHERE name != 'silent'")
    ran = icm("map")
    assert ran.code == ExitCode.DAMAGED
    warning, error = ran.err.splitlines()[:2]
    reason = f"{trained / 'registry.db'}: checksum mismatch in row 1 of tasks"
    assert warning == f"warning: skipped 2 damaged tasks: poems, rules: {reason}"
    assert error.startswith("error: ")


def test_bytes_that_a_wrong_row_refers_to_count_for_no_task(icm: Icm, trained: Path) -> None:
    before = icm("stats", "--json").document["on_disk"]
    with closing(sqlite3.connect(trained / "registry.db", isolation_level=None)) as connection:
        connection.execute(f"UPDATE adapters SET weights_id = (SELECT max(blob_id) FROM codes) WHERE {RULES}")
    after = icm("stats", "--json").document["on_disk"]
    assert (after["total"], after["codes"]) == (before["total"], before["codes"])
    assert after["originals"] + after["unreferenced"] == before["originals"]


def damage(store: Path, statement: str) -> None:
    """Change rows behind icm's back."""
    with closing(sqlite3.connect(store / "registry.db", isolation_level=None)) as connection:
        connection.execute(statement)


def listed(ran: Ran) -> dict[str, object]:
    """Return task -> its figures."""
    rows = ran.document if isinstance(ran.document, list) else ran.document["fleets"]
    tasks = [task for row in rows for task in row.get("tasks", [row])]
    return {task.get("name", task.get("task")): task for task in tasks}
