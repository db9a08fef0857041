"""What a base model is called: hub names with revisions, and paths, which are resolved beside the adapter."""

from __future__ import annotations

from pathlib import Path

import pytest

from icmlora.base_models.finding.labels import full_label, lookalikes, typed_label
from registry.names import split_label


def base_at(folder: Path) -> Path:
    """Write what is found as a base model."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


def named(label: str | None, place: Path, revision: str | None = None) -> str | None:
    return full_label(label, revision, place, place)


@pytest.mark.parametrize("revision", [None, "", "main"])
def test_main_is_no_revision(tmp_path: Path, revision: str | None) -> None:
    assert named("maker/model", tmp_path, revision) == "maker/model"


def test_a_revision_is_part_of_the_name(tmp_path: Path) -> None:
    label = named("maker/model", tmp_path, "abc123")
    assert label == "maker/model@abc123"
    assert (split_label(label), split_label("maker/model")) == (("maker/model", "abc123"), ("maker/model", None))


def test_an_absolute_path_stays_and_has_no_revision(tmp_path: Path) -> None:
    assert named("/models/m@2", tmp_path, "abc123") == "/models/m@2"
    assert split_label("/models/m@2") == ("/models/m@2", None)


@pytest.mark.parametrize("label", [None, ""])
def test_no_label_is_no_name(tmp_path: Path, label: str | None) -> None:
    assert named(label, tmp_path, "abc123") is None


@pytest.mark.parametrize(
    ("label", "base", "place"),
    [
        ("./model", "model", "poems"),
        ("../base", "base", "work/poems"),
        ("model", "model", "out/poems/checkpoint-5"),
        ("models/tiny/llama", "models/tiny/llama", "poems"),
    ],
)
def test_a_relative_path_is_found_above_the_adapter(tmp_path: Path, label: str, base: str, place: str) -> None:
    folder = base_at(tmp_path / base)
    adapter = tmp_path / place
    adapter.mkdir(parents=True)
    assert named(label, adapter) == str(folder)


def test_the_current_directory_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base_at(tmp_path / "here" / "model")
    monkeypatch.chdir(tmp_path / "here")
    (tmp_path / "loras" / "poems").mkdir(parents=True)
    assert named("./model", tmp_path / "loras" / "poems") == str(tmp_path / "loras" / "model")


def test_two_folders_of_one_relative_label_are_two_base_models(tmp_path: Path) -> None:
    names = {named("./model", tmp_path / project / "poems") for project in ("first", "second")}
    assert names == {str(tmp_path / "first" / "model"), str(tmp_path / "second" / "model")}


def test_a_hub_name_that_is_no_folder_stays(tmp_path: Path) -> None:
    (tmp_path / "maker" / "model").mkdir(parents=True)  # without a model in it
    assert named("maker/model", tmp_path / "poems") == "maker/model"


@pytest.mark.parametrize("label", ["\0", "x" * 5000, "./\0", "https://host/model"])
def test_a_hostile_label_is_only_a_name(tmp_path: Path, label: str) -> None:
    assert isinstance(named(label, tmp_path), str)


def test_a_typed_path_is_one_from_the_current_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert typed_label("./model") == str(tmp_path / "model")
    assert typed_label("maker/model") == "maker/model"


def test_labels_that_look_like_one_model_are_grouped() -> None:
    alike = [
        "/models/gemma-3-270m-it/",
        "C:\\models\\gemma-3-270m-it",
        "/hub/models--google--gemma-3-270m-it/snapshots/0123456",
        "gemma3-270m-it",
        "google/gemma-3-270m-it",
        "google/gemma-3-270m-it@c5ebcd4",
    ]
    assert lookalikes([*alike, "google/gemma-3-270m", "acme/tiny"]) == [sorted(alike)]
