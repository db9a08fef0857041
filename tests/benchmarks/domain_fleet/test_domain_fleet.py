"""The list of tasks keeps its promises, and a stopped build goes on where it was."""

import argparse
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.benchmarks.domain_fleet.__main__ import named, parsed, part
from tests.benchmarks.domain_fleet.build import Builder, write_index
from tests.benchmarks.domain_fleet.domains import DOMAINS
from tests.benchmarks.domain_fleet.tasks import GROUPS, TASKS, DomainTask
from tests.benchmarks.example_fleet.packages import Packages
from tests.benchmarks.example_fleet.tasks import QKVO, QV, Schedule
from tests.benchmarks.example_fleet.texts import Text
from tests.icmlora.tiny_base import write_tiny_base

TASK = DomainTask("made-up", rank=2, seed=7, group="data", family="made-up")
SHORT = Schedule(steps=2, batch=2, length=16, learning_rate=1e-3, warmup=1)
quiet = pytest.mark.filterwarnings("ignore:.*base_model_name_or_path", "ignore:.*is_gradient_checkpointing")


def documents(packages: Packages) -> list[str]:
    return [f"document {i}\n" + f"{i} bottles of ale\n" * 40 for i in range(40)]


def broken(packages: Packages) -> list[str]:
    raise RuntimeError("the text is built again")


@pytest.fixture
def builder(tmp_path: Path) -> Builder:
    (tmp_path / "fleet").mkdir()
    return Builder(write_tiny_base(tmp_path / "base"), Packages(tmp_path), tmp_path / "fleet", SHORT)


def test_there_are_fifty_two_tasks_of_different_names() -> None:
    assert len({task.name for task in TASKS}) == len(TASKS) == 52


def test_every_task_has_a_domain_and_every_domain_a_task() -> None:
    assert {task.name for task in TASKS} == set(DOMAINS)


def test_every_family_lies_within_one_group() -> None:
    groups = {(task.family, task.group) for task in TASKS}
    assert len(groups) == len({family for family, _ in groups})
    assert {group for _, group in groups} == set(GROUPS)


def test_no_family_is_so_large_that_leaving_it_out_leaves_little() -> None:
    families = [task.family for task in TASKS]
    assert max(families.count(family) for family in families) <= 3


def test_the_first_twelve_tasks_are_a_diverse_fleet() -> None:
    first = TASKS[:12]
    assert {task.rank for task in first} == {4, 8, 16}
    assert {task.targets for task in first} == {QV, QKVO}
    assert len({task.seed for task in first}) >= 3
    assert {task.group for task in first} == set(GROUPS)
    assert any(task.rslora for task in first)


def test_parts_share_the_list_and_follow_its_order() -> None:
    tasks = list(range(9))
    first, second = tasks[part("1/2")], tasks[part("2/2")]
    assert (first, second) == ([0, 2, 4, 6, 8], [1, 3, 5, 7])


@pytest.mark.parametrize("text", ["0/2", "3/2", "1", "a/b", "1/0", ""])
def test_a_part_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError):
        part(text)


def test_named_tasks_stay_in_the_order_of_the_list() -> None:
    assert [task.name for task in named("go,erlang")] == ["erlang", "go"]


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="no task is called cobol"):
        named("go,cobol")


def test_without_a_choice_all_tasks_are_built() -> None:
    arguments = parsed(["--work", "w", "--fleet", "f"])
    assert arguments.only[arguments.part] == list(TASKS)


@quiet
def test_a_task_is_a_folder_with_adapter_texts_and_card(builder: Builder, tmp_path: Path) -> None:
    assert builder.build(TASK, Text("made up", "none", documents))
    folder = tmp_path / "fleet/made-up"
    assert [path.name for path in folder.parent.iterdir()] == ["made-up"]
    weights = load_file(folder / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    assert len((folder / "samples.jsonl").read_text("utf-8").splitlines()) == 64
    assert len((folder / "eval.jsonl").read_text("utf-8").splitlines()) == 16
    assert "rank 2, alpha 4, q_proj, v_proj, initialisation seed 7" in (folder / "README.md").read_text("utf-8")


@quiet
def test_a_finished_task_is_skipped(builder: Builder, tmp_path: Path) -> None:
    builder.build(TASK, Text("made up", "none", documents))
    assert not builder.build(TASK, Text("made up", "none", broken))


@quiet
def test_a_stopped_task_has_no_folder_and_is_built_the_next_time(builder: Builder, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError):
        builder.build(TASK, Text("made up", "none", broken))
    assert not (tmp_path / "fleet/made-up").exists()
    assert builder.build(TASK, Text("made up", "none", documents))
    assert [path.name for path in (tmp_path / "fleet").iterdir()] == ["made-up"]


def test_the_index_tells_a_study_everything_about_a_task(tmp_path: Path) -> None:
    write_index(tmp_path, TASKS)
    rows = {row["name"]: row for row in json.loads((tmp_path / "tasks.json").read_text("utf-8"))}
    assert set(rows) == set(DOMAINS)
    assert rows["coq"] == {
        "name": "coq",
        "rank": 16,
        "alpha": 32,
        "seed": 42,
        "targets": list(QKVO),
        "rslora": False,
        "checkpoints": [],
        "group": "maths",
        "family": "coq",
        "source": "deb:libcoq-stdlib",
    }
