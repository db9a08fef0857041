"""Where base models are on this machine: the file, who may write it, and what is found through it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from icmlora.base_models.finding.locations import (
    Location,
    find_located,
    location_of,
    locations,
    locations_file,
    set_location,
)
from icmlora.errors import BaseModelNotFound, DataError
from tests.cli.homeless import leave_home

ORIGINAL, MIRROR = "meta-llama/Meta-Llama-3-8B-Instruct", "unsloth/llama-3-8b-Instruct-bnb-4bit"
FILE = "base_models.yaml"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Where the locations of the test are."""
    return tmp_path / "config" / "icm" / FILE


def write_base(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


def test_what_is_set_is_read_again_and_people_can_read_it_too(file: Path) -> None:
    set_location("org/model@v1", Location(Path("/модели/1"), load_in="nf4"))
    set_location("/loras/model", Location(Path("/models/2"), loader="my_models:load"))
    assert locations() == {
        "org/model@v1": Location(Path("/модели/1"), load_in="nf4"),
        "/loras/model": Location(Path("/models/2"), loader="my_models:load"),
    }
    assert file.read_text() == (
        "# Where base models are on this machine, written by `icm base add` and `icm base rm`.\n"
        "/loras/model:\n  loader: my_models:load\n  path: /models/2\n"
        "org/model@v1:\n  load_in: nf4\n  path: /модели/1\n"
    )


@pytest.mark.parametrize("name", ["null", "1.5", "yes", "a: b", "#", "-", "зима", "C:\\models\\x"])
def test_a_name_stays_what_it_is(name: str) -> None:
    set_location(name, Location(Path("/models/x")))
    assert list(locations()) == [name]


def test_a_later_location_counts_and_none_forgets_it(file: Path) -> None:
    set_location("model", Location(Path("/models/1"), load_in="int8"))
    set_location("model", Location(Path("/models/2")))
    assert locations() == {"model": Location(Path("/models/2"))}
    set_location("model", None)
    set_location("model", None)
    assert (locations(), file.exists()) == ({}, True)


def test_the_file_is_next_to_the_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: Path) -> None:
    assert locations_file() == file
    monkeypatch.setenv("XDG_CONFIG_HOME", "relative")
    assert locations_file() == tmp_path / "home" / ".config" / "icm" / FILE
    monkeypatch.setenv("ICM_CONFIG", str(tmp_path / "elsewhere" / "mine.toml"))
    assert locations_file() == tmp_path / "elsewhere" / FILE


def test_without_a_home_nothing_is_known_and_setting_one_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    leave_home(monkeypatch)
    assert locations() == {}
    with pytest.raises(DataError, match="no home folder") as caught:
        set_location("model", Location(Path("/models/x")))
    assert caught.value.hint == "set HOME or XDG_CONFIG_HOME or ICM_CONFIG"


@pytest.mark.parametrize(
    ("text", "fact"),
    [
        ("model: [", "is not YAML"),
        ("- model", "is not a mapping"),
        ("model: /models/x", "has no path for 'model'"),
        ("model: {loader: a:b}", "has no path for 'model'"),
        ("model: {path: /x, paht: /y}", "has an unknown key 'paht'"),
        ("model: {path: /x, loader: 1}", "that is not MODULE:FUNCTION"),
        ("model: {path: /x, load_in: int4}", "that is not nf4 or int8"),
        ("model: {path: /x, load_in: [nf4]}", "that is not nf4 or int8"),
    ],
)
def test_a_file_that_cannot_be_used_is_named_and_stays(file: Path, text: str, fact: str) -> None:
    file.parent.mkdir(parents=True)
    file.write_text(text)
    for call in (locations, lambda: set_location("other", Location(Path("/models/x")))):
        with pytest.raises(DataError, match=fact) as caught:
            call()
        assert caught.value.path == str(file)
    assert file.read_text() == text


def test_a_path_that_was_written_by_hand_may_be_relative_or_in_the_home(file: Path, tmp_path: Path) -> None:
    file.parent.mkdir(parents=True)
    file.write_text("one: {path: ~/models/one}\ntwo: {path: two}\n")
    home = tmp_path / "home" / "models" / "one"
    assert locations() == {"one": Location(home), "two": Location(file.parent / "two")}


def test_a_link_to_a_file_elsewhere_stays_a_link(file: Path, tmp_path: Path) -> None:
    file.parent.mkdir(parents=True)
    (tmp_path / "dotfiles").mkdir()
    file.symlink_to(tmp_path / "dotfiles" / FILE)
    set_location("model", Location(Path("/models/x")))
    assert (file.is_symlink(), list(locations())) == (True, ["model"])


def test_what_a_killed_process_left_is_in_nobodys_way(file: Path) -> None:
    file.parent.mkdir(parents=True)
    file.with_name(f"{FILE}.new").write_text("half")
    set_location("model", Location(Path("/models/x")))
    assert (list(locations()), file.with_name(f"{FILE}.new").exists()) == (["model"], False)


def test_processes_that_write_at_once_lose_nothing_of_each_other() -> None:
    script = (
        "import sys; from pathlib import Path;"
        "from icmlora.base_models.finding.locations import Location, set_location;"
        "[set_location(f'{sys.argv[1]}/{n}', Location(Path('/models/x'))) for n in range(20)];"
        "print('torch' in sys.modules)"
    )
    started = [
        subprocess.Popen([sys.executable, "-c", script, who], env=os.environ, stdout=subprocess.PIPE, text=True)
        for who in ("ana", "ben", "cleo")
    ]
    assert [process.communicate()[0] for process in started] == ["False\n"] * 3
    assert locations().keys() == {f"{who}/{number}" for who in ("ana", "ben", "cleo") for number in range(20)}


def test_a_base_model_is_found_under_each_of_its_names(tmp_path: Path) -> None:
    set_location("its/copy", Location(write_base(tmp_path / "base"), load_in="nf4"))
    for names in (["its/copy"], ["its/name", "its/copy"], ["other/name", "its/name", "its/copy"]):
        found = find_located(names)
        assert (found.path, found.load_in) == (tmp_path / "base", "nf4")
        assert location_of(names, locations()) == Location(tmp_path / "base", load_in="nf4")


def test_a_location_that_is_gone_is_what_is_reported(tmp_path: Path) -> None:
    set_location("its/name", Location(tmp_path / "gone"))
    with pytest.raises(BaseModelNotFound) as caught:
        find_located(["its/copy", "its/name"])
    assert caught.value.path == str(tmp_path / "gone")


def test_the_original_comes_before_a_quantised_mirror(tmp_path: Path) -> None:
    set_location(MIRROR, Location(write_base(tmp_path / "mirror")))
    assert find_located([ORIGINAL, MIRROR]).path == tmp_path / "mirror"
    set_location(ORIGINAL, Location(write_base(tmp_path / "original")))
    assert find_located([MIRROR, ORIGINAL]).path == tmp_path / "original"
