"""`Fleet.base_models`, `add_base_model` and `forget_base_model`."""

from __future__ import annotations

from pathlib import Path

import pytest

from icmlora import BaseModelNotFound, Fleet
from tests.icmlora.fleet.stores import files_of
from tests.icmlora.tiny_base import LABEL


@pytest.fixture
def new(tmp_path: Path) -> Fleet:
    """A fleet without a store."""
    return Fleet(tmp_path / "new")


def test_adding_a_base_model_makes_the_store(new: Fleet, base_folder: Path) -> None:
    assert new.add_base_model("my/base", str(base_folder)) == base_folder
    (known,) = new.base_models()
    assert (known.base.name, known.path, known.problem, known.tasks) == ("my/base", base_folder, None, 0)


def test_a_relative_path_is_recorded_as_an_absolute_one(
    new: Fleet, base_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(base_folder.parent)
    assert new.add_base_model(LABEL, base_folder.name) == base_folder


def test_the_later_place_counts(new: Fleet, base_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "copy").symlink_to(base_folder)
    new.add_base_model(LABEL, base_folder)
    new.add_base_model(LABEL, tmp_path / "copy")
    assert [str(known.path) for known in new.base_models()] == [str(tmp_path / "copy")]


def test_a_path_without_a_base_model_is_refused_and_makes_no_store(new: Fleet, loras: Path, tmp_path: Path) -> None:
    for path in (tmp_path / "nowhere", loras):
        with pytest.raises(BaseModelNotFound) as error:
            new.add_base_model(LABEL, path)
        assert error.value.path == str(path)
    assert not new.path.exists()


def test_a_base_model_that_adapters_name_is_listed_with_what_is_missing(new: Fleet, loras: Path) -> None:
    new.ingest([loras])
    (known,) = new.base_models()
    assert (known.base.name, known.tasks, known.path) == (LABEL, 3, None)
    assert LABEL in str(known.problem)


def test_a_forgotten_base_model_keeps_its_adapters(fleet: Fleet, base_folder: Path) -> None:
    before = files_of(base_folder)
    fleet.forget_base_model(LABEL)
    (known,) = fleet.base_models()
    assert (known.path, known.tasks, files_of(base_folder)) == (None, 3, before)
    assert fleet.load("poems", source="code").base_model == LABEL


def test_a_base_model_that_went_away_says_so(new: Fleet, base_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "copy").symlink_to(base_folder)
    new.add_base_model(LABEL, tmp_path / "copy")
    (tmp_path / "copy").unlink()
    (known,) = new.base_models()
    assert known.path is None
    assert str(tmp_path / "copy") in str(known.problem)


def test_an_unknown_base_model_cannot_be_forgotten(fleet: Fleet) -> None:
    before = files_of(fleet.path)
    with pytest.raises(BaseModelNotFound, match="no base model is named 'tiny/lama'") as error:
        fleet.forget_base_model("tiny/lama")
    assert (error.value.hint, files_of(fleet.path)) == ("run `icm base ls` to list them", before)
