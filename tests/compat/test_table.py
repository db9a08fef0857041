"""docs/compatibility.md is current, and the lists behind it name each other."""

from __future__ import annotations

from pathlib import Path

from tests.compat.cases import CASES
from tests.compat.not_yet import NOT_YET
from tests.compat.suite import CaseTests
from tests.compat.table import page
from tests.compat.trees import TREES

PAGE = Path(__file__).parents[2] / "docs" / "compatibility.md"


def test_the_page_in_the_repository_is_what_make_docs_writes() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run `make docs`"


def test_every_case_has_a_name_of_its_own() -> None:
    names = [case.name for case in CASES]
    assert sorted(names) == sorted(set(names))


def test_what_is_refused_says_why() -> None:
    assert [case.name for case in CASES if case.outcome == "refused" and not case.remark] == []


def test_every_expected_failure_is_of_a_case_or_a_tree() -> None:
    names = {case.name for case in CASES} | {tree.name for tree in TREES} | {"all"}
    assert {name for missing in NOT_YET.values() for name in missing} <= names


def test_every_expected_failure_is_of_a_test() -> None:
    tests = {name for name in dir(CaseTests) if name.startswith("test_")}
    trees = {"test_a_tree_becomes_its_tasks", "test_all_trees_in_one_folder_become_tasks_by_one_command"}
    assert set(NOT_YET) <= tests | trees
