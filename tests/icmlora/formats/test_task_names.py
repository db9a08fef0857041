"""What a folder's task is called."""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import assume, given, strategies as st

from icmlora.formats.discovery.naming import choose_names
from icmlora.formats.discovery.task_names import (
    cached_repository,
    is_generic,
    name_chain,
    names_above,
    naming_folder,
    plain_name,
    run_folder,
    step_of,
)
from registry.names import MAX_NAME, task_name_problem

COMMIT = "0123456789abcdef0123456789abcdef01234567"


NAMES = [
    "adapter",
    "final",
    "best",
    "lora",
    "output",
    "last",
    "model",
    "final_adapter",
    "Best-Model",
    "checkpoint-final",
]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_that_says_what_lies_there_is_passed_over(name: str) -> None:
    assert naming_folder(Path("/runs/rust") / name) == Path("/runs/rust")


@pytest.mark.parametrize(
    "name", ["rust", "final-fantasy", "output1", "best_", "-", "checkpoint-80", "adapter.v2", "lo"]
)
def test_any_other_name_is_the_tasks(name: str) -> None:
    assert naming_folder(Path("/runs/rust") / name) == Path("/runs/rust") / name


def test_the_nearest_folder_that_says_something_counts() -> None:
    assert naming_folder(Path("/runs/rust/output/final_adapter")) == Path("/runs/rust")


@pytest.mark.parametrize("folder", ["/adapter", "/output/adapter"])
def test_where_no_folder_says_anything_the_name_is_its_own(folder: str) -> None:
    assert naming_folder(Path(folder)) == Path(folder)


@pytest.mark.parametrize("repository", ["models--acme--rust", "models--rust", "models--acme--sub--rust"])
def test_a_snapshot_is_called_like_its_repository(repository: str) -> None:
    assert names_above(Path("/hub") / repository / "snapshots" / COMMIT)[0] == "rust"


@pytest.mark.parametrize(
    "folder",
    [f"models--acme--rust/{COMMIT}", f"rust/snapshots/{COMMIT}", "models--acme--rust/snapshots/main", COMMIT],
)
def test_what_is_no_snapshot_keeps_its_name(folder: str) -> None:
    assert names_above(Path("/hub") / folder)[0] == Path(folder).name


def test_the_repository_of_a_file_in_the_cache_is_found() -> None:
    repository = Path("/hub/models--acme--rust")
    assert cached_repository(repository / "snapshots" / COMMIT / "sub" / "adapter_config.json") == repository
    assert cached_repository(Path("/loras/snapshots/x/adapter_config.json")) is None


@pytest.mark.parametrize(
    ("folder", "names"),
    [
        ("/saves/Llama/lora/sft", ["sft", "Llama-sft", "saves-Llama-sft"]),
        ("/runs/rust", ["rust", "runs-rust"]),
        ("/sd/cat/unet", ["cat-unet", "sd-cat-unet"]),
        ("/sd/cat/Text_Encoder_2", ["cat-Text_Encoder_2", "sd-cat-Text_Encoder_2"]),
        ("/hub/acme-svg/adapter_seed123", ["acme-svg-adapter_seed123", "hub-acme-svg-adapter_seed123"]),
        ("/hub/acme-svg/adapter_curriculum_stage1", ["acme-svg-adapter_curriculum_stage1"]),
        ("/loras/adapter-dog", ["adapter-dog", "loras-adapter-dog"]),
        ("/lf/run/pissa_converted", ["run-pissa_converted", "lf-run-pissa_converted"]),
        (f"/hub/models--acme--rust/snapshots/{COMMIT}", ["rust", "acme-rust", "0123456-acme-rust"]),
    ],
)
def test_longer_names_have_the_names_above_in_front(folder: str, names: list[str]) -> None:
    assert name_chain(Path(folder))[: len(names)] == names


def test_what_tells_two_tasks_of_one_folder_apart_is_at_the_end_of_every_name() -> None:
    assert name_chain(Path("/runs/sql"), "last")[:2] == ["sql-last", "runs-sql-last"]


def test_the_last_name_belongs_to_this_folder_alone() -> None:
    assert name_chain(Path("/a/x y"))[-1] != name_chain(Path("/a/x-y"))[-1]


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("my lora (v2)", "my-lora-v2"),
        ("Über", "Über"),
        ("U\u0308ber", "Über"),
        ("水墨画 v2（新）", "水墨画-v2-新"),
        ("a\u202eb", "ab"),
        ("dog \U0001f436", "dog"),
        ("a+b", "a-b"),
        ("r=8,lr=1e-4", "r-8-lr-1e-4"),
        ("2024-05-01_run", "2024-05-01_run"),
        ("-rf", "rf"),
        ("a\x1b[2J", "a-2J"),
    ],
)
def test_a_name_is_made_plain(name: str, plain: str) -> None:
    assert plain_name(name) == plain


@given(name=st.text(max_size=300))
def test_every_name_can_be_made_one_of_a_task_and_stays_it(name: str) -> None:
    plain = plain_name(name)
    assert task_name_problem(plain) is None
    assert plain_name(plain) == plain
    assert len(plain) <= MAX_NAME


@given(st.text(st.characters(categories=["L", "N"]), min_size=1, max_size=40))
def test_letters_and_digits_of_any_script_stay_as_they_are(name: str) -> None:
    composed = unicodedata.normalize("NFC", name)
    assume(task_name_problem(composed) is None)
    assert plain_name(name) == composed


@pytest.mark.parametrize(
    ("name", "step"),
    [
        *(("checkpoint-80", 80), ("epoch_2", 2), ("epoch-3", 3), ("step_500", 500), ("global_step_7", 7)),
        *(("global_step12", 12), ("iter_4", 4), ("checkpoint_9", 9), ("epoch", None), ("step1", None)),
        *(("epoch_1_best", None), ("my_epoch_1", None)),
    ],
)
def test_steps_are_read_from_the_names_that_trainers_use(name: str, step: int | None) -> None:
    assert step_of(name) == step


def test_an_adapter_inside_a_checkpoint_belongs_to_the_run() -> None:
    assert run_folder(Path("/runs/rust/checkpoint-80/poet")) == (Path("/runs/rust/poet"), 80)
    assert run_folder(Path("/checkpoint-1/a/b/c"), 2) == (Path("/checkpoint-1/a/b/c"), None)


def test_of_several_snapshots_the_one_of_main_has_the_name(tmp_path: Path) -> None:
    repository = tmp_path / "models--acme--rust"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    assert name_chain(repository / "snapshots" / COMMIT)[0] == "rust"
    assert name_chain(repository / "snapshots" / ("a" * 40))[0] == "rust-aaaaaaa"


@dataclass(frozen=True)
class Found:
    """As much of a found task as its name is made of."""

    folder: Path
    root: Path = Path("/loras")
    part: str | None = None
    files: tuple[Path, Path | None] = (Path("/none"), None)

    @property
    def places(self) -> tuple[Path, ...]:
        return (self.folder,)


FOLDERS = st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=12)


@given(st.lists(FOLDERS.filter(lambda name: name not in (".", "..")), min_size=1, max_size=8, unique=True))
def test_folders_of_any_names_become_tasks_that_no_two_file_systems_confuse(folders: list[str]) -> None:
    tasks = [Found(Path("/loras") / folder) for folder in folders]
    names = choose_names(tasks)
    assert all(task_name_problem(name) is None for name in names)
    assert len({name.lower() for name in names}) == len(names)
    assert dict(zip(folders[::-1], choose_names(tasks[::-1]), strict=True)) == dict(zip(folders, names, strict=True))
    alone = [plain_name(folder).lower() for folder in folders]
    for folder, name in zip(folders, names, strict=True):
        if task_name_problem(folder) is None and alone.count(folder.lower()) == 1 and not is_generic(folder):
            assert name == folder
