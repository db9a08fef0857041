"""Finding a base model on this machine."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest

from icmlora.base_models.finding.lookup import find_base_model, inspect_base
from icmlora.errors import BaseModelNotFound

LABEL = "maker/model"


def fake_base(folder: Path, weights: bytes = b"weights") -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(weights)
    return folder


def fake_cache(root: Path, commit: str = "0" * 40) -> Path:
    repository = root / "models--maker--model"
    fake_base(repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    return root


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the network was touched")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder and a cache with nothing in them."""
    monkeypatch.chdir(tmp_path)
    return tmp_path / "cache"


def test_an_alias_comes_first(empty: Path, tmp_path: Path) -> None:
    named = fake_base(tmp_path / "named")
    fake_base(tmp_path / LABEL)
    assert find_base_model(LABEL, aliases={LABEL: named}, cache_dir=fake_cache(empty)).path == named


def test_an_alias_for_another_label_is_not_taken(empty: Path, tmp_path: Path) -> None:
    named = fake_base(tmp_path / "named")
    with pytest.raises(BaseModelNotFound):
        find_base_model(LABEL, aliases={"other": named}, cache_dir=empty)


def test_an_alias_that_leads_nowhere_is_an_error_and_not_passed_over(empty: Path, tmp_path: Path) -> None:
    with pytest.raises(BaseModelNotFound, match="does not exist") as caught:
        find_base_model(LABEL, aliases={LABEL: tmp_path / "gone"}, cache_dir=fake_cache(empty))
    assert caught.value.path == str(tmp_path / "gone")


def test_a_label_that_is_a_folder_is_found(empty: Path, tmp_path: Path) -> None:
    folder = fake_base(tmp_path / "here")
    found = find_base_model(str(folder), cache_dir=empty)
    assert (found.path, found.weights) == (folder, (folder / "model.safetensors",))


def test_a_model_of_the_hugging_face_cache_is_found(empty: Path) -> None:
    found = find_base_model(LABEL, cache_dir=fake_cache(empty))
    assert found.path.parent.name == "snapshots"


def test_another_revision_than_the_cached_one_is_not_found(empty: Path) -> None:
    with pytest.raises(BaseModelNotFound):
        find_base_model(f"{LABEL}@v2", cache_dir=fake_cache(empty))


def test_the_revision_in_a_label_is_looked_for(empty: Path) -> None:
    commit = "1" * 40
    found = find_base_model(f"{LABEL}@{commit}", cache_dir=fake_cache(empty, commit))
    assert found.path.name == commit
    with pytest.raises(BaseModelNotFound):
        find_base_model(f"{LABEL}@v2", cache_dir=empty)


def test_a_relative_label_is_not_looked_for_in_the_current_directory(empty: Path, tmp_path: Path) -> None:
    fake_base(tmp_path / LABEL)
    for label in (LABEL, f"./{LABEL}"):
        with pytest.raises(BaseModelNotFound):
            find_base_model(label, cache_dir=empty)


def test_a_folder_of_the_same_name_without_a_model_does_not_hide_the_cache(empty: Path, tmp_path: Path) -> None:
    (tmp_path / LABEL).mkdir(parents=True)
    assert find_base_model(LABEL, cache_dir=fake_cache(empty)).path.parent.name == "snapshots"


def test_nothing_found_says_how_to_name_a_copy(empty: Path) -> None:
    with pytest.raises(BaseModelNotFound, match="no local copy") as caught:
        find_base_model(LABEL, cache_dir=empty)
    assert caught.value.hint == "run `icm base add maker/model PATH` to specify a local copy"


@pytest.mark.parametrize("label", ["", "\0", "x" * 5000, "../..", "https://host/model", "a/b/c/d", "\x1b[31m", "-rf"])
def test_a_hostile_label_is_just_not_found(empty: Path, label: str) -> None:
    with pytest.raises(BaseModelNotFound) as caught:
        find_base_model(label, cache_dir=empty)
    assert "\x1b" not in str(caught.value) + str(caught.value.hint)


def test_a_gguf_file_is_a_base_model(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF....")
    found = inspect_base(LABEL, file)
    assert (found.is_gguf, found.weights) == (True, (file,))


def test_the_only_gguf_file_of_a_folder_is_taken(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF....")
    assert inspect_base(LABEL, tmp_path).path == tmp_path / "model.gguf"


def test_a_file_that_is_only_called_gguf_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"PK\x03\x04")
    with pytest.raises(BaseModelNotFound, match="not GGUF"):
        inspect_base(LABEL, file)


def test_pickled_weights_are_named_and_not_opened(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").mkdir()  # a folder: opening it would raise something else
    with pytest.raises(BaseModelNotFound, match="only pickled weights"):
        inspect_base(LABEL, tmp_path)


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(BaseModelNotFound, match="no safetensors weights"):
        inspect_base(LABEL, tmp_path)


@pytest.mark.parametrize("config", [None, b"{", b"[1]", b"[" * 100_000])
def test_a_folder_without_a_readable_configuration_is_refused(tmp_path: Path, config: bytes | None) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    if config is not None:
        (tmp_path / "config.json").write_bytes(config)
    with pytest.raises(BaseModelNotFound, match=r"config\.json"):
        inspect_base(LABEL, tmp_path)


def sharded(folder: Path, names: list[str]) -> None:
    (folder / "config.json").write_text("{}")
    table = {f"tensor{number}": name for number, name in enumerate(names)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": table}))


def test_all_shards_of_a_model_are_its_weights(tmp_path: Path) -> None:
    sharded(tmp_path, ["b.safetensors", "a.safetensors", "b.safetensors"])
    for name in ("a.safetensors", "b.safetensors"):
        (tmp_path / name).write_bytes(b"weights")
    assert [file.name for file in inspect_base(LABEL, tmp_path).weights] == ["a.safetensors", "b.safetensors"]


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    sharded(tmp_path, ["a.safetensors"])
    with pytest.raises(BaseModelNotFound, match=r"a\.safetensors"):
        inspect_base(LABEL, tmp_path)


@pytest.mark.parametrize("names", [[], ["../a.safetensors"], ["/etc/passwd"], [""]])
def test_shards_outside_the_folder_are_refused(tmp_path: Path, names: list[str]) -> None:
    sharded(tmp_path, names)
    with pytest.raises(BaseModelNotFound, match="malformed"):
        inspect_base(LABEL, tmp_path)


def test_the_stamp_changes_when_a_weight_file_does(tmp_path: Path) -> None:
    folder = fake_base(tmp_path / "base")
    before = inspect_base(LABEL, folder).stamp()
    assert inspect_base(LABEL, folder).stamp() == before
    (folder / "model.safetensors").write_bytes(b"other weights")
    assert inspect_base(LABEL, folder).stamp() != before
