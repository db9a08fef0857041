"""What a folder's task is called."""

from __future__ import annotations

from pathlib import Path

import pytest

from icmlora.formats.task_names import cached_repository, name_of, telling_folder

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
    assert telling_folder(Path("/runs/rust") / name) == Path("/runs/rust")


@pytest.mark.parametrize(
    "name", ["rust", "final-fantasy", "output1", "best_", "-", "checkpoint-80", "adapter.v2", "lo"]
)
def test_any_other_name_is_the_tasks(name: str) -> None:
    assert telling_folder(Path("/runs/rust") / name) == Path("/runs/rust") / name


def test_the_nearest_folder_that_says_something_counts() -> None:
    assert telling_folder(Path("/runs/rust/output/final_adapter")) == Path("/runs/rust")


@pytest.mark.parametrize("folder", ["/adapter", "/output/adapter"])
def test_where_no_folder_says_anything_the_name_is_its_own(folder: str) -> None:
    assert telling_folder(Path(folder)) == Path(folder)


@pytest.mark.parametrize("repository", ["models--acme--rust", "models--rust", "models--acme--sub--rust"])
def test_a_snapshot_is_called_like_its_repository(repository: str) -> None:
    assert name_of(Path("/hub") / repository / "snapshots" / COMMIT) == "rust"


@pytest.mark.parametrize(
    "folder",
    [f"models--acme--rust/{COMMIT}", f"rust/snapshots/{COMMIT}", "models--acme--rust/snapshots/main", COMMIT],
)
def test_what_is_no_snapshot_keeps_its_name(folder: str) -> None:
    assert name_of(Path("/hub") / folder) == Path(folder).name


def test_the_repository_of_a_file_in_the_cache_is_found() -> None:
    repository = Path("/hub/models--acme--rust")
    assert cached_repository(repository / "snapshots" / COMMIT / "sub" / "adapter_config.json") == repository
    assert cached_repository(Path("/loras/snapshots/x/adapter_config.json")) is None
