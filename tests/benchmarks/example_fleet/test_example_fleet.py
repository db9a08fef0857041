"""The committed fleet is what its README says it is, and the text is cut as promised."""

import json
from pathlib import Path

import pytest
from hypothesis import given, strategies as st

from tests.benchmarks.example_fleet.build_text import pieces, split
from tests.benchmarks.example_fleet.table import losses, table
from tests.benchmarks.example_fleet.tasks import TASKS, Task
from tests.benchmarks.example_fleet.texts import TEXTS

FLEET = Path(__file__).parents[3] / "docs/example-fleet"
each_task = pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)


def texts(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in path.read_text("utf-8").splitlines()]


def test_the_whole_fleet_stays_under_five_and_a_half_megabytes() -> None:
    assert sum(path.stat().st_size for path in FLEET.rglob("*") if path.is_file()) < 5_500_000


def test_every_task_has_a_text_and_every_text_a_task() -> None:
    assert {task.name for task in TASKS} == set(TEXTS)


def test_the_table_of_the_readme_is_current() -> None:
    assert table(FLEET) in (FLEET / "README.md").read_text("utf-8")


@each_task
def test_a_folder_has_the_files_a_trainer_leaves(task: Task) -> None:
    adapter = {"adapter_config.json", "adapter_model.safetensors"}
    checkpoints = {f"checkpoint-{step}" for step in task.checkpoints}
    folder = FLEET / task.name
    assert {path.name for path in folder.iterdir()} == adapter | checkpoints | {
        "README.md",
        "samples.jsonl",
        "eval.jsonl",
    }
    assert all({path.name for path in (folder / name).iterdir()} == adapter for name in checkpoints)


@each_task
def test_the_config_is_the_recipe(task: Task) -> None:
    config = json.loads((FLEET / task.name / "adapter_config.json").read_text("utf-8"))
    assert config["r"] == task.rank
    assert config["lora_alpha"] == task.alpha
    assert config["target_modules"] == sorted(task.targets)
    assert config["use_rslora"] == task.rslora


@each_task
def test_the_adapter_predicts_its_held_out_text_better_than_the_base_model(task: Task) -> None:
    before, after = losses((FLEET / task.name / "README.md").read_text("utf-8"))
    assert float(after) < float(before) - 0.05


@each_task
def test_samples_and_held_out_texts_are_complete_and_disjoint(task: Task) -> None:
    samples, held_out = (texts(FLEET / task.name / f"{name}.jsonl") for name in ("samples", "eval"))
    assert (len(samples), len(held_out)) == (64, 16)
    assert all(samples)
    assert not {sample for sample in samples if any(sample in text for text in held_out)}


@given(st.text(st.characters(codec="utf-8"), min_size=2000), st.sampled_from([4, 16]))
def test_pieces_never_exceed_the_size_of_their_file(text: str, count: int) -> None:
    lines = (json.dumps({"text": piece}, ensure_ascii=False) + "\n" for piece in pieces(text, count))
    assert sum(len(line.encode()) for line in lines) <= 24_000


def test_a_document_is_never_in_both_parts() -> None:
    documents = [f"document {i}: " + "words " * 30 for i in range(64)]
    train, held_out = split(documents)
    assert [(name in train) + (name in held_out) for name in (text.strip() for text in documents)] == [1] * 64
