"""Finding adapters, runs and checkpoints, and making tasks of them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from icmlora.errors import AdapterRefused
from icmlora.formats.discovery.discovery import Discovery, find_adapters
from icmlora.formats.discovery.found import FoundTask
from icmlora.formats.discovery.task_names import best_step, step_of
from registry.names import task_name_problem
from tests.icmlora.adapter_files import write_adapter


def only(discovery: Discovery) -> FoundTask:
    assert discovery.refused == ()
    (task,) = discovery.tasks
    return task


def steps(task: FoundTask) -> list[int | None]:
    return [adapter.step for adapter in task.adapters]


def test_a_single_folder_is_one_task(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "rust")
    task = only(find_adapters([folder]))
    assert (task.name, task.folder, steps(task)) == ("rust", folder, [None])
    assert task.final.weights == folder / "adapter_model.safetensors"


def test_adapters_are_found_at_any_depth_in_natural_order(tmp_path: Path) -> None:
    for name in ("a/b/task10", "task2", "a/task1"):
        write_adapter(tmp_path / name)
    assert [task.name for task in find_adapters([tmp_path]).tasks] == ["task1", "task2", "task10"]


def test_a_run_is_one_task_whose_final_adapter_is_the_runs_own(tmp_path: Path) -> None:
    for name in ("rust", "rust/checkpoint-100", "rust/checkpoint-80"):
        write_adapter(tmp_path / name)
    task = only(find_adapters([tmp_path]))
    assert (task.name, steps(task), task.final.step) == ("rust", [80, 100, None], None)


def test_without_an_adapter_of_its_own_the_last_checkpoint_is_final(tmp_path: Path) -> None:
    for step in (9, 80, 100):
        write_adapter(tmp_path / "rust" / f"checkpoint-{step}")
    assert only(find_adapters([tmp_path])).final.step == 100


@pytest.mark.parametrize("place", ["rust", "rust/checkpoint-100"])
@pytest.mark.parametrize("noted", ["/elsewhere/rust/checkpoint-80", "C:\\runs\\rust\\checkpoint-80", "checkpoint-80/"])
def test_the_best_checkpoint_is_final_if_the_trainer_noted_it(tmp_path: Path, place: str, noted: str) -> None:
    for step in (9, 80, 100):
        write_adapter(tmp_path / "rust" / f"checkpoint-{step}")
    state = json.dumps({"best_model_checkpoint": noted, "log_history": [{"loss": float("nan")}]})
    (tmp_path / place / "trainer_state.json").write_text(state)
    assert only(find_adapters([tmp_path])).final.step == 80


@pytest.mark.parametrize("noted", ["checkpoint-85", "../../checkpoint", "", None, 7])
def test_a_note_of_a_checkpoint_that_is_not_there_is_ignored(tmp_path: Path, noted: object) -> None:
    write_adapter(tmp_path / "rust" / "checkpoint-100")
    (tmp_path / "rust" / "trainer_state.json").write_text(json.dumps({"best_model_checkpoint": noted}))
    assert only(find_adapters([tmp_path])).final.step == 100


def test_the_last_checkpoints_note_counts(tmp_path: Path) -> None:
    for step, best in ((80, 80), (90, 80), (100, 90)):
        folder = write_adapter(tmp_path / "rust" / f"checkpoint-{step}")
        (folder / "trainer_state.json").write_text(json.dumps({"best_model_checkpoint": f"checkpoint-{best}"}))
    assert only(find_adapters([tmp_path])).final.step == 90


def test_a_checkpoint_given_directly_belongs_to_its_run(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "rust" / "checkpoint-80")
    (tmp_path / "rust" / "samples.jsonl").write_text("{}\n")
    task = only(find_adapters([folder]))
    assert (task.name, task.final.step) == ("rust", 80)
    assert task.samples == tmp_path / "rust" / "samples.jsonl"


def test_two_checkpoints_given_directly_are_one_task(tmp_path: Path) -> None:
    folders = [write_adapter(tmp_path / "rust" / f"checkpoint-{step}") for step in (100, 80)]
    task = only(find_adapters(folders))
    assert (steps(task), task.final.step) == ([80, 100], 100)


def test_folders_given_twice_are_found_once(tmp_path: Path) -> None:
    write_adapter(tmp_path / "rust")
    write_adapter(tmp_path / "rust" / "checkpoint-80")
    again = find_adapters([tmp_path, tmp_path / "rust", tmp_path / "rust" / "checkpoint-80", tmp_path])
    assert again == find_adapters([tmp_path])


def test_a_named_adapter_of_a_run_and_its_checkpoints_are_one_task(tmp_path: Path) -> None:
    write_adapter(tmp_path / "run" / "poet")
    write_adapter(tmp_path / "run" / "checkpoint-80" / "poet")
    task = only(find_adapters([tmp_path]))
    assert (task.name, steps(task)) == ("poet", [80, None])


def test_a_step_written_in_two_ways_is_two_tasks(tmp_path: Path) -> None:
    write_adapter(tmp_path / "rust" / "checkpoint-080", seed=1)
    write_adapter(tmp_path / "rust" / "checkpoint-80")
    discovery = find_adapters([tmp_path])
    assert {task.name: steps(task) for task in discovery.tasks} == {"rust": [80], "rust-checkpoint-80": [80]}


def test_a_copy_of_a_checkpoint_is_found_once(tmp_path: Path) -> None:
    for place in ("checkpoint-80", "epoch_80", "checkpoint-80/adapter_model", "outputs/checkpoint-80"):
        write_adapter(tmp_path / "rust" / place)
    assert steps(only(find_adapters([tmp_path]))) == [80]


def test_texts_beside_an_adapter_are_found(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "rust")
    for name in ("samples.jsonl", "eval.jsonl", "README.md"):
        (folder / name).write_text("x")
    task = only(find_adapters([tmp_path]))
    assert (task.samples, task.eval_data) == (folder / "samples.jsonl", folder / "eval.jsonl")
    assert task.final.card == folder / "README.md"


def test_without_texts_there_are_none(tmp_path: Path) -> None:
    task = only(find_adapters([write_adapter(tmp_path / "rust")]))
    assert (task.samples, task.eval_data, task.final.card) == (None, None, None)


@pytest.mark.parametrize("twin", ["b/rust", "b/RUST"])
def test_folders_of_one_name_get_the_names_above_them(tmp_path: Path, twin: str) -> None:
    write_adapter(tmp_path / "a/rust")
    write_adapter(tmp_path / twin)
    write_adapter(tmp_path / "sql")
    discovery = find_adapters([tmp_path])
    assert [task.name for task in discovery.tasks] == ["a-rust", twin.replace("/", "-"), "sql"]
    assert discovery.refused == ()


def test_a_folder_with_a_name_that_says_nothing_is_called_like_the_one_above(tmp_path: Path) -> None:
    for name in ("t1/adapter", "t2/adapter", "t3/final_adapter", "t4/output/best"):
        write_adapter(tmp_path / "runs" / name)
    discovery = find_adapters([tmp_path / "runs"])
    assert ([task.name for task in discovery.tasks], discovery.refused) == (["t1", "t2", "t3", "t4"], ())
    assert discovery.tasks[0].final.place == tmp_path / "runs" / "t1" / "adapter"


def test_it_is_called_so_where_it_alone_is_given(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "t1" / "adapter")
    assert only(find_adapters([folder])).name == "t1"
    assert only(find_adapters([folder], name="mine")).name == "mine"
    assert find_adapters([folder, tmp_path / "t1", tmp_path]) == find_adapters([folder])


def test_what_was_saved_beside_checkpoints_is_the_runs_own(tmp_path: Path) -> None:
    for name in ("rust/checkpoint-80", "rust/checkpoint-100", "rust/final"):
        write_adapter(tmp_path / name)
    (tmp_path / "rust" / "samples.jsonl").write_text("x")
    task = only(find_adapters([tmp_path]))
    assert (task.name, steps(task), task.final.place) == ("rust", [80, 100, None], tmp_path / "rust" / "final")
    assert task.samples == tmp_path / "rust" / "samples.jsonl"


def test_checkpoints_in_a_folder_of_output_are_the_runs(tmp_path: Path) -> None:
    for step in (80, 100):
        write_adapter(tmp_path / "rust" / "output" / f"checkpoint-{step}")
    (tmp_path / "rust" / "output" / "trainer_state.json").write_text('{"best_model_checkpoint": "checkpoint-80"}')
    task = only(find_adapters([tmp_path]))
    assert (task.name, steps(task), task.final.step) == ("rust", [80, 100], 80)


def test_texts_nearest_to_the_adapter_count(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "rust" / "adapter")
    for place in (folder, folder.parent):
        (place / "samples.jsonl").write_text("x")
    (folder.parent / "eval.jsonl").write_text("x")
    for given in (folder, tmp_path):
        task = only(find_adapters([given]))
        assert (task.samples, task.eval_data) == (folder / "samples.jsonl", folder.parent / "eval.jsonl")


@pytest.mark.parametrize("copy", [True, False], ids=["copy", "other"])
def test_of_best_final_and_last_each_is_a_task_and_a_copy_is_none(tmp_path: Path, copy: bool) -> None:
    write_adapter(tmp_path / "rust/best", seed=1)
    write_adapter(tmp_path / "rust/last", seed=2)
    write_adapter(tmp_path / "rust/final", seed=1 if copy else 3)
    write_adapter(tmp_path / "rust/checkpoint-80", seed=4)
    (tmp_path / "rust/samples.jsonl").write_text("x")
    tasks = {task.name: task for task in find_adapters([tmp_path]).tasks}
    assert tasks["rust"].final.place == tmp_path / "rust/best"
    assert steps(tasks["rust"]) == [80, None]
    assert sorted(tasks) == ["rust", "rust-last"] if copy else ["rust", "rust-final", "rust-last"]
    assert tasks["rust-last"].samples == tmp_path / "rust/samples.jsonl"


def test_a_run_with_an_adapter_of_its_own_keeps_it(tmp_path: Path) -> None:
    run = write_adapter(tmp_path / "rust")
    write_adapter(tmp_path / "rust" / "adapter", seed=1)
    discovery = find_adapters([tmp_path])
    assert {task.name: task.final.place for task in discovery.tasks} == {"rust": run, "rust-adapter": run / "adapter"}


def test_adapters_of_other_base_models_are_not_checkpoints_of_a_run(tmp_path: Path) -> None:
    write_adapter(tmp_path / "rust" / "lora")
    write_adapter(tmp_path / "rust" / "outputs" / "checkpoint-5", base_model_name_or_path="acme/another")
    names = {task.name: steps(task) for task in find_adapters([tmp_path]).tasks}
    assert names == {"rust": [None], "rust-outputs": [5]}


def test_unsloths_two_folders_are_one_task(tmp_path: Path) -> None:
    for task in ("alpaca", "sql"):
        write_adapter(tmp_path / task / "lora_model")
        write_adapter(tmp_path / task / "outputs" / "checkpoint-60", seed=1)
        write_adapter(tmp_path / task / "outputs")  # `trainer.save_model()` saves the same once more
    tasks = find_adapters([tmp_path]).tasks
    assert [(task.name, steps(task)) for task in tasks] == [("alpaca", [60, None]), ("sql", [60, None])]
    assert tasks[0].final.place == tmp_path / "alpaca" / "lora_model"


def test_epochs_are_the_steps_of_their_run(tmp_path: Path) -> None:
    for place in ("a/epoch_1", "a/epoch_2", "b/epoch_1"):
        write_adapter(tmp_path / place)
    tasks = find_adapters([tmp_path]).tasks
    assert [(task.name, steps(task)) for task in tasks] == [("a", [1, 2]), ("b", [1])]


def test_files_that_are_not_kept_are_named_but_not_a_trainers_own(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "rust")
    passed_over = ["optimizer.pt", "random_states_0.pkl", "trainer_state.json", "config.json", "all_results.json"]
    passed_over += ["training_loss.png", "adapter_model.bin", ".gitattributes", "events.out.tfevents.1", "debug.log"]
    for name in [*passed_over, "tokenizer.json", "samples.jsonl", "README.md", "value_head.bin", "notes.txt"]:
        (folder / name).write_bytes(b"x")
    assert [path.name for path in only(find_adapters([tmp_path])).not_kept] == ["notes.txt", "value_head.bin"]


def test_a_folder_above_whose_name_cannot_name_a_task_is_made_plain(tmp_path: Path) -> None:
    write_adapter(tmp_path / "my runs" / "adapter")
    assert only(find_adapters([tmp_path])).name == "my-runs"


def test_texts_can_be_left_out(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "rust")
    (folder / "samples.jsonl").write_text("x")
    (folder / "eval.jsonl").symlink_to("/etc/hostname")
    task = only(find_adapters([tmp_path], texts=False))
    assert (task.samples, task.eval_data) == (None, None)


COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def snapshot(tmp_path: Path) -> Path:
    """A snapshot as the Hugging Face cache keeps it: links into the repository's blobs."""
    repository = tmp_path / "hub" / "models--acme--rust-lora"
    folder = write_adapter(repository / "snapshots" / COMMIT)
    (repository / "blobs").mkdir()
    for file in list(folder.iterdir()):
        file.rename(repository / "blobs" / file.name[:9])
        file.symlink_to(Path("../../blobs") / file.name[:9])
    return folder


def test_a_repository_of_the_cache_is_a_task_of_its_name(snapshot: Path) -> None:
    for given in (snapshot.parents[1], snapshot.parents[2]):
        assert only(find_adapters([given])).name == "rust-lora"


def test_a_snapshot_alone_is_refused_and_the_hint_names_its_repository(snapshot: Path) -> None:
    discovery = find_adapters([snapshot])
    assert discovery.tasks == ()
    assert {error.kind for error in discovery.refused} == {"symlink"}
    assert str(snapshot.parents[1]) in str(discovery.refused[0].hint)
    assert "cp -rL" in str(discovery.refused[0].hint)


def test_a_snapshot_of_regular_files_is_called_like_its_repository(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "models--acme--rust-lora" / "snapshots" / COMMIT)
    assert only(find_adapters([folder])).name == "rust-lora"


@pytest.mark.parametrize("name", ["-rf", "a b", "con", "a\x1b[2J", "é", "[red]", "_x"])
def test_a_folder_whose_name_cannot_name_a_task_is_a_task_of_a_plain_name(tmp_path: Path, name: str) -> None:
    write_adapter(tmp_path / name)
    assert task_name_problem(only(find_adapters([tmp_path])).name) is None


@pytest.mark.parametrize(
    ("folders", "names"),
    [
        (["a+b", "a b"], ["a-b", "a-b-2"]),
        (["a b", "a-b", "a+b"], ["a-b", "a-b-2", "a-b-3"]),
        (["dog", "Dog"], ["Dog", "dog-2"]),
        (["dog", "Dog", "other/dog"], ["dog-2", "other-dog", "runs-Dog"]),
        (["猫娘画风", "cafe\u0301", "水墨画"], ["café", "水墨画", "猫娘画风"]),
    ],
)
def test_folders_whose_names_come_out_alike_are_numbered(tmp_path: Path, folders: list[str], names: list[str]) -> None:
    for folder in folders:
        write_adapter(tmp_path / "runs" / folder)
    assert [task.name for task in find_adapters([tmp_path / "runs"]).tasks] == names


def test_a_name_that_is_no_unicode_is_replaced(tmp_path: Path) -> None:
    write_adapter(Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff\xfe")))
    assert only(find_adapters([tmp_path])).name.startswith("task-")


def test_a_given_name_replaces_the_folders(tmp_path: Path) -> None:
    write_adapter(tmp_path / "a b")
    assert only(find_adapters([tmp_path / "a b"], name="ab")).name == "ab"


def test_a_given_name_needs_exactly_one_task(tmp_path: Path) -> None:
    write_adapter(tmp_path / "a")
    write_adapter(tmp_path / "b")
    with pytest.raises(AdapterRefused, match="2 were found"):
        find_adapters([tmp_path], name="ab")


def test_a_given_name_must_be_a_task_name(tmp_path: Path) -> None:
    with pytest.raises(AdapterRefused, match="is not a valid task name"):
        find_adapters([write_adapter(tmp_path / "a")], name="../x")


def test_a_path_that_is_missing_or_a_file_is_reported(tmp_path: Path) -> None:
    weights = write_adapter(tmp_path / "a") / "adapter_model.safetensors"
    discovery = find_adapters([tmp_path / "none", weights])
    assert [error.kind for error in discovery.refused] == ["not-a-folder"] * 2


def test_an_empty_folder_has_neither_tasks_nor_refusals(tmp_path: Path) -> None:
    assert find_adapters([tmp_path]) == Discovery((), ())


@pytest.mark.parametrize("name", ["checkpoint-", "checkpoint-1a", "checkpoint-٣", "xcheckpoint-1", "checkpoint-1\n"])
def test_only_digits_make_a_checkpoint(name: str) -> None:
    assert step_of(name) is None


def test_a_state_that_cannot_be_read_notes_nothing(tmp_path: Path) -> None:
    assert best_step(tmp_path / "none") is None
