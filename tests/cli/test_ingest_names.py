"""What `icm ingest` calls tasks, and that a task of the store is found again under the name it has."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from icm_cli.errors import ExitCode
from icmlora.formats.discovery.discovery import find_tasks, name_tasks
from icmlora.formats.discovery.naming import NameTemplate
from tests.cli.conftest import Ran
from tests.cli.fleet import write_adapter

Icm = Callable[..., Ran]


def names(icm: Icm) -> list[str]:
    return icm("ls", "-q").out.split()


@pytest.fixture
def twins(tmp_path: Path) -> Path:
    """Two runs of one name: `a/rust` and `b/rust`."""
    for number, run in enumerate("ab"):
        write_adapter(tmp_path / "runs" / run / "rust", seed=number)
    return tmp_path / "runs"


def test_folders_of_one_name_are_tasks_with_their_parents_names(icm: Icm, twins: Path) -> None:
    assert icm("ingest", twins).code == 0
    assert names(icm) == ["a-rust", "b-rust"]


def test_one_of_them_alone_is_found_again_later(icm: Icm, twins: Path) -> None:
    icm("ingest", twins)
    for place in ("a/rust", "a", "b"):
        assert "0 new adapters, 1 unchanged" in icm("ingest", twins / place).out
    assert names(icm) == ["a-rust", "b-rust"]


def test_a_third_gets_a_long_name_alone_or_with_the_others(icm: Icm, twins: Path, tmp_path: Path) -> None:
    icm("ingest", twins)
    third = write_adapter(twins / "c" / "rust", seed=3)
    assert icm("ingest", third).code == 0
    assert names(icm) == ["a-rust", "b-rust", "c-rust"]
    assert "0 new adapters, 3 unchanged" in icm("ingest", twins).out


def test_the_first_of_them_keeps_its_short_name(icm: Icm, twins: Path) -> None:
    icm("ingest", twins / "a")
    ran = icm("ingest", twins)
    assert (ran.code, names(icm)) == (0, ["b-rust", "rust"])
    assert "1 task has another name than its folder: b-rust (" in ran.err
    assert "0 new adapters, 2 unchanged" in icm("ingest", twins).out


def test_another_folder_of_a_known_name_is_another_task_or_the_same_if_asked(icm: Icm, twins: Path) -> None:
    icm("ingest", twins / "a")
    ran = icm("ingest", twins / "b", "--on-conflict", "version", "--json")
    assert (ran.events[0]["task"], ran.events[0]["status"]) == ("rust", "version")
    assert names(icm) == ["rust"]


def test_folders_that_were_moved_are_recognised_by_their_bytes(icm: Icm, twins: Path, tmp_path: Path) -> None:
    icm("ingest", twins)
    moved = tmp_path / "elsewhere" / "deep"
    shutil.move(twins, moved)
    assert "0 new adapters, 2 unchanged" in icm("ingest", moved).out
    assert "0 new adapters, 1 unchanged" in icm("ingest", moved / "b").out
    assert names(icm) == ["a-rust", "b-rust"]


def test_a_task_that_was_given_a_name_keeps_it(icm: Icm, twins: Path) -> None:
    icm("ingest", twins / "a", "--name", "poems")
    assert "0 new adapters, 1 unchanged" in icm("ingest", twins / "a").out
    icm("ingest", twins)
    assert names(icm) == ["poems", "rust"]


def test_a_folder_trained_again_for_another_task_is_not_taken_for_the_one_before(icm: Icm, tmp_path: Path) -> None:
    out = write_adapter(tmp_path / "project" / "output")
    icm("ingest", out, "--name", "poems")
    write_adapter(out, seed=1)
    assert icm("ingest", out).code == 0
    assert names(icm) == ["poems", "project"]


def test_a_second_one_in_the_same_folder_gets_a_number_and_keeps_it(icm: Icm, tmp_path: Path) -> None:
    write_adapter(tmp_path / "runs" / "dog", seed=1)
    icm("ingest", tmp_path / "runs")
    second = write_adapter(tmp_path / "runs" / "Dog", seed=2)
    assert icm("ingest", tmp_path / "runs").code == 0
    assert names(icm) == ["dog", "Dog-2"]
    assert "0 new adapters, 2 unchanged" in icm("ingest", tmp_path / "runs").out
    write_adapter(second, seed=3)
    assert "Dog-2 (version 2)" in icm("ingest", tmp_path / "runs").err
    assert names(icm) == ["dog", "Dog-2"]


@pytest.mark.parametrize("folder", ["水墨画", "cafe\u0301", "my style"])
def test_a_name_that_is_the_folders_is_not_told(icm: Icm, tmp_path: Path, folder: str) -> None:
    write_adapter(tmp_path / folder)
    ran = icm("ingest", tmp_path / folder)
    assert "not called like the folder" not in ran.err
    assert ("`icm edit" in ran.err) == (not folder.isascii())


def test_best_takes_a_name_of_its_own_if_last_was_there_first(icm: Icm, tmp_path: Path) -> None:
    write_adapter(tmp_path / "sql" / "last", seed=1)
    icm("ingest", tmp_path / "sql")
    write_adapter(tmp_path / "sql" / "best", seed=2)
    assert icm("ingest", tmp_path / "sql").code == 0
    assert names(icm) == ["sql", "sql-best"]
    assert "0 new adapters, 2 unchanged" in icm("ingest", tmp_path / "sql").out


def test_a_run_that_was_continued_is_the_next_version_of_its_task(icm: Icm, tmp_path: Path) -> None:
    write_adapter(tmp_path / "rust" / "checkpoint-10", seed=1)
    icm("ingest", tmp_path / "rust")
    write_adapter(tmp_path / "rust" / "checkpoint-20", seed=2)
    ran = icm("ingest", tmp_path / "rust")
    assert (ran.code, "1 new adapter, 1 unchanged" in ran.out) == (0, True)
    assert "rust (version 2)" in ran.err
    assert names(icm) == ["rust"]


def test_a_run_is_recognised_by_a_checkpoint_that_it_still_has(icm: Icm, tmp_path: Path) -> None:
    for step in (1, 2):
        write_adapter(tmp_path / "rust" / f"epoch_{step}", seed=step)
    icm("ingest", tmp_path / "rust", "--name", "poems")
    shutil.rmtree(tmp_path / "rust" / "epoch_2")
    write_adapter(tmp_path / "rust" / "epoch_3", seed=3)
    icm("ingest", tmp_path / "rust", "--name", "poems")
    assert names(icm) == ["poems"]


def test_a_new_snapshot_of_a_cached_repository_has_its_hash_in_the_name(icm: Icm, tmp_path: Path) -> None:
    repository = tmp_path / "hub" / "models--acme--rust"
    (repository / "refs").mkdir(parents=True)
    for number, commit in enumerate(("a" * 40, "b" * 40)):
        write_adapter(repository / "snapshots" / commit, seed=number)
        (repository / "refs" / "main").write_text(commit)
        icm("ingest", tmp_path / "hub")
    assert names(icm) == ["rust", "rust-bbbbbbb"]
    assert "0 new adapters, 2 unchanged" in icm("ingest", tmp_path / "hub").out


def found(pattern: str, root: Path) -> list[str]:
    return [task.name for task in name_tasks(find_tasks([root]).tasks, pattern=NameTemplate(pattern))]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("{parent}-{name}", ["Llama-3-8B-run-sft", "Qwen2-7B-run-dpo"]),
        ("saves-{parent}.{name#run-}", ["saves-Llama-3-8B.sft", "saves-Qwen2-7B.dpo"]),
        ("{parent%-8B}/{name}", ["Llama-3-run-sft", "Qwen2-7B-run-dpo"]),
        ("{path}", ["Llama-3-8B-run-sft", "Qwen2-7B-run-dpo"]),
        ("{grandparent}-{name}", ["saves-run-dpo", "saves-run-sft"]),
        ("{grandparent}", ["Llama-3-8B-saves", "Qwen2-7B-saves"]),
    ],
)
def test_a_pattern_makes_the_names(tmp_path: Path, pattern: str, expected: list[str]) -> None:
    write_adapter(tmp_path / "saves" / "Llama-3-8B" / "lora" / "run-sft")
    write_adapter(tmp_path / "saves" / "Qwen2-7B" / "lora" / "run-dpo", seed=1)
    assert found(pattern, tmp_path / "saves") == expected


@pytest.mark.parametrize("pattern", ["rust", "{nam}", "{name", "{name}}", "{name|x}", "{name}" * 99, ""])
def test_what_is_not_a_pattern_is_refused(icm: Icm, twins: Path, tmp_path: Path, pattern: str) -> None:
    ran = icm("ingest", twins, "--name-from", pattern)
    assert (ran.code, "--name-from" in ran.err, "{grandparent}" in ran.err) == (ExitCode.FAILED, True, True)
    assert not (tmp_path / "store").exists()


def test_a_pattern_names_new_tasks_only(icm: Icm, twins: Path) -> None:
    icm("ingest", twins / "a")
    assert icm("ingest", twins, "--name-from", "{name}-of-{parent}").code == 0
    assert names(icm) == ["rust", "rust-of-b"]


def test_a_name_and_a_pattern_cannot_both_be_given(icm: Icm, twins: Path) -> None:
    assert icm("ingest", twins / "a", "--name", "x", "--name-from", "{name}").code == ExitCode.USAGE
