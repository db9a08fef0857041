"""Hostile trees: links, loops, special files, depth and number."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from icmlora.errors import UnsafeInput
from icmlora.formats.discovery import tree as tree_walk
from icmlora.formats.discovery.discovery import Discovery, find_adapters
from tests.icmlora.adapter_files import write_adapter


def found(root: Path) -> tuple[list[str], list[str]]:
    discovery: Discovery = find_adapters([root])
    return [task.name for task in discovery.tasks], [error.kind for error in discovery.refused]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "loras" / "rust").parent


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "outside" / "sql")


def test_a_link_to_a_folder_outside_is_refused(root: Path, outside: Path) -> None:
    (root / "sql").symlink_to(outside)
    assert found(root) == (["rust"], ["symlink"])


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
def test_a_link_to_an_adapters_file_outside_is_refused(root: Path, outside: Path, name: str) -> None:
    (root / "rust" / name).unlink()
    (root / "rust" / name).symlink_to(outside / name)
    names, kinds = found(root)
    assert names == []
    assert "symlink" in kinds


def test_a_link_to_samples_outside_is_refused_and_the_task_kept(root: Path, outside: Path) -> None:
    (outside / "samples.jsonl").write_text("{}")
    (root / "rust" / "samples.jsonl").symlink_to(outside / "samples.jsonl")
    assert found(root) == (["rust"], ["symlink"])


def test_a_link_to_any_other_file_outside_does_not_matter(root: Path, outside: Path) -> None:
    (root / "rust" / "tokenizer.json").symlink_to(outside / "adapter_config.json")
    assert found(root) == (["rust"], [])


def test_a_link_inside_the_tree_is_read_where_it_leads(root: Path) -> None:
    blob = root / "blob"
    (root / "rust" / "adapter_model.safetensors").rename(blob)
    (root / "rust" / "adapter_model.safetensors").symlink_to("../blob")
    discovery = find_adapters([root])
    assert discovery.tasks[0].final.weights == blob
    assert discovery.refused == ()


def test_a_link_to_a_folder_inside_the_tree_is_met_once(root: Path) -> None:
    (root / "latest").symlink_to("rust")
    assert found(root) == (["rust"], [])


def test_a_folder_given_as_a_link_is_followed(root: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(root)
    assert found(tmp_path / "link") == (["rust"], [])


@pytest.mark.parametrize("target", [".", "..", "loop", "/"])
def test_a_loop_of_links_ends(root: Path, target: str) -> None:
    (root / "loop").symlink_to(target)
    names, kinds = found(root)
    assert names == ["rust"]
    assert set(kinds) <= {"symlink"}


def test_a_link_that_leads_nowhere_is_refused_where_it_matters(root: Path) -> None:
    (root / "rust" / "samples.jsonl").symlink_to("none")
    (root / "rust" / "other").symlink_to("none")
    assert found(root) == (["rust"], ["symlink"])


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", "samples.jsonl"])
def test_a_fifo_is_refused_without_waiting(root: Path, name: str) -> None:
    (root / "rust" / name).unlink(missing_ok=True)
    os.mkfifo(root / "rust" / name)
    assert "special-file" in found(root)[1]


def test_a_fifo_of_any_other_name_does_not_matter(root: Path) -> None:
    os.mkfifo(root / "rust" / "pipe.safetensors")
    assert found(root) == (["rust"], [])


def test_empty_files_are_left_to_the_inspection(root: Path) -> None:
    (root / "rust" / "adapter_model.safetensors").write_bytes(b"")
    assert found(root) == (["rust"], [])


def test_a_depth_of_a_thousand_folders_is_walked(root: Path) -> None:
    deep = str(root)
    for _ in range(1000):
        deep += "/d"
        os.mkdir(deep)
    write_adapter(Path(deep) / "deep")
    assert found(root) == (["deep", "rust"], [])
    # Removed step by step: the usual helpers recurse.
    shutil.rmtree(Path(deep) / "deep")
    os.removedirs(deep)


def test_more_entries_than_allowed_are_refused(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tree_walk, "MAX_ENTRIES", 2)
    with pytest.raises(UnsafeInput, match="more than 2 files"):
        find_adapters([root])


def test_a_folder_that_cannot_be_read_is_reported_and_the_rest_goes_on(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (root / "closed").mkdir()
    scandir = os.scandir

    def closed(path: Path) -> object:
        if Path(path).name == "closed":
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr("os.scandir", closed)
    assert found(root) == (["rust"], ["unreadable"])


@pytest.mark.parametrize("name", [".git", ".cache", "rust.icm-0123abcd"])
def test_hidden_and_unfinished_folders_are_skipped(root: Path, name: str) -> None:
    write_adapter(root / name)
    assert found(root) == (["rust"], [])
